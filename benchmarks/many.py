"""How many small trainings should share one GPU? Steps per second of all together: in processes, and as streams of one process.

    python benchmarks/many.py benchmarks/results/many.json

Each trains GanNeXt tiny on batches of 64 random images of 32×32, by recorded steps (chapter 11). Streams are measured, and not used: the trainings
of one process would share one generator of random numbers, so that a run could not be repeated.
"""
import argparse
import json
import time
from pathlib import Path

import torch
from torch import multiprocessing
from tqdm.auto import tqdm

from anogan.data import ImageSet
from anogan.detector import GENERATORS
from anogan.discriminator import Discriminator, init_weights
from anogan.trainer import Recipe, Trainer, write_atomically

BATCH, STEPS = 64, 50


def training(device):
    "A trainer whose step is recorded, and its images."
    torch.manual_seed(0)
    generator = GENERATORS["gannext"](32, 1, **GENERATORS["gannext"].sizes["tiny"])
    discriminator = init_weights(Discriminator(32, 1, **Discriminator.sizes["tiny"]))
    trainer = Trainer(generator, discriminator, Recipe(), batch_size=BATCH, device=device, progress=False)
    images = ImageSet(torch.randint(0, 256, (BATCH * STEPS, 1, 32, 32), dtype=torch.uint8)).to(device)
    for network in trainer.networks.values(): network.train()
    trainer.record()
    for _ in range(2): trainer.one_epoch(images, 0, tqdm(disable=True))
    return trainer, images


def rate(work, seconds):
    "Steps per second of a function that takes `STEPS` steps."
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        work()
        done += STEPS
    return done / (time.perf_counter() - start)


def one_of_many(rank, counts, rounds, seconds, device, barrier, found):
    "A process that takes part where it is among the first n."
    torch.set_num_threads(1)
    trainer, images = training(device)
    for i in range(rounds):
        for n in counts:
            barrier.wait()
            if rank < n: found[(n, i, rank)] = rate(lambda: trainer.one_epoch(images, 0, tqdm(disable=True)), seconds)
            barrier.wait()


def by_processes(counts, rounds, seconds, device):
    "n -> steps per second of n processes together, in each round."
    context, most = multiprocessing.get_context("spawn"), max(counts)
    with context.Manager() as manager:
        found, barrier = manager.dict(), context.Barrier(most)
        torch.multiprocessing.spawn(one_of_many, (counts, rounds, seconds, device, barrier, found), nprocs=most)
        return {n: [sum(found[(n, i, rank)] for rank in range(n)) for i in range(rounds)] for n in counts}


def by_streams(counts, rounds, seconds):
    "The same for n trainings of one process, whose steps take turns in being launched, each on a stream of its own."
    trainings = [(*training("cuda"), torch.cuda.Stream()) for _ in range(max(counts))]

    def steps(n):
        for _ in range(STEPS // n + 1):
            for trainer, _, stream in trainings[:n]:
                with torch.cuda.stream(stream): trainer.take(trainer.take.x)
        torch.cuda.synchronize()
        return (STEPS // n + 1) * n

    def together(n):
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < seconds: done += steps(n)
        return done / (time.perf_counter() - start)

    rates = [[together(n) for n in counts] for _ in range(rounds)]
    return {n: [row[i] for row in rates] for i, n in enumerate(counts)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"], help="on a CPU there are no streams")
    parser.add_argument("--counts", nargs="+", type=int, default=[1, 2, 4, 8, 12])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each measurement")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    facts = dict(machine=name, torch=torch.__version__, batch=BATCH, processes=by_processes(args.counts, args.rounds, args.seconds, args.device))
    if args.device == "cuda": facts["streams"] = by_streams(args.counts, args.rounds, args.seconds)
    write_atomically(args.out, json.dumps(facts, indent=1).encode())
    for way in ("processes", "streams"):
        for n, rates in facts.get(way, {}).items(): print(way, n, *(f"{r:.0f}" for r in rates), "steps/s")


if __name__ == "__main__":
    main()
