"""What most users import: a detector that fits, scores, draws heat maps, saves and loads."""
import json
from dataclasses import asdict
from hashlib import sha256
from inspect import signature
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from anogan.anotrans import AnoTrans
from anogan.data import ImageSet, iterate, labels_of
from anogan.discriminator import Discriminator, init_weights
from anogan.errors import InputError, choose
from anogan.evaluation import BaseDetector
from anogan.gannext import GanNeXt
from anogan.losses import LossWeights
from anogan.memory import Memory
from anogan.scoring import Calibration, error_map, join_terms, score_terms, smooth
from anogan.trainer import Recipe, Trainer, find_recipe, start_accelerator, write_atomically

__all__ = ["GENERATORS", "Detector"]

GENERATORS = {"anotrans": AnoTrans, "gannext": GanNeXt}
SCORE_BATCH = 256  # images per batch when scoring; the scores do not depend on it
FORMAT = 1  # of saved detectors; a higher number when older versions cannot read them
MEMORY_SIZE = 10_000  # training images whose features are kept for the score
HEAT_SIGMA = 1 / 32  # blur of a heat map, as a share of the image's side


def option_names(part: type,  # a network class
                ) -> list:  # names of its constructor's options, without the image's own
    "What can be chosen about a network."
    return [name for name in signature(part.__init__).parameters if name not in ("self", "isize", "channels")]


