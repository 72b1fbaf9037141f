"""What does a folder of 100,000 images cost? Speed and peak memory of `anogan score`, and a run that is killed in the middle and goes on.

    python benchmarks/scale.py benchmarks/results/scale.json --n 100000 --threads 1

The images are a few hundred small PNGs under many names. The detector learns digits for one epoch: what it costs does not depend on what it learnt.
This process stays small (it imports no torch), because Linux counts what it had when it started a child into the child's peak.
"""
import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from PIL import Image

DISTINCT, SIDE, PER_FOLDER = 300, 32, 1000
TRAIN = "train --dataset digits --abnormal-class 8 --model gannext --epochs 1 --device cpu"


def start(line, threads):
    "The command line in a process of its own."
    command = [sys.executable, "-c", "from anogan.cli import main; main()", *line.split()]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | dict(OMP_NUM_THREADS=str(threads)))


def finish(child, wanted=0):
    "Wait for its end: its peak memory in MB."
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == wanted, child.returncode
    return round(used.ru_maxrss / 1024)


def link_images(folder, n):
    "n names for `DISTINCT` images, in folders of `PER_FOLDER`."
    (folder / "originals").mkdir(parents=True)
    originals = [folder / "originals" / f"{i}.png" for i in range(min(n, DISTINCT))]
    for path in originals: Image.effect_noise((SIDE, SIDE), 80).save(path)
    for i in range(n):
        path = folder / "images" / f"{i // PER_FOLDER:04}" / f"{i:07}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(originals[i % len(originals)], path)
    return folder / "images"


def timed(line, threads, n):
    "One undisturbed run."
    begin = time.perf_counter()
    peak = finish(start(line, threads))
    return dict(images=n, seconds=round(time.perf_counter() - begin, 1), peak_mb=peak)


def killed(line, out, half, threads):
    "A run that is killed when its file has `half` bytes, and the same command again: (whole lines that were kept, peak of the second run in MB)."
    child = start(line, threads)
    while not out.exists() or out.stat().st_size < half:
        assert child.poll() is None, "it ended too early to be killed"
        time.sleep(0.01)
    child.kill()
    finish(child, -signal.SIGKILL)
    return out.read_bytes().count(b"\n"), finish(start(line, threads))


def read(out): return [json.loads(line) for line in out.read_text().splitlines()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="JSON file with what was found")
    parser.add_argument("--n", type=int, default=100_000, help="images")
    parser.add_argument("--few", type=int, default=1000, help="images of the small run beside it")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    facts = dict(python=platform.python_version(), torch=version("torch"), machine=platform.machine(), threads=args.threads,
                 model="gannext", size="tiny", isize=SIDE, distinct=DISTINCT)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        finish(start(f"{TRAIN} --out {folder / 'run'}", args.threads))
        images, score = link_images(folder / "many", args.n), f"score {folder / 'run'} --device cpu"
        small = timed(f"{score} {link_images(folder / 'few', args.few)} --out {folder / 'few.jsonl'}", args.threads, args.few)
        large = timed(f"{score} {images} --out {folder / 'whole.jsonl'}", args.threads, args.n)
        whole, half = read(folder / "whole.jsonl"), (folder / "whole.jsonl").stat().st_size // 2
        kept, peak = killed(f"{score} {images} --out {folder / 'cut.jsonl'}", folder / "cut.jsonl", half, args.threads)
        cut = read(folder / "cut.jsonl")
        assert [row["path"] for row in cut] == [row["path"] for row in whole] and len({row["path"] for row in whole}) == args.n
        off = max(abs(a["score"] - b["score"]) for a, b in zip(cut, whole))
        facts |= dict(runs=[small, large], images_per_second=round((args.n - args.few) / (large["seconds"] - small["seconds"])),
                      killed=dict(lines_kept=kept, lines_in_the_end=len(cut), peak_mb_of_the_second_run=peak, largest_difference_of_scores=off))
    args.out.write_text(json.dumps(facts, indent=1))
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
