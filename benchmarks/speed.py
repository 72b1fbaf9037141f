"""How fast are training and scoring, beside a loop of the kind that was released with the papers? All take turns in one run.

    python benchmarks/speed.py                   # two CPU cores: 8 minutes with bf16, 18 without; benchmarks/results/speed-cpu.json and .png
    python benchmarks/speed.py --device cuda     # on a GPU: more cells, speed-cuda.json and .png
    python benchmarks/speed.py --table           # print what is there, and stop

The *released-style* loop is written from what is known of the published programs: images one by one through PIL transforms, without workers;
float32; three passes of the discriminator a step; both backward passes through the whole graph, the latent loss in both; an answer from the
device after every step. Its networks are those of this package, but for the convolutions of GanNeXt that the package computes as products: here PyTorch
computes them, as released. The images are random bytes.
"""
import argparse
import ctypes
import gc
import json
import os
import platform
import sys
import time
from collections import Counter
from contextlib import ExitStack
from itertools import chain, repeat
from math import log, prod
from pathlib import Path
from statistics import linear_regression, median
from types import MethodType
from unittest.mock import patch

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from anogan.convnext import DepthwiseConv, PatchConv, Upsample
from anogan.data import ImageSet, iterate
from anogan.detector import GENERATORS, MEMORY_SIZE
from anogan.discriminator import Discriminator, init_weights
from anogan.memory import Memory
from anogan.plots import new_figure
from anogan.scoring import latent_distance, reconstruction_error, score_terms
from anogan.trainer import PUBLISHED, Recipe, Trainer, draw_projection, has_bf16, write_atomically

RESULTS = Path(__file__).parent / "results"
FORMULAS = PUBLISHED.tuned(latent_in_d=False, third_pass=False, sigmoid_first=False, redraw_below=0.0)
RECIPES = {"same arithmetic": PUBLISHED, "the papers' formulas": FORMULAS, "recommended": Recipe()}
SCORES = {"same score": ("rec", "lat"), "near_image": ("near_image",), "near_map": ("near_map",)}
OLD = "released-style"


# ---------------------------------------------------------------- the released-style loop

class PilImages(torch.utils.data.Dataset):
    "Bytes in memory, each image made a picture and then a tensor by itself."
    def __init__(self, pixels):
        side = pixels.shape[-1]
        self.arrays = pixels.permute(0, 2, 3, 1).contiguous().numpy()
        steps = torchvision.transforms.Resize(side), torchvision.transforms.ToTensor(), torchvision.transforms.Normalize((0.5,) * 3, (0.5,) * 3)
        self.transform = torchvision.transforms.Compose(steps)

    def __len__(self): return len(self.arrays)
    def __getitem__(self, i): return self.transform(Image.fromarray(self.arrays[i])), 0


def released_step(generator, discriminator, opt_g, opt_d, x):
    "One training step as the published programs take it; the discriminator's loss."
    fake = generator(x)
    (real_logits, real_features), (fake_logits, fake_features) = discriminator(x), discriminator(fake)
    real_prediction, fake_prediction = real_logits.sigmoid(), fake_logits.sigmoid()
    ones, zeros = torch.ones_like(real_prediction), torch.zeros_like(real_prediction)
    latent = F.mse_loss(fake_features, real_features)
    opt_g.zero_grad()
    (F.binary_cross_entropy(fake_prediction, ones) + 50 * F.l1_loss(fake, x) + latent).backward(retain_graph=True)
    opt_d.zero_grad()
    judged = discriminator(fake.detach())[0].sigmoid()
    loss_d = F.binary_cross_entropy(real_prediction, ones) + F.binary_cross_entropy(judged, zeros) + latent
    loss_d.backward()
    opt_g.step(), opt_d.step()
    return loss_d


def released_epoch(networks, optimizers, loader, device):
    "All batches of the loader once."
    for x, _ in loader:
        if released_step(*networks, *optimizers, x.to(device)).item() < PUBLISHED.redraw_below: init_weights(networks[1])


@torch.no_grad()
def released_scores(networks, loader, device):
    "The two terms of the score, in training mode, as released."
    for x, _ in loader:
        x = x.to(device)
        fake = networks[0](x)
        reconstruction_error(x, fake).cpu(), latent_distance(networks[1](x)[1], networks[1](fake)[1]).cpu()


# ---------------------------------------------------------------- what is compared: each a function without arguments