class Detector(BaseDetector):
    """A generator and a discriminator that learn normal images and score new ones.

    `score` is independent of batch size and order; `threshold` comes from normal validation images alone.
    """
    def __init__(self,
                 model: str = "anotrans",  # generator, one of `GENERATORS`
                 size: str = "tiny",  # preset of widths and depths: tiny, small or paper
                 isize: int = 32,  # image side, pixels: 32, 64, 128 or 256
                 *,
                 channels: int = None,  # 1 or 3; taken from the training images where not given
                 epochs: int = 15,  # passes over the training images
                 batch_size: int = 64,  # images per training step
                 seed: int = 0,  # of weights, order and noise
                 recipe="recommended",  # "recommended", "published", or a `Recipe`
                 false_alarms: float = 0.05,  # share of normal images the threshold may call abnormal
                 device: str = "auto",  # "auto", "cpu", "cuda" or "mps"
                 precision: str = "auto",  # of training: "fp32", "bf16", or "auto": bf16 on a GPU that has it
                 progress: bool = True,  # show a progress bar
                 **options,  # single numbers over recipe and preset: lr, w_con, noise, dim, patch_size, depths, ndf, nz, …
                ):
        generator = choose(model, GENERATORS, "model")
        preset = {**choose(size, generator.sizes, "size"), **Discriminator.sizes[size]}
        legal = [*Recipe.options(), *option_names(generator), *option_names(Discriminator)]
        for name in options: choose(name, legal, "option")
        self.network = preset | {name: options.pop(name) for name in list(options) if name not in Recipe.options()}
        self.model, self.size, self.isize, self.channels = model, size, isize, channels
        self.epochs, self.batch_size, self.seed, self.false_alarms = epochs, batch_size, seed, false_alarms
        self.recipe = (recipe if isinstance(recipe, Recipe) else find_recipe(recipe, model)).tuned(**options)
        self.device, self.precision, self.progress = device, precision, progress
        self.calibration = self.heat_scale = self.generator = self.memory = None
        self.history = []
        if channels: self.build()

    def build(self) -> "Detector":
        "Draw both networks from the seed."
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            self.discriminator, self.generator = map(self.network_of, (Discriminator, GENERATORS[self.model]))
        return self

    def network_of(self,
                   part: type,  # a network class
                  ) -> torch.nn.Module:  # in eval mode
        "One network, with those of the options that it knows."
        options = {name: value for name, value in self.network.items() if name in option_names(part)}
        network = part(self.isize, self.channels, **options)
        return (init_weights(network) if part is Discriminator or self.recipe.dcgan_init else network).eval()

    def fit(self,
            train,  # normal images: a data set, or (N, C, H, W) float in [-1, 1]
            val,  # normal images that training does not see, for calibration and threshold
            folder=None,  # keep checkpoint and log there after every epoch, and resume from them
            on_epoch=None,  # called with each epoch's log row; training ends early where it returns True
           ) -> "Detector":
        "Train both networks on normal images, then calibrate score, heat map and threshold on the validation images."
        for name, images in dict(training=train, validation=val).items():
            abnormal = 0 if isinstance(images, torch.Tensor) else int(labels_of(images).sum())
            if abnormal: raise InputError(f"the {name} set holds {abnormal} images labelled abnormal: train and validate on normal images only")
        if self.generator is None:
            self.channels = next(iterate(train, 1)).shape[1]
            self.build()
        for images in (train, val): self.check(next(iterate(images, 1)))
        trainer = Trainer(self.generator, self.discriminator, self.recipe, epochs=self.epochs, batch_size=self.batch_size, seed=self.seed,
                          device=self.device, precision=self.precision, folder=folder, progress=self.progress)
        train = self.at_hand(train)
        self.history = trainer.fit(train, on_epoch)
        return self.remember(train).calibrate(val)

    def remember(self,
                 train,  # normal training images
                ) -> "Detector":
        "Keep the features of the training images, at most `MEMORY_SIZE` of them, where the score asks for their neighbourhood."
        if not any(name.startswith("near") for name in self.recipe.score): return self
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(self.seed))[:MEMORY_SIZE]
        self.memory = Memory.fit(self.discriminator, self.batches(train, order))
        return self

    def calibrate(self,
                  val,  # normal images that training did not see
                 ) -> "Detector":
        "Fix the scales of score and heat map and the threshold; nothing else of a data set enters them."
        self.calibration = Calibration.fit(self.terms(val)) if self.recipe.calibrate else None
        self.heat_scale = 1.0
        self.heat_scale = float(torch.quantile(self.heatmap(val).amax(dim=(1, 2)), 1 - self.false_alarms)) or 1.0
        return self.set_threshold(val, self.false_alarms)

    def batches(self,
                images,  # a data set, or (N, C, H, W) float in [-1, 1]
                order=None,  # indices in the order wanted; None: as they are
               ):  # yields (B, C, H, W) float
        "Batches on the networks' device, checked."
        if self.generator is None: raise InputError("this detector has no networks yet: call fit, or Detector.load")
        device = next(self.generator.parameters()).device
        for x in iterate(images, SCORE_BATCH, order): yield self.check(x).to(device)

    def check(self,
              x: torch.Tensor,  # (B, C, H, W)
             ) -> torch.Tensor:  # the same
        "Images of another shape than the networks' are one sentence."
        if x.shape[1:] != (self.channels, self.isize, self.isize):
            raise InputError(f"this detector takes images of {self.channels}×{self.isize}×{self.isize} (channels, height, width), "
                             f"not {'×'.join(map(str, x.shape[1:]))}; load them with isize={self.isize}, channels={self.channels}")
        return x

    def at_hand(self,
                images,  # a data set, or (N, C, H, W) float in [-1, 1]
               ):  # the same images
        "An in-memory data set, moved to the networks' device once."
        return images.to(start_accelerator(self.device, self.precision).device) if isinstance(images, ImageSet) else images

    def terms(self,
              images,  # a data set, or (N, C, H, W) float in [-1, 1]
             ) -> dict:  # rec and lat, (N,) float tensors
        "The two raw terms of the score."
        batches = [score_terms(self.generator, self.discriminator, x, self.memory) for x in self.batches(images)]
        return {name: torch.cat([b[name] for b in batches]).float().cpu() for name in batches[0]}

    def score(self,
              images,  # a data set, or (N, C, H, W) float in [-1, 1]
             ) -> torch.Tensor:  # (N,) float32, higher = more abnormal
        "Anomaly score of each image."
        terms = self.terms(images)
        return join_terms(self.calibration(terms) if self.calibration else terms, self.recipe.score)

    @torch.no_grad()
    def reconstruct(self,
                    images,  # a data set, or (N, C, H, W) float in [-1, 1]
                   ) -> torch.Tensor:  # (N, C, H, W), on the CPU
        "What the generator makes of each image."
        return torch.cat([self.generator(x).cpu() for x in self.batches(images)])

    @torch.no_grad()
    def heatmap(self,
                images,  # a data set, or (N, C, H, W) float in [-1, 1]
               ) -> torch.Tensor:  # (N, H, W) ≥ 0; above 1: hotter than the hottest spot of nearly every normal image
        "Where each image is abnormal: its smoothed squared error, on a scale fixed by normal validation images."
        maps = [smooth(error_map(x, self.generator(x)), HEAT_SIGMA * self.isize) for x in self.batches(images)]
        return torch.cat(maps).cpu() / self.heat_scale

    def config(self) -> dict:  # JSON-able
        "What it takes to build this detector again."
        names = ("model", "size", "isize", "channels", "epochs", "batch_size", "seed", "false_alarms")
        return {**{name: getattr(self, name) for name in names}, "recipe": asdict(self.recipe), "network": self.network}

    def save(self,
             path,  # folder to write `model.safetensors` and `detector.json` into; made where it is missing
            ) -> Path:  # the folder
        "Write the detector: weights and facts, no code. Each file is whole or not there."
        if self.threshold is None: raise InputError("this detector is not fitted yet: call fit before save")
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        tensors = {f"{part}/{key}": t.cpu().contiguous() for part in ("generator", "discriminator")
                   for key, t in getattr(self, part).state_dict().items()}
        if self.memory: tensors["memory/features"] = self.memory.features.cpu().contiguous()
        weights = save(tensors)
        facts = dict(format=FORMAT, config=self.config(), threshold=self.threshold, heat_scale=self.heat_scale,
                     calibration=asdict(self.calibration) if self.calibration else None, sha256=sha256(weights).hexdigest())
        write_atomically(path / "model.safetensors", weights)
        write_atomically(path / "detector.json", json.dumps(facts, indent=1).encode())
        return path

    @classmethod
    def load(cls,
             path,  # folder written by `save`, or a run's folder with `model/` in it
             device: str = "auto",  # "auto", "cpu", "cuda" or "mps"
            ) -> "Detector":
        "Read a detector; nothing in the files is executed."
        path = Path(path)
        path = path if (path / "detector.json").is_file() else path / "model"
        try:
            facts, weights = json.loads((path / "detector.json").read_bytes()), (path / "model.safetensors").read_bytes()
        except FileNotFoundError as e:
            raise InputError(f"{path.parent if path.name == 'model' else path} holds no detector ({Path(e.filename).name} is missing); "
                             "name a folder that `save` or `anogan train` wrote") from None
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise InputError(f"{path / 'detector.json'} is not JSON; it is damaged, save the detector again") from None
        if not isinstance(facts, dict) or facts.get("format") != FORMAT:
            raise InputError(f"{path / 'detector.json'} is not a detector of format {FORMAT}; save it again with this version of anogan")
        if sha256(weights).hexdigest() != facts.get("sha256"):
            raise InputError(f"{path / 'model.safetensors'} is not the file that was saved with {path / 'detector.json'}; save the detector again")
        try: return cls.restore(facts, load(weights), device)
        except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as e:
            raise InputError(f"{path / 'detector.json'} does not fit the weights beside it ({type(e).__name__}); save the detector again") from e

    @classmethod
    def restore(cls,
                facts: dict,  # what `detector.json` holds
                tensors: dict,  # what `model.safetensors` holds
                device: str,  # "auto", "cpu", "cuda" or "mps"
               ) -> "Detector":
        "Build the detector that `facts` and `tensors` describe."
        config = dict(facts["config"])
        recipe, network = config.pop("recipe"), config.pop("network")
        recipe = Recipe(**{**recipe, "betas": tuple(recipe["betas"]), "weights": LossWeights(**recipe["weights"])})
        detector = cls(**config, **network, recipe=recipe, device=device)
        for part in ("generator", "discriminator"):
            getattr(detector, part).load_state_dict({key.split("/", 1)[1]: t for key, t in tensors.items() if key.startswith(part + "/")})
            getattr(detector, part).to(start_accelerator(device).device)
        if "memory/features" in tensors:
            detector.memory = Memory(tensors["memory/features"].to(start_accelerator(device).device))
        detector.threshold, detector.heat_scale = facts["threshold"], facts["heat_scale"]
        detector.calibration = Calibration(**facts["calibration"]) if facts["calibration"] else None
        return detector
