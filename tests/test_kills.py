"Kill -9 at random moments, then the same command: a short form of benchmarks/kills.py, which does it thirty times."
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import kills


@pytest.fixture
def line(tmp_path):
    "A command for a table of two cells, in two processes."
    (tmp_path / "grid.toml").write_text(kills.GRID)
    return f"experiment --grid {tmp_path / 'grid.toml'} --jobs 2"


def started(out, child):
    "Wait until a cell has finished an epoch."
    while not list(out.glob("*/log.csv")):
        assert child.poll() is None, child.communicate()[0]
        time.sleep(0.05)


def alive(group):
    try: os.killpg(group, 0)
    except ProcessLookupError: return False
    return True


def gone(group, patience=60):
    "Has every process of the group ended, soon?"
    for _ in range(patience * 10):
        if not alive(group): return True
        time.sleep(0.1)
    return False


def test_a_training_that_is_killed_ends_like_one_that_is_not(tmp_path):
    found = kills.compare(kills.TRAIN, tmp_path, 2, random.Random(time.time()))
    assert found["kills"] == 2 and found["files"] == 8


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="groups of processes")
def test_a_sweep_that_is_killed_leaves_no_process_and_ends_like_one_that_is_not(tmp_path, line):
    kills.finish(kills.start(line, tmp_path / "whole"))
    child = kills.start(line, tmp_path / "cut")
    started(tmp_path / "cut", child)
    child.kill()
    child.communicate()
    assert gone(child.pid), "a worker has outlived its sweep"
    kills.finish(kills.start(line, tmp_path / "cut"))
    assert kills.content(tmp_path / "cut") == kills.content(tmp_path / "whole")


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="groups of processes")
def test_ctrl_c_stops_a_sweep_in_one_sentence_and_leaves_it_resumable(tmp_path, line):
    child = kills.start(line, tmp_path / "out")
    started(tmp_path / "out", child)
    os.killpg(child.pid, signal.SIGINT)  # what a terminal sends to all processes in front of it
    said = child.communicate()[0]
    assert child.returncode == 130 and "the same command goes on" in said and "Traceback" not in said, said
    assert gone(child.pid)
    kills.finish(kills.start(line, tmp_path / "out"))
    assert (tmp_path / "out" / "report.html").exists()