def build(cell):
    "Both networks, always from the same seed."
    torch.manual_seed(0)
    generator = GENERATORS[cell["model"]]
    return generator(cell["isize"], 3, **generator.sizes[cell["size"]]), init_weights(Discriminator(cell["isize"], 3, **Discriminator.sizes[cell["size"]]))


def build_released(cell, device):
    "The same, in training mode; what this package computes as products is computed as PyTorch's convolutions, as released."
    networks = [network.to(device).train() for network in build(cell)]
    for layer in networks[0].modules():
        for own, usual in ((Upsample, torch.nn.ConvTranspose2d), (PatchConv, torch.nn.Conv2d), (DepthwiseConv, torch.nn.Conv2d)):
            if isinstance(layer, own): layer.forward = MethodType(usual.forward, layer)
    return networks


def random_images(cell):
    return ImageSet(torch.randint(0, 256, (cell["images"], 3, cell["isize"], cell["isize"]), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))


def loader_of(images, batch, shuffle):
    return torch.utils.data.DataLoader(PilImages(images.pixels), batch_size=batch, shuffle=shuffle, drop_last=shuffle)


def old_training(cell, device):
    networks = build_released(cell, device)
    optimizers = [torch.optim.Adam(network.parameters(), PUBLISHED.lr, PUBLISHED.betas) for network in networks]
    loader = loader_of(random_images(cell), cell["batch"], shuffle=True)
    return networks, lambda: released_epoch(networks, optimizers, loader, device)


def our_training(cell, device, recipe, recorded=True):
    "On a GPU the first round takes plain steps, whose FLOPs can be counted, and the later ones recorded steps."
    trainer = Trainer(*build(cell), recipe, batch_size=cell["batch"], device=device, progress=False)
    for network in trainer.networks.values(): network.train()
    images = random_images(cell).to(device)

    def work():
        trainer.one_epoch(images, 0, tqdm(disable=True))
        if recorded and trainer.take == trainer.plain_step: trainer.record()
    return trainer.networks.values(), work


def old_scoring(cell, device):
    networks = build_released(cell, device)
    loader = loader_of(random_images(cell), cell["batch"], shuffle=False)
    return networks, lambda: released_scores(networks, loader, device)


def our_scoring(cell, device, terms):
    networks = [network.to(device, memory_format=torch.channels_last).eval() for network in build(cell)]
    images, remembered = random_images(cell).to(device), None
    if terms != SCORES["same score"]:
        head = draw_projection(networks[1], seed=0).to(device)
        seen = Memory.fit(networks[1], [torch.zeros(1, 3, cell["isize"], cell["isize"], device=device)], terms, head).features
        remembered = Memory({term: torch.randn(MEMORY_SIZE, *t.shape[1:], device=device, dtype=t.dtype) for term, t in seen.items()}, projection=head)

    def work():
        for x in iterate(images, cell["batch"]):
            for t in score_terms(*networks, x, remembered, terms).values(): t.cpu()
    return networks, work


def run_through(batches):
    "Each batch once, and then let go, as training does."
    for _ in batches: pass


def old_data(cell, device):
    loader = loader_of(random_images(cell), cell["batch"], shuffle=True)
    return [], lambda: run_through(x.to(device) for x, _ in loader)


def our_data(cell, device):
    images = random_images(cell).to(device)
    return [], lambda: run_through(iterate(images, cell["batch"], torch.randperm(cell["images"])))


def contenders(cell, device):
    "name -> a function that builds (networks, the work to be timed)."
    if cell["task"] == "data": return {OLD: lambda: old_data(cell, device), "in memory": lambda: our_data(cell, device)}
    if cell["task"] == "score": return {OLD: lambda: old_scoring(cell, device)} | {
        name: lambda terms=terms: our_scoring(cell, device, terms) for name, terms in SCORES.items()}
    ways = {name: lambda recipe=recipe: our_training(cell, device, recipe) for name, recipe in RECIPES.items() if name in cell["ways"]}
    if "not recorded" in cell["ways"]: ways["recommended, not recorded"] = lambda: our_training(cell, device, Recipe(), recorded=False)
    return {OLD: lambda: old_training(cell, device)} | ways


# ---------------------------------------------------------------- measuring

def now(device):
    "Seconds, once the device has done all it was told."
    if device == "cuda": torch.cuda.synchronize()
    return time.perf_counter()


def convolution_backward(grad, x, weight, bias, stride, padding, dilation, transposed, out_padding, groups, mask, out_shape=None):
    "FLOPs of a convolution's two gradients; PyTorch's own count is wrong where there are groups (chapter 11)."
    batch, _, *places = x if transposed else grad
    return 2 * batch * prod(places) * prod(weight) * sum(mask[:2])


