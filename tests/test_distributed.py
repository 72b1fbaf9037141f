"Two processes that train together are one: same losses, same weights, one set of files. They are started once, for all tests."
import csv
import json
import os
import socket
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from anogan.cli import main
from anogan.detector import Detector
from anogan.errors import AnoganError
from anogan.experiments import sweep
from anogan.trainer import Trainer

NETWORKS = dict(anotrans=dict(dim=8, depth=1), gannext=dict(dim=8, depths=(1, 1, 1, 1), drop_path=0.2))
EXACT = "double"  # float32 leaves rounding errors where a true gradient is 0, and Adam makes whole steps of them: see the chapter on the trainer
CASES = {f"{model}-{recipe}-{format}": (model, recipe, format, dict(fixed_noise=0.1))
         for model in NETWORKS for recipe, format in (("published", "float"), ("recommended", "float"), ("recommended", EXACT))}
CASES["redrawn-double"] = ("gannext", "published", EXACT, dict(redraw_below=100.0))
LINE = "train --abnormal-class 3 --model gannext --dim 8 --ndf 8 --nz 16 --n-train 64 --epochs 6 --batch-size 16 --device cpu --precision fp32"


class Exact(Trainer):
    def step(self, x): return super().step(x.double())


def train(case, folder=None, batch_size=8, epochs=2):
    "Epochs of two steps: (history, networks)."
    model, recipe, format, options = CASES[case]
    images = torch.rand(17, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    detector = Detector(model, channels=1, recipe=recipe, ndf=8, nz=16, **NETWORKS[model], **options)
    for network in (detector.generator, detector.discriminator): network.to(getattr(torch, format))
    trainer = (Exact if format == EXACT else Trainer)(detector.generator, detector.discriminator, detector.recipe, epochs=epochs, batch_size=batch_size,
                                                      device="cpu", precision="fp32", folder=folder, progress=False)
    if "projection" in trainer.networks: trainer.networks["projection"].to(getattr(torch, format))
    return trainer.fit(images), trainer.networks


def keep(place, who, case, folder=None):
    "Train, and write what came out of it; with a folder, the second epoch is a resumed run's."
    if folder: train(case, folder, epochs=1)
    history, networks = train(case, folder)
    (place / case / who).mkdir(parents=True)
    (place / case / who / "history.json").write_text(json.dumps(history))
    weights = {f"{name}/{key}": t.contiguous() for name, network in networks.items() for key, t in network.state_dict().items()}
    save_file(weights, place / case / who / "weights.safetensors")


def command(out, who):
    "`anogan train` in this process; what it prints goes into two files."
    sys.argv, (said, complained) = ["anogan", *LINE.split(), "--out", str(out)], (out.with_name(f"{what}{who}") for what in ("said", "complained"))
    with open(said, "w") as f, open(complained, "w") as g, redirect_stdout(f), redirect_stderr(g), pytest.raises(SystemExit) as end: main()
    assert end.value.code == 0, complained.read_text()


def sentence(work):
    try: work()
    except AnoganError as e: return f"{type(e).__name__}: {e}"


def member(rank, place, port):
    "What each of the two processes does; the second one ends before the first."
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    for case in CASES: keep(place, str(rank), case, place / case / "folder")
    sentences = [sentence(lambda: train("redrawn-double", batch_size=7)), sentence(lambda: sweep({}, place / "sweep"))]
    command(place / "run", rank)
    if rank == 0: sentences.append(sentence(lambda: train("redrawn-double")))
    (place / f"sentences{rank}").write_text("\n".join(sentences))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "The folder that two processes have worked in; this one has done the same alone, meanwhile."
    place = tmp_path_factory.mktemp("together")
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    members = mp.spawn(member, (place, port), nprocs=2, join=False)
    try:
        for case in CASES: keep(place, "alone", case)
        command(place / "run_alone", "_alone")
        while not members.join(60): pass
    finally:
        for process in members.processes: process.kill()
    return place


def results(folder):
    return json.loads((folder / "history.json").read_text()), load_file(folder / "weights.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_losses_and_weights_are_those_of_one_process(place, case):
    (alone, weights), *members = (results(place / case / who) for who in ("alone", "0", "1"))
    for rows, found in members:
        for row, expected in zip(rows, alone, strict=True):
            assert row.keys() == expected.keys() and row["event"] == expected["event"]
            for name in row.keys() - {"seconds", "event"}: assert row[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-4), name
        off = {name: (found[name].double() - t).abs().max().item() for name, t in weights.items()}
        assert off.keys() == found.keys() and (EXACT not in case or max(off.values()) < 1e-6), off


@pytest.mark.parametrize("case", CASES)
def test_both_processes_hold_the_same_networks_and_the_first_writes_them(place, case):
    (_, first), (_, second) = (results(place / case / who) for who in "01")
    assert any("running_var" in name for name in first)
    checkpoint = load_file(place / case / "folder" / "checkpoint.safetensors")
    for name, t in first.items(): assert torch.equal(t, second[name]) and torch.equal(t, checkpoint[name]), name


def table(path):
    with open(path, newline="") as f: return list(csv.DictReader(f))


def test_a_run_leaves_one_set_of_files_with_the_numbers_of_one_process(place):
    files = [sorted(str(path.relative_to(out)) for path in out.rglob("*")) for out in (place / "run", place / "run_alone")]
    assert files[0] == files[1]
    for name in ("log.csv", "scores.csv"):
        for row, expected in zip(*(table(place / out / name) for out in ("run", "run_alone")), strict=True):
            for key in row.keys() - {"seconds", "event", "id"}: assert float(row[key]) == pytest.approx(float(expected[key]), rel=1e-3, abs=5e-4), key


def test_only_the_first_process_speaks(place):
    assert "results in" in (place / "said0").read_text() and "epoch 6/6" in (place / "complained0").read_text()
    assert (place / "said1").read_text() == (place / "complained1").read_text() == ""


def test_what_several_processes_cannot_do_is_one_sentence(place):
    batch, table, lost = (place / "sentences0").read_text().splitlines()
    assert batch == "InputError: batch size 7 cannot be shared equally by 2 processes: use a multiple of 2"
    assert table.startswith("InputError: a table of experiments starts processes by itself: start it without torchrun")
    assert lost.startswith("TrainingError: another process of this training has ended")
    assert (place / "sentences1").read_text().splitlines() == [batch, table]
