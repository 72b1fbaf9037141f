"""The loop: one readable step, an epoch of steps, and what is kept between epochs."""
import json
import math
import os
import time
from contextlib import nullcontext
from copy import deepcopy
from csv import DictWriter
from dataclasses import dataclass, fields, replace
from io import StringIO
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors import safe_open
from safetensors.torch import save
from tqdm.auto import tqdm

from anogan.corruption import coarse_noise
from anogan.data import iterate
from anogan.discriminator import init_weights
from anogan.errors import InputError, TrainingError, choose
from anogan.losses import LossWeights, adversarial_loss, contextual_loss, latent_loss

__all__ = ["Recipe", "RECIPES", "find_recipe", "gan_step", "Trainer", "start_accelerator", "write_atomically", "save_checkpoint", "load_checkpoint"]


@dataclass(frozen=True)
class Recipe:
    "Everything in which one way of training differs from another."
    lr: float = 2e-4  # learning rate of both networks
    betas: tuple = (0.5, 0.999)  # Adam's, of both networks
    weights: LossWeights = LossWeights()  # of the generator's three losses
    latent_in_d: bool = False  # the discriminator descends the latent loss too, and its backward pass reaches the generator
    redraw_below: float = 0.0  # draw the discriminator anew when its loss falls under this
    noise: float = 0.5  # standard deviation of the coarse noise on the generator's input, see `coarse_noise`
    rec_weight: float = 0.9  # weight of the reconstruction error in the score; the latent distance has the rest
    calibrate: bool = True  # put both terms on one scale, by their mean and spread on normal validation images

    @classmethod
    def options(cls) -> tuple:
        "Names that `tuned` takes."
        return (*(f.name for f in fields(cls) if f.name != "weights"), *(f"w_{f.name}" for f in fields(LossWeights)))

    def tuned(self,
              **options,  # new values of single fields; w_adv, w_con and w_lat stand for the loss weights
             ) -> "Recipe":
        "This recipe with some numbers changed."
        weights = {name[2:]: options.pop(name) for name in list(options) if name.startswith("w_")}
        return replace(self, **options, weights=replace(self.weights, **weights))


COLLAPSED = 1e-5  # a discriminator loss this small leaves the generator nothing to learn from

PUBLISHED = Recipe(latent_in_d=True, redraw_below=1e-5, noise=0.0, calibrate=False)
RECIPES = {"recommended": {"anotrans": Recipe(), "gannext": Recipe()},
           "published": {"anotrans": PUBLISHED, "gannext": replace(PUBLISHED, redraw_below=1e-2, rec_weight=0.95)}}


def find_recipe(name: str,  # "recommended" or "published"
                model: str,  # "anotrans" or "gannext"
               ) -> Recipe:
    "The recipe of this name for this model."
    return choose(model, choose(name, RECIPES, "recipe"), "model")


def gan_step(generator,  # (B, C, H, W) to (B, C, H, W)
             discriminator,  # (B, C, H, W) to (logits (B,), features (B, nz))
             opt_g,  # optimizer of the generator
             opt_d,  # optimizer of the discriminator
             x,  # (B, C, H, W) real images in [-1, 1]
             x_in,  # (B, C, H, W) what the generator sees: `x`, or `x` corrupted
             recipe: Recipe,  # weights and options
             accelerator=None,  # Accelerate's handle, where it decides on number format and gradients
            ) -> dict:  # detached scalar losses, still on the device
    "One training step of both networks: one pass of the generator, one of the discriminator on each of real and fake."
    with accelerator.autocast() if accelerator else nullcontext():
        fake = generator(x_in)
        (real_logits, real_features), (fake_logits, fake_features) = discriminator(x), discriminator(fake)

    adv, con, lat = adversarial_loss(fake_logits, real=True), contextual_loss(fake, x), latent_loss(fake_features, real_features)
    d_real, d_fake = adversarial_loss(real_logits, real=True), adversarial_loss(fake_logits, real=False)
    w = recipe.weights
    loss_g = w.adv * adv + w.con * con + w.lat * lat
    loss_d = d_real + d_fake + (lat if recipe.latent_in_d else 0)

    backward = accelerator.backward if accelerator else torch.Tensor.backward
    opt_g.zero_grad()
    opt_d.zero_grad()
    backward(loss_g + (lat if recipe.latent_in_d else 0), inputs=list(generator.parameters()), retain_graph=True)
    backward(loss_d, inputs=list(discriminator.parameters()))
    opt_g.step()
    opt_d.step()
    losses = dict(loss_g=loss_g, adv=adv, con=con, lat=lat, loss_d=loss_d, d_real=d_real, d_fake=d_fake)
    return {name: loss.detach() for name, loss in losses.items()}