def in_use(device, field="VmRSS"):
    "Bytes of memory that are in use (VmRSS) or were at most (VmHWM): on the GPU, or by the process; None where it cannot be seen."
    if device == "cuda": return torch.cuda.memory_allocated() if field == "VmRSS" else torch.cuda.max_memory_allocated()
    if sys.platform != "linux": return None
    return 1024 * int(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)))


def most_memory(work, device):
    "The most memory that `work` uses on top of what was in use before, bytes. It is no round to be timed: memory given back has to be asked for again."
    gc.collect()
    if device == "cuda": torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    before = in_use(device)
    work()
    return before and in_use(device, "VmHWM") - before


def seconds_of(work, device):
    start = now(device)
    work()
    return now(device) - start


def measure(cell, device, repeats):
    "The cell with, for each contender, its seconds in each round, FLOPs and memory. The first rounds warm up and count FLOPs, the last sees memory."
    ways = {name: make()[1] for name, make in contenders(cell, device).items()}
    found = {}
    for name, work in ways.items():
        with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: convolution_backward}) as counter: work()
        found[name] = dict(flops=counter.get_total_flops(), seconds=[])
        if device == "cuda": found[name]["bytes"] = most_memory(work, device)  # in the round that records the step
    for _ in range(repeats):
        for name, work in ways.items(): found[name]["seconds"].append(seconds_of(work, device))
    if device == "cpu":
        for name, work in ways.items(): found[name]["bytes"] = most_memory(work, device)
    if cell["task"] == "data":
        for found_way in found.values(): del found_way["flops"]
    return cell | dict(ways=found)


def product_limit(device, dtype, side):
    "FLOP/s of a plain product of two square matrices: the most that this machine can be expected to reach."
    a, b, seconds = (*torch.randn(2, side, side, device=device, dtype=dtype), [])
    for _ in range(6):
        start = now(device)
        a @ b
        seconds.append(now(device) - start)
    return 2 * side**3 / median(seconds[1:])


def profile(cell, device, repeats):
    "Where the seconds of one step go, released-style and recommended: medians over some steps."
    found = {}
    for name, make in ((OLD, lambda: old_training(cell, device)), ("recommended", lambda: our_training(cell, device, Recipe(), recorded=False))):
        (generator, discriminator, *_), work = make()
        work()
        found[name] = [profile_once(generator, discriminator, work, device) for _ in range(repeats)]
    return cell | dict(parts={name: {part: median(run[part] for run in runs) for part in runs[0]} for name, runs in found.items()})


def profile_once(generator, discriminator, work, device):
    "part of the step -> seconds."
    spent = Counter()

    def timed(function, part):
        def wrapper(*args, **options):
            start = now(device)
            result = function(*args, **options)
            spent[part() if callable(part) else part] += now(device) - start
            return result
        return wrapper

    losses = chain(["backward of G's loss"], repeat("backward of D's losses"))
    with ExitStack() as stack:
        for owner, name, part in ((generator, "forward", "G forward"), (discriminator, "forward", "D forward"), (torch.optim.Adam, "step", "Adam"),
                                  (torch.Tensor, "backward", lambda: next(losses))):
            stack.enter_context(patch.object(owner, name, timed(getattr(owner, name), part)))
        start = now(device)
        work()
        whole = now(device) - start
    return {**spent, "images, losses and the rest": whole - sum(spent.values()), "whole step": whole}


# ---------------------------------------------------------------- which cells

def plan(device, size):
    "Cells to measure, and the cell to profile; on a CPU with bf16 no more than 10 minutes' worth at paper size."
    models, gpu = ("anotrans", "gannext"), device == "cuda"

    def cell(task, model, isize, batch, steps=4 if gpu else 1, size=size, ways=("recommended",)):
        return dict(task=task, model=model, size=size, isize=isize, batch=batch, images=batch * steps, ways=[*ways])

    every = [*RECIPES, "not recorded"] if gpu else [*RECIPES]
    cells = [cell("data", "", 32, 128, 20)]
    for model in models:
        cells += [cell("train", model, 32, batch, steps, ways=every) for batch, steps in (((128, 10), (1024, 4)) if gpu else ((128, 2),))]
        cells += [cell("score", model, 32, 1, 8), cell("score", model, 32, 128), cell("score", model, 32, 1024, 2 if gpu else 1)]
    for model in models:  # how the time grows: last, so that a run that is cut has the rest
        cells += [cell("train", model, isize, 32 if gpu else 2) for isize in (32, 64, 128, 256)]
        if gpu: continue
        cells += [cell("train", model, 32, batch) for batch in (16, 64)]
        cells += [cell("train", model, 32, 64, size=width) for width in ("tiny", "small") if width != size]
    return cells, [cell("train", model, 32, 128 if gpu else 32, 1) for model in models]


