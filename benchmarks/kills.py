"""Kill -9 at random moments, start the same command again, and compare every file with those of a run that nobody disturbed.

    python benchmarks/kills.py results/kills.json --train 20 --experiment 10

A short form of it is in tests/test_kills.py.
"""
import argparse
import csv
import json
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

TRAIN = "train --abnormal-class 3 --model gannext --dim 8 --ndf 8 --nz 16 --n-train 96 --epochs 8 --batch-size 16 --device cpu"
GRID = """classes = [3, 8]
models = "gannext"
seeds = 1
epochs = 6
n_train = 96
batch_size = 16
options = {dim = 8, ndf = 8, nz = 16}
device = "cpu"
"""


def start(line, out):
    "The command line in a process of its own, which leads a group of its own."
    command = [sys.executable, "-c", "from anogan.cli import main; main()", *line.split(), "--out", str(out)]
    def hear_ctrl_c(): signal.signal(signal.SIGINT, signal.SIG_DFL)  # what runs in the background is often started deaf to it
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, preexec_fn=hear_ctrl_c)


def finish(child):
    "Wait until it has ended; anything but success is an error."
    said = child.communicate()[0]
    assert child.returncode == 0, said[-3000:]


def timeless(path):
    "What a file says, without the time that it took."
    if path.name == "metrics.json": return {name: value for name, value in json.loads(path.read_text()).items() if name != "seconds"}
    if path.name == "log.csv": return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(path.open())]
    return path.read_bytes()


def content(out):
    "Everything below a folder, by relative path; reports are left out, because they tell the time that training took."
    return {str(path.relative_to(out)): timeless(path) for path in sorted(out.rglob("*")) if path.is_file() and not path.name.startswith("report.")}


def disturbed(line, out, seconds, kills, dice):
    "Run to the end, with at most so many kills on the way: for each, the seconds it came after the start."
    moments = []
    while True:
        child, moment = start(line, out), dice.uniform(0, seconds)
        try: child.wait(moment if len(moments) < kills else None)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            moments.append(round(moment, 2))
            continue
        finish(child)
        return moments


def compare(line, folder, kills, dice):
    "Disturbed runs of one command until there have been so many kills: (seconds of the undisturbed run, runs, moments of the kills)."
    begin = time.perf_counter()
    finish(start(line, folder / "whole"))
    seconds, wanted, runs, moments = time.perf_counter() - begin, content(folder / "whole"), 0, []
    while len(moments) < kills:
        out = folder / f"disturbed{runs}"
        moments += disturbed(line, out, seconds, kills - len(moments), dice)
        found, runs = content(out), runs + 1
        assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
        different = [name for name in wanted if found[name] != wanted[name]]
        assert not different, different
    return dict(seconds=round(seconds, 1), runs=runs, kills=len(moments), files=len(wanted), moments=moments)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file with what was found")
    parser.add_argument("--train", type=int, default=20, help="kills of `anogan train`")
    parser.add_argument("--experiment", type=int, default=10, help="kills of `anogan experiment`")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    dice, facts = random.Random(args.seed), dict(python=platform.python_version(), torch=torch.__version__, machine=platform.machine())
    with tempfile.TemporaryDirectory() as folder:
        grid = Path(folder) / "grid.toml"
        grid.write_text(GRID)
        for name, line, kills in (("train", TRAIN, args.train), ("experiment", f"experiment --grid {grid} --jobs 2", args.experiment)):
            facts[name] = compare(line, Path(folder) / name, kills, dice)
            print(f"{name}: {facts[name]}: all files as in the undisturbed run", flush=True)
    args.out.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