def start_accelerator(device: str = "auto",  # "auto" (the best found), "cpu", "cuda" or "mps"
                      precision: str = "auto",  # "fp32", "bf16", or "auto": bf16 on a GPU that has it, else fp32
                     ) -> Accelerator:
    "Accelerate's handle on the device and the number format, after checking that both are there."
    there = {"auto": True, "cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not choose(device, there, "device"): raise InputError(f"device {device!r} is not there on this machine; use cpu, or auto for the best one found")
    choose(precision, ("auto", "fp32", "bf16"), "precision")
    on_gpu = device != "cpu" and there["cuda"]
    bf16 = precision == "bf16" or (precision == "auto" and on_gpu and torch.cuda.is_bf16_supported())
    if "LOCAL_RANK" not in os.environ: AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=device == "cpu", mixed_precision="bf16" if bf16 else "no")


def write_atomically(path,  # file to write
                     content: bytes,  # all of it
                    ):
    "Write the whole file or leave the old one: to a neighbour first, then rename."
    path = Path(path)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)


def save_checkpoint(path,  # file to write, `.safetensors`
                    modules: dict,  # name -> network
                    optimizers: dict,  # name -> optimizer
                    facts: dict,  # JSON-able: epoch, history, what the run is
                   ):
    "Everything a run needs to go on, in one file that is either whole or not there."
    tensors = {f"{name}/{key}": t for name, module in modules.items() for key, t in module.state_dict().items()}
    for name, optimizer in optimizers.items():
        for i, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{name}/{i}/{key}": t for key, t in state.items()}
    tensors = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
    write_atomically(path, save(tensors, metadata={"facts": json.dumps(facts)}))


def load_checkpoint(path,  # file written by `save_checkpoint`
                    modules: dict,  # name -> network, filled in place
                    optimizers: dict,  # name -> optimizer, filled in place
                   ) -> dict:  # the facts saved with it
    "Put a checkpoint back into networks and optimizers."
    try:
        with safe_open(path, "pt") as f:
            facts, tensors = json.loads(f.metadata()["facts"]), {key: f.get_tensor(key) for key in f.keys()}
        for name, module in modules.items():
            module.load_state_dict({key.split("/", 1)[1]: t for key, t in tensors.items() if key.startswith(name + "/")})
        for name, optimizer in optimizers.items():
            states = {}
            for key, t in tensors.items():
                if key.startswith(name + "/"): states.setdefault(int(key.split("/")[1]), {})[key.split("/")[2]] = t
            optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
    except Exception as e:
        raise InputError(f"{path} is not a whole checkpoint of this run ({type(e).__name__}); delete it to start afresh") from e
    return facts


def epoch_seed(seed: int,  # of the run
               epoch: int,  # from 0
              ) -> int:
    "Every epoch starts from a seed of its own, so a run that resumes draws what the whole run would have drawn."
    return seed * 100_003 + epoch