def smallest():
    "One cell of each kind at the smallest size, to see that all of it runs."
    def cell(task, ways=()): return dict(task=task, model="gannext", size="tiny", isize=32, batch=2, images=4, ways=[*ways])
    return [cell("data"), cell("train", RECIPES), cell("score")], [cell("train") | dict(images=2)]


# ---------------------------------------------------------------- telling

def ratio(cell, name):
    "How many times faster than the released-style loop: (median, lowest, highest) over the rounds."
    rounds = [old / new for old, new in zip(cell["ways"][OLD]["seconds"], cell["ways"][name]["seconds"])]
    return median(rounds), min(rounds), max(rounds)


def figures(value):
    "Three figures that count, in full: 341,000, not 3.41e+05."
    return f"{float(f'{value:.3g}'):,}".removesuffix(".0")


def line(cell, name, limits):
    "One row of the table."
    way = cell["ways"][name]
    seconds = way["seconds"]
    rate, reach = way.get("flops", 0) / median(seconds), limits["bf16" if name != OLD and cell["task"] == "train" and "bf16" in limits else "fp32"]
    times = "{:.2f}× ({:.2f} to {:.2f})".format(*ratio(cell, name))
    speed = " to ".join(figures(cell["images"] / s) for s in (max(seconds), min(seconds)))
    memory = f"{way['bytes'] / 2**20:.0f}" if way["bytes"] else ""
    what = dict(data="data path", train="training", score="scoring")[cell["task"]]
    return [what, cell["model"], cell["size"], cell["isize"], cell["batch"], name, f"{figures(cell['images'] / median(seconds))} ({speed})",
            "1" if name == OLD else times, memory, f"{rate / 1e9:.0f}" if rate else "", f"{rate / reach:.0%}" if rate else ""]


def markdown(head, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *rows])


def table(facts):
    "Markdown: every cell, every contender."
    head = ["what", "generator", "size", "side", "batch", "way", "images/s (range)", "times released-style (range)", "MiB more", "GFLOP/s", "of the limit"]
    return markdown(head, [line(cell, name, facts["limits"]) for cell in facts["cells"] for name in cell["ways"]])


def short_table(facts):
    "Markdown for README.md: how many times faster than the released-style loop, at the papers' sizes."
    rows = []
    for cell in facts["cells"]:
        if cell["task"] == "train" and len(cell["ways"]) < 3: continue  # measured for the exponents
        for name in cell["ways"]:
            if name == OLD: continue
            what, model, _, side, batch, way, speed, times, memory, *_ = line(cell, name, facts["limits"])
            rows.append([what, model, f"{side}×{side}", batch, way, speed.split(" ")[0], times])
    return markdown(["what", "generator", "side", "batch", "way", "images/s", "times released-style (range)"], rows)


def exponents(facts):
    "[(generator, against what, way, exponent, points)]: the slope of log seconds over log of what grows, by least squares."
    found = []
    single = [cell for cell in facts["cells"] if cell["task"] == "train"]
    for model in dict.fromkeys(cell["model"] for cell in single):
        own = [cell for cell in single if cell["model"] == model]
        full = own[0]["size"]
        smallest_batch = min(cell["batch"] for cell in own)
        groups = {"pixels of an image": [(cell["isize"]**2, cell) for cell in own if cell["batch"] == smallest_batch and cell["size"] == full],
                  "images of a step": [(cell["batch"], cell) for cell in own if cell["isize"] == 32 and cell["size"] == full],
                  "width": [(GENERATORS[model].sizes[cell["size"]]["dim"], cell) for cell in own if cell["isize"] == 32 and cell["batch"] == 64]}
        for what, points in groups.items():
            if len({n for n, _ in points}) < 3: continue
            for name in (OLD, "recommended"):
                slope = linear_regression([log(n) for n, _ in points], [log(median(cell["ways"][name]["seconds"]) / (cell["images"] / cell["batch"]))
                                                                        for _, cell in points]).slope
                found.append((model, what, name, slope, len(points)))
    return found


def exponent_table(facts):
    rows = [[model, what, name, f"{slope:.2f}", points] for model, what, name, slope, points in exponents(facts)]
    return markdown(["generator", "time of a step against", "way", "exponent", "points"], rows)


