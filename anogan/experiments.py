"""One run from data to picture: what `anogan train` does, as a function with a folder of results."""
import json
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch

from anogan.baselines import BASELINES
from anogan.data import load_dataset
from anogan.detector import Detector
from anogan.errors import InputError, choose
from anogan.evaluation import delong_test
from anogan.plots import draw_image, new_figure, roc_curve_plot, score_histogram
from anogan.trainer import start_accelerator, write_atomically

__all__ = ["RunConfig", "prepare", "run", "verdict", "result_figure"]


@dataclass(frozen=True)
class RunConfig:
    "Everything that decides what a run computes; the same config gives the same run."
    dataset: str = "digits"  # one of `anogan.data.DATASETS`
    abnormal_class: str = None  # name or number; None where the data set itself says what is abnormal
    category: str = None  # of mvtec and elpv
    root: str = None  # where the data set lies
    n_train: int = None  # train on so many images only
    model: str = "anotrans"  # one of `anogan.detector.GENERATORS`
    size: str = "tiny"  # tiny, small or paper
    isize: int = 32  # image side, pixels
    channels: int = None  # 1 or 3; None: the data set's own
    epochs: int = 15  # passes over the training images
    batch_size: int = 64  # images per step
    seed: int = 0  # of split, weights, order and noise
    recipe: str = "recommended"  # recommended or published
    options: dict = field(default_factory=dict)  # single numbers of recipe and networks, over recipe and size: lr, w_con, noise, dim, ndf, …
    baselines: tuple = ("knn", "pca")  # scored on the same data, beside the detector
    device: str = "auto"  # auto, cpu, cuda or mps
    precision: str = "auto"  # auto, fp32 or bf16


def prepare(config: RunConfig,  # what to run
            progress: bool = True,  # show a progress bar
           ) -> tuple:  # (AnomalyData, unfitted Detector)
    "Load the data and build the detector: whatever is wrong with a config shows here, before anything is written."
    start_accelerator(config.device, config.precision)
    data = load_dataset(config.dataset, config.abnormal_class, config.root, config.isize, config.seed,
                        channels=config.channels, category=config.category, n_train=config.n_train)
    if config.batch_size > len(data.train):
        raise InputError(f"batch size {config.batch_size} is larger than the {len(data.train)} training images; use {len(data.train)} or less")
    for name in config.baselines: choose(name, BASELINES, "baseline")
    detector = Detector(config.model, config.size, config.isize, channels=data.channels, epochs=config.epochs, batch_size=config.batch_size,
                        seed=config.seed, recipe=config.recipe, device=config.device, precision=config.precision, progress=progress,
                        **config.options)
    return data, detector


def claim(out,  # folder of the run
          config: RunConfig,  # what is to run in it
         ) -> bool:  # True where this very run is finished there
    "Make sure the folder is new, empty, or this run's own; raise one sentence where it holds another run."
    out, known = Path(out), {}
    if not out.exists() or (out.is_dir() and not any(out.iterdir())): return False
    try: known = json.loads((out / "config.json").read_text())
    except (OSError, ValueError): raise InputError(f"{out} holds something that is no run of anogan; choose another folder for --out") from None
    mine = json.loads(json.dumps(asdict(config)))
    other = [name for name in mine if name not in ("device", "precision", "root") and mine[name] != known.get(name)]
    if other:
        raise InputError(f"{out} holds another run ({other[0]} {known.get(other[0])!r}, not {mine[other[0]]!r}); choose another folder for --out")
    return (out / "metrics.json").exists()


def write_json(path,  # file to write
               facts,  # JSON-able
              ):
    "Write facts as a JSON file that is whole or not there."
    write_atomically(path, json.dumps(facts, indent=1).encode())


def run(config: RunConfig,  # what to run
        out,  # folder for the results; resumed where this run was cut short there
        progress: bool = True,  # show a progress bar
        on_epoch=None,  # called with each epoch's log row
       ) -> dict:  # the metrics, as in `metrics.json`
    "Train, score, compare, and leave config, manifest, log, metrics, model and picture in `out`."
    out = Path(out)
    if claim(out, config): return json.loads((out / "metrics.json").read_text())
    data, detector = prepare(config, progress)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", asdict(config))
    write_json(out / "manifest.json", data.manifest())
    detector.fit(data.train, data.val, folder=out, on_epoch=on_epoch)
    detector.save(out / "model")
    scores = detector.score(data.test)
    metrics = measure(config, data, detector, scores)
    result_figure(detector, data.test, scores, verdict(metrics)).savefig(out / "picture.png", dpi=110)
    write_json(out / "metrics.json", metrics)
    (out / "checkpoint.safetensors").unlink(missing_ok=True)
    return metrics


