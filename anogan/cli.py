"""The command line: `anogan train`, `anogan score`, `anogan data`. It holds no logic of its own."""
import json
import sys
from functools import wraps
from pathlib import Path
from typing import Annotated, Optional

import typer

from anogan.errors import AnoganError, TrainingError

__all__ = ["app", "main"]

app = typer.Typer(no_args_is_help=True, add_completion=False, context_settings={"help_option_names": ["-h", "--help"]},
                  help="Find abnormal images with GANs that learnt what normal images look like.")


def in_one_sentence(command,  # a function of the command line
                   ):  # the same, with errors turned into sentences and exit codes
    "Turn every error of this package into its sentence: exit code 2 for bad input, 1 where training could not go on."
    @wraps(command)
    def wrapped(*args, **kwargs):
        try: return command(*args, **kwargs)
        except AnoganError as e:
            print(f"anogan: {e}", file=sys.stderr)
            raise typer.Exit(1 if isinstance(e, TrainingError) else 2)
        except KeyboardInterrupt:
            print("anogan: stopped; the same command goes on from the last whole epoch", file=sys.stderr)
            raise typer.Exit(130)
    return wrapped


@app.command()
@in_one_sentence
def train(
    out: Annotated[Path, typer.Option("--out", "--outf", help="folder for the results; the same command again resumes or says that it is done")],
    dataset: Annotated[str, typer.Option("--dataset", help="data set, see `anogan data`")] = "digits",
    abnormal_class: Annotated[Optional[str], typer.Option("--abnormal-class", "--abnormal_class", help="name or number of the class to find")] = None,
    category: Annotated[Optional[str], typer.Option("--category", help="category of mvtec or elpv")] = None,
    root: Annotated[Optional[str], typer.Option("--root", "--dataroot", help="folder of the data set")] = None,
    n_train: Annotated[Optional[int], typer.Option("--n-train", help="train on so many images only")] = None,
    model: Annotated[str, typer.Option("--model", help="anotrans or gannext")] = "anotrans",
    size: Annotated[str, typer.Option("--size", help="preset of widths and depths: tiny, small or paper")] = "tiny",
    recipe: Annotated[str, typer.Option("--recipe", help="recommended or published")] = "recommended",
    isize: Annotated[int, typer.Option("--isize", help="image side, pixels: 32, 64, 128 or 256")] = 32,
    channels: Annotated[Optional[int], typer.Option("--channels", "--nc", help="1 or 3; default: the data set's own")] = None,
    epochs: Annotated[int, typer.Option("--epochs", "--niter", help="passes over the training images")] = 15,
    batch_size: Annotated[int, typer.Option("--batch-size", "--batchsize", help="images per training step")] = 64,
    seed: Annotated[int, typer.Option("--seed", "--manualseed", help="of split, weights, order and noise")] = 0,
    lr: Annotated[Optional[float], typer.Option("--lr", help="learning rate of both networks")] = None,
    w_adv: Annotated[Optional[float], typer.Option("--w-adv", "--w_adv", help="weight of the adversarial loss")] = None,
    w_con: Annotated[Optional[float], typer.Option("--w-con", "--w_con", help="weight of the contextual loss")] = None,
    w_lat: Annotated[Optional[float], typer.Option("--w-lat", "--w_lat", help="weight of the latent loss")] = None,
    dim: Annotated[Optional[int], typer.Option("--dim", help="width of the generator's first stage")] = None,
    patch_size: Annotated[Optional[int], typer.Option("--patch-size", "--patchsize", help="side of AnoTrans's patches, pixels")] = None,
    ndf: Annotated[Optional[int], typer.Option("--ndf", help="width of the discriminator's first layer")] = None,
    nz: Annotated[Optional[int], typer.Option("--nz", help="length of the discriminator's feature")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps")] = "auto",
    precision: Annotated[str, typer.Option("--precision", help="auto, fp32 or bf16")] = "auto",
    display: Annotated[bool, typer.Option("--display", help="write TensorBoard logs into the folder (pip install 'anogan[log]')")] = False,
):
    "Train a detector on normal images, test it, compare it with simple baselines."
    from anogan.experiments import RunConfig, board, verdict
    from anogan.experiments import run as run_experiment
    single = dict(lr=lr, w_adv=w_adv, w_con=w_con, w_lat=w_lat, dim=dim, patch_size=patch_size, ndf=ndf, nz=nz)
    config = RunConfig(dataset=dataset, abnormal_class=abnormal_class, category=category, root=root, n_train=n_train, model=model, size=size,
                       isize=isize, channels=channels, epochs=epochs, batch_size=batch_size, seed=seed, recipe=recipe, device=device,
                       precision=precision, options={name: value for name, value in single.items() if value is not None})
    done = (out / "metrics.json").exists()
    metrics = run_experiment(config, out, on_epoch=board(out) if display else None)
    print(f"{out} was finished already" if done else f"results in {out}")
    print(verdict(metrics))


@app.command()
@in_one_sentence
def score(
    run: Annotated[Path, typer.Argument(help="folder that `anogan train` or `Detector.save` wrote")],
    images: Annotated[list[Path], typer.Argument(help="image files, or folders of them")],
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps")] = "auto",
):
    "Score images: one JSON line each, with path, score and abnormal (true above the threshold)."
    from anogan.data import load_images
    from anogan.detector import Detector
    detector = Detector.load(run, device)
    files = load_images(images, detector.isize, detector.channels)
    for path, value in zip(files.ids, detector.score(files).tolist()):
        print(json.dumps(dict(path=path, score=value, abnormal=value > detector.threshold), ensure_ascii=False))


@app.command()
@in_one_sentence
def data(
    root: Annotated[Optional[str], typer.Option("--root", "--dataroot", help="folder of the data sets")] = None,
):
    "List the data sets, and whether each is at hand."
    from anogan.data import available
    for row in available(root):
        print(f"{row['name']:14} {'at hand' if row['at_hand'] else 'missing':8} {row['where']}")


def main():
    "Entry point of the command `anogan`."
    app()