def profile_table(facts):
    "Markdown: milliseconds of each part of one step, before and after."
    rows = [[cell["model"], cell["batch"], part, *(f"{1000 * cell['parts'][name][part]:.0f}" for name in cell["parts"])]
            for cell in facts["profiles"] for part in cell["parts"][OLD]]
    return markdown(["generator", "batch", "part of a step", f"{OLD}, ms", "recommended, ms"], rows)


def report(facts):
    limits = ", ".join(f"{name} {rate / 1e9:,.0f} GFLOP/s" for name, rate in facts["limits"].items())
    head = f"{facts['machine']}, {facts['threads']} threads, torch {facts['torch']}; measured limit of a matrix product: {limits}"
    return "\n\n".join([head, table(facts), exponent_table(facts), profile_table(facts)])


def draw(facts, path):
    "Seconds per image against pixels, and images per second at batch 128."
    fig, (left, right) = new_figure(1, 2, width=9.0, height=3.4)
    cells = [cell for cell in facts["cells"] if cell["task"] == "train"]
    batch = min(cell["batch"] for cell in cells)
    for model, style in (("anotrans", "o"), ("gannext", "s")):
        points = sorted((cell for cell in cells if cell["model"] == model and cell["batch"] == batch), key=lambda cell: cell["isize"])
        for name, dash in ((OLD, ":"), ("recommended", "-")):
            left.plot([c["isize"]**2 for c in points], [1000 * median(c["ways"][name]["seconds"]) / c["images"] for c in points],
                      style + dash, label=f"{model}, {name}")
    left.set(xscale="log", yscale="log", xlabel="pixels of an image", ylabel="ms per image", title=f"training, {batch} images a step")
    left.legend(fontsize=7)
    bars = [(f"{'train' if c['task'] == 'train' else 'score'} {c['model']}\n{name}", ratio(c, name)) for c in facts["cells"]
            if c["batch"] == 128 and c["task"] != "data" for name in c["ways"] if name != OLD]
    middle = [r[0] for _, r in bars]
    spread = [[r[0] - r[1] for _, r in bars], [r[2] - r[0] for _, r in bars]]
    right.barh(range(len(bars)), middle, xerr=spread, color="#56B4E9", ecolor="black")
    right.set_yticks(range(len(bars)), [label.replace("\n", ", ") for label, _ in bars], fontsize=7)
    right.axvline(1, color="black", lw=0.8)
    right.invert_yaxis()
    right.set(xlabel="times released-style", title="batch 128, 32×32")
    fig.savefig(path, dpi=110)


def machine(device):
    "What was measured on."
    if device == "cuda": return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--size", default="paper", choices=["tiny", "small", "paper"])
    parser.add_argument("--repeats", type=int, default=3, help="rounds after the first, which warms up")
    parser.add_argument("--smallest", action="store_true", help="one small cell of each kind, to see that it runs")
    parser.add_argument("--out", type=Path, help="JSON file; the plot goes beside it")
    parser.add_argument("--table", action="store_true", help="print what is there as Markdown and stop")
    args = parser.parse_args()
    out = args.out or RESULTS / f"speed-{args.device}.json"
    if args.table: return print(report(json.loads(out.read_text())))
    side, start = (256 if args.smallest else 8192 if args.device == "cuda" else 2048), time.perf_counter()
    limits = dict(fp32=product_limit(args.device, torch.float32, side))
    if has_bf16(args.device): limits["bf16"] = product_limit(args.device, torch.bfloat16, side)
    facts = dict(machine=machine(args.device), device=args.device, threads=torch.get_num_threads(), python=platform.python_version(), torch=torch.__version__,
                 torchvision=torchvision.__version__, system=platform.system(), limits=limits, repeats=args.repeats, cells=[], profiles=[])
    out.parent.mkdir(parents=True, exist_ok=True)
    cells, profiles = smallest() if args.smallest else plan(args.device, args.size)

    def keep():
        facts["minutes"] = (time.perf_counter() - start) / 60
        write_atomically(out, json.dumps(facts, indent=1).encode())

    for cell in cells:
        facts["cells"].append(measure(cell, args.device, args.repeats))
        print(*(" ".join(map(str, line(facts["cells"][-1], name, limits))) for name in facts["cells"][-1]["ways"]), sep="\n", flush=True)
        keep()  # a run that is cut leaves what it measured
    facts["profiles"] = [profile(cell, args.device, args.repeats) for cell in profiles]
    keep()
    print(report(facts))
    if not args.smallest: draw(facts, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
