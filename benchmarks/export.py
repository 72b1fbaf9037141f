"""How fast is an exported detector beside PyTorch, on the CPU? Both score the same images turn by turn; medians and quartiles of the ratios.

    python benchmarks/export.py results/export.json --threads 1
"""
import argparse
import json
import platform
import tempfile
from pathlib import Path
from statistics import quantiles
from time import perf_counter

import onnxruntime
import torch

from anogan.data import to_float
from anogan.detector import GENERATORS, Detector
from anogan.export import deviation, to_onnx
from anogan.trainer import write_atomically


def noise(n, isize, channels, seed):
    return torch.randint(0, 256, (n, channels, isize, isize), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def fitted(model, recipe, args):
    "A detector with a full memory; its speed does not depend on what it learnt."
    detector = Detector(model, args.size, args.isize, channels=args.channels, recipe=recipe, device="cpu", progress=False)
    train, val = (to_float(noise(n, args.isize, args.channels, seed)) for n, seed in ((args.memory, 0), (200, 1)))
    return detector.remember(train).calibrate(val)


def seconds(f, *args):
    start = perf_counter()
    f(*args)
    return perf_counter() - start


def eager(detector, pixels):
    x = to_float(pixels)
    return detector.score(x), detector.heatmap(x)


def row(model, recipe, args, file):
    "One detector, several batch sizes."
    detector = fitted(model, recipe, args)
    exporting = seconds(to_onnx, detector, file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    found = dict(model=model, recipe=recipe, score=detector.weights, export_seconds=exporting, bytes=file.stat().st_size,
                 deviation=deviation(file, detector, noise(16, args.isize, args.channels, 2)), batches={})
    for n in args.batches:
        pixels = noise(n, args.isize, args.channels, 3)
        run = lambda p: session.run(None, {"images": p.numpy()})
        eager(detector, pixels), run(pixels)
        pairs = [(seconds(eager, detector, pixels), seconds(run, pixels)) for _ in range(args.repeats)]
        low, middle, high = quantiles([a / b for a, b in pairs], n=4)
        found["batches"][n] = dict(eager_ms=1000 * quantiles([a for a, _ in pairs], n=4)[1], onnx_ms=1000 * quantiles([b for _, b in pairs], n=4)[1],
                                   ratio=middle, ratio_quartiles=[low, high])
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--models", nargs="+", default=list(GENERATORS), choices=GENERATORS)
    parser.add_argument("--recipes", nargs="+", default=["recommended", "published"])
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--isize", type=int, default=32)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--memory", type=int, default=4000, help="images remembered")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model in args.models:
            for recipe in args.recipes:
                rows.append(row(model, recipe, args, Path(folder) / "model.onnx"))
                print(json.dumps(rows[-1]), flush=True)
                facts = dict(torch=torch.__version__, onnxruntime=onnxruntime.__version__, machine=platform.machine(), threads=args.threads, size=args.size,
                             isize=args.isize, channels=args.channels, memory=args.memory, repeats=args.repeats, rows=rows)
                write_atomically(args.out, json.dumps(facts, indent=1).encode())


if __name__ == "__main__":
    main()