class Trainer:
    "Trains a generator against a discriminator on normal images, epoch by epoch, and can resume after any of them."
    def __init__(self,
                 generator,  # (B, C, H, W) to (B, C, H, W)
                 discriminator,  # (B, C, H, W) to (logits (B,), features (B, nz))
                 recipe: Recipe,  # how to train
                 *,
                 epochs: int = 15,  # passes over the training images
                 batch_size: int = 64,  # images per step, at least 2 (BatchNorm)
                 seed: int = 0,  # of order and noise
                 device: str = "auto",  # see `start_accelerator`
                 precision: str = "auto",  # see `start_accelerator`
                 folder=None,  # where to keep `checkpoint.safetensors` and `log.csv`; None keeps nothing
                 progress: bool = True,  # show a progress bar
                ):
        if batch_size < 2: raise InputError(f"batch size {batch_size} is too small: BatchNorm needs at least 2 images")
        if epochs < 1: raise InputError(f"{epochs} epochs train nothing: use 1 or more")
        self.accelerator = start_accelerator(device, precision)
        self.recipe, self.epochs, self.batch_size, self.seed = recipe, epochs, batch_size, seed
        self.folder, self.progress = Path(folder) if folder else None, progress
        adam = lambda network: torch.optim.Adam(network.parameters(), lr=recipe.lr, betas=recipe.betas)
        generator.to(self.accelerator.device), discriminator.to(self.accelerator.device)
        self.networks = dict(generator=generator, discriminator=discriminator)
        self.optimizers = dict(opt_g=adam(generator), opt_d=adam(discriminator))
        self.history = []

    def fit(self,
            train,  # normal images: a data set, or (N, C, H, W) float in [-1, 1]
            on_epoch=None,  # called with each epoch's log row; training ends early where it returns True
           ) -> list:  # one dict per epoch: losses, seconds, event
        "Train to the last epoch, or from the last checkpoint on; raise `TrainingError` where a loss is no number."
        if self.batch_size > len(train):
            raise InputError(f"batch size {self.batch_size} is larger than the {len(train)} training images; use {len(train)} or less")
        self.resume()
        for network in self.networks.values(): network.train()
        steps = len(train) // self.batch_size
        with torch.random.fork_rng(), tqdm(total=self.epochs * steps, initial=len(self.history) * steps, disable=not self.progress, unit="step") as bar:
            for epoch in range(len(self.history), self.epochs):
                bar.set_description(f"epoch {epoch + 1}/{self.epochs}")
                good = {name: deepcopy(network.state_dict()) for name, network in self.networks.items()}
                row = self.one_epoch(train, epoch, bar)
                if not all(math.isfinite(v) for v in row.values() if isinstance(v, float)): self.diverged(row, good)
                self.history.append(row)
                self.keep()
                bar.set_postfix(con=f"{row['con']:.3f}", loss_d=f"{row['loss_d']:.2f}")
                if on_epoch and on_epoch(row): break
        for network in self.networks.values(): network.eval()
        return self.history

    def one_epoch(self,
                  train,  # normal images: a data set, or (N, C, H, W) float in [-1, 1]
                  epoch: int,  # from 0
                  bar,  # progress bar, moved by one a step
                 ) -> dict:  # the epoch's mean losses, its seconds, and what happened in it
        "Every training image once, in a new order; the last incomplete batch is left out."
        torch.manual_seed(epoch_seed(self.seed, epoch))
        order, start, losses, redrawn = torch.randperm(len(train)), time.perf_counter(), [], 0
        order = order[:len(train) // self.batch_size * self.batch_size]
        for x in iterate(train, self.batch_size, order):
            losses.append(self.step(x.to(self.accelerator.device)))
            if self.recipe.redraw_below and losses[-1]["loss_d"] < self.recipe.redraw_below:
                init_weights(self.networks["discriminator"])
                redrawn += 1
            bar.update()
        row = {name: torch.stack([step[name] for step in losses]).mean().item() for name in losses[0]}
        event = f"discriminator redrawn {redrawn} times" if redrawn else "discriminator collapsed" if row["loss_d"] < COLLAPSED else ""
        return dict(epoch=epoch + 1, **row, seconds=time.perf_counter() - start, event=event)

    def step(self,
             x,  # (B, C, H, W) images in [-1, 1], on the device
            ) -> dict:  # detached losses
        "Corrupt, then one `gan_step` in the chosen number format."
        return gan_step(*self.networks.values(), *self.optimizers.values(), x, coarse_noise(x, self.recipe.noise), self.recipe,
                        self.accelerator)

    def diverged(self,
                 row: dict,  # the epoch's log row
                 good: dict,  # network states from before the epoch
                ):
        "Put the last good state back and say what happened."
        for name, network in self.networks.items(): network.load_state_dict(good[name])
        for network in self.networks.values(): network.eval()
        bad = ", ".join(name for name, v in row.items() if isinstance(v, float) and not math.isfinite(v))
        raise TrainingError(f"training diverged in epoch {row['epoch']}: {bad} is not a number; the state of epoch "
                            f"{row['epoch'] - 1} is kept; try a lower learning rate than {self.recipe.lr}")

    def keep(self):
        "Write the checkpoint and the log of this epoch, each atomically."
        if self.folder is None: return
        save_checkpoint(self.folder / "checkpoint.safetensors", self.networks, self.optimizers, dict(history=self.history))
        table = StringIO()
        writer = DictWriter(table, fieldnames=list(self.history[0]))
        writer.writeheader()
        writer.writerows(self.history)
        write_atomically(self.folder / "log.csv", table.getvalue().encode())

    def resume(self):
        "Go on from the folder's checkpoint, where there is one."
        path = self.folder and self.folder / "checkpoint.safetensors"
        if path and path.exists(): self.history = load_checkpoint(path, self.networks, self.optimizers)["history"]