def board(out,  # folder of the run
         ):  # function of an epoch's log row
    "Write the losses of every epoch for TensorBoard, into `out`/tensorboard."
    try: from torch.utils.tensorboard import SummaryWriter
    except ImportError: raise InputError("the display needs TensorBoard: pip install 'anogan[log]', or leave --display out") from None
    writer = None

    def on_epoch(row):
        nonlocal writer
        writer = writer or SummaryWriter(Path(out) / "tensorboard")
        for name, value in row.items():
            if isinstance(value, float): writer.add_scalar(name, value, row["epoch"])
        writer.flush()

    return on_epoch


def measure(config: RunConfig,  # of the run
            data,  # AnomalyData
            detector,  # fitted
            scores,  # (N,) of the test images
           ) -> dict:  # the content of `metrics.json`
    "All numbers of a run: the detector's, the baselines' on the same images, and the comparison with the best of them."
    labels = data.test.labels
    metrics = detector.evaluate(data.test)
    metrics |= dict(dataset=data.name, abnormal_class=data.abnormal_class, model=config.model, seed=config.seed, epochs=len(detector.history),
                    n_train=len(data.train), n_val=len(data.val), seconds=sum(row["seconds"] for row in detector.history),
                    parameters=sum(p.numel() for p in detector.generator.parameters()), baselines={}, versus_best_baseline=None)
    rival_scores = {}
    for name in config.baselines:
        rival = BASELINES[name]().fit(data.train, data.val)
        rival_scores[name] = rival.score(data.test)
        metrics["baselines"][name] = rival.evaluate(data.test)
    if metrics["auroc"] is not None and rival_scores:
        best = max(rival_scores, key=lambda name: metrics["baselines"][name]["auroc"])
        metrics["versus_best_baseline"] = dict(name=best, **asdict(delong_test(scores, rival_scores[best], labels)))
    metrics["environment"] = dict(python=platform.python_version(), torch=version("torch"), machine=platform.machine(),
                                  device=str(next(detector.generator.parameters()).device), threads=torch.get_num_threads())
    return metrics


def verdict(metrics: dict,  # from `run`
           ) -> str:  # one or two lines
    "The result in words, with the baselines beside it; says plainly when the detector loses."
    if metrics["auroc"] is None: return f"{metrics['model']}: no abnormal test images, so no AUROC; false alarms {metrics['false_alarm_rate']:.3f}"
    named = {metrics["model"]: metrics, **metrics["baselines"]}
    line = ", ".join(f"{name} {m['auroc']:.3f} [{m['auroc_ci'][0]:.3f}, {m['auroc_ci'][1]:.3f}]" for name, m in named.items())
    rival = metrics["versus_best_baseline"]
    if not rival: return f"AUROC: {line}"
    outcome = "is level with" if rival["low"] <= 0 <= rival["high"] else "beats" if rival["difference"] > 0 else "loses to"
    return f"AUROC: {line}\n{metrics['model']} {outcome} {rival['name']}: {rival['difference']:+.3f} [{rival['low']:+.3f}, {rival['high']:+.3f}]"


def result_figure(detector,  # fitted
                  test,  # ImageSet with labels
                  scores,  # (N,) of the test images
                  title: str = "",  # above the picture
                  n: int = 5,  # images of each kind
                 ):
    "Inputs, reconstructions and heat maps of normal and abnormal test images, the score histogram and the ROC curve."
    index = [int(i) for label in (0, 1) for i in (test.labels == label).nonzero().flatten()[:n]]
    images = test.subset(index)
    rows = dict(input=images.stack(), rebuilt=detector.reconstruct(images), heat=detector.heatmap(images))
    fig, axes = new_figure(5, 2 * n, width=10, height=7.5)
    for row, (name, pictures) in zip(axes, rows.items()):
        row[0].text(-0.1, 0.5, name, transform=row[0].transAxes, ha="right", va="center")
        for ax in row: ax.axis("off")
        for ax, picture in zip(row, pictures): draw_image(ax, picture)
    for ax, i in zip(axes[0], index): ax.set_title(f"{'abnormal' if test.labels[i] else 'normal'}\n{scores[i]:.2f}", fontsize=8)
    for ax in axes[3:].flat: ax.remove()
    grid = axes[0, 0].get_gridspec()
    score_histogram(fig.add_subplot(grid[3:, :n]), scores, test.labels, detector.threshold)
    if 0 < int(test.labels.sum()) < len(test): roc_curve_plot(fig.add_subplot(grid[3:, n:]), scores, test.labels)
    fig.suptitle(title, fontsize=9)
    return fig
