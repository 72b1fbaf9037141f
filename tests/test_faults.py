"""Faults in the middle of a run (disk, memory, files that vanish), and what must hold for every batch, order and place of a defect."""
import os
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image
from typer.testing import CliRunner

import anogan.data
import anogan.trainer
from anogan.cli import app
from anogan.data import ImageSet, load_images
from anogan.detector import GENERATORS, Detector
from anogan.errors import AnoganError, InputError, TrainingError
from anogan.experiments import RunConfig, run
from anogan.trainer import Trainer, enough_memory, load_checkpoint

SMALL = dict(dim=8, depths=(1, 1), ndf=8, nz=8)
CONFIG = RunConfig(abnormal_class="3", model="gannext", n_train=32, epochs=1, batch_size=16, options=SMALL, device="cpu", baselines=())
FULL = OSError(28, "No space left on device")


def noise(n, seed=0, channels=1):
    return torch.rand(n, channels, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def raising(error):
    def act(*args, **options): raise error
    return act


def one_sentence(error):
    assert "\n" not in str(error.value) and not str(error.value).endswith(".")
    return str(error.value)


# ---------------------------------------------------------------- the disk

@pytest.mark.parametrize("name", ["config.json", "manifest.json", "checkpoint.safetensors", "log.csv", "model.safetensors", "detector.json", "metrics.json"])
def test_wherever_the_disk_is_full_a_run_says_so_and_the_same_command_ends_it(name, tmp_path, monkeypatch):
    real = os.replace

    def full(source, target):
        if Path(target).name == name: raise FULL
        real(source, target)
    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", full)
        with pytest.raises(InputError, match=f"cannot write .*{name} .No space left on device.: make room") as e: run(CONFIG, tmp_path / "out", progress=False)
        one_sentence(e)
    assert not list(tmp_path.rglob("*.part"))
    if name == "config.json": (tmp_path / "out").rmdir()  # nothing is in it
    assert run(CONFIG, tmp_path / "out", progress=False)["auroc"] > 0


def test_a_picture_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(Figure, "savefig", raising(FULL))
    with pytest.raises(InputError, match="cannot write .*picture.png"): run(CONFIG, tmp_path / "out", progress=False)


@pytest.mark.parametrize("act", [lambda d, p: run(CONFIG, p, progress=False), lambda d, p: d.save(p), lambda d, p: Trainer(
    d.generator, d.discriminator, d.recipe, epochs=1, batch_size=16, device="cpu", folder=p, progress=False).fit(noise(16))], ids=["run", "save", "fit"])
def test_a_folder_that_takes_no_files_is_one_sentence(act, tmp_path, monkeypatch):
    detector = fitted("gannext")
    monkeypatch.setattr(Path, "mkdir", raising(OSError(30, "Read-only file system")))
    with pytest.raises(InputError, match="cannot write .*out .Read-only file system.") as e: act(detector, tmp_path / "out")
    one_sentence(e)


# ---------------------------------------------------------------- files that vanish

def test_a_file_that_vanishes_during_training_is_named_and_the_run_goes_on_when_it_is_back(tmp_path, monkeypatch):
    monkeypatch.setattr(anogan.data, "MEMORY_LIMIT", 0)  # files stay on the disk
    for i in range(16): Image.effect_noise((32, 32), 50).save(tmp_path / f"{i:02}.png")
    images = load_images(tmp_path)
    taken = (tmp_path / "07.png").read_bytes()
    detector = Detector("gannext", channels=1, device="cpu", progress=False, **SMALL)
    make = lambda: Trainer(detector.generator, detector.discriminator, detector.recipe, epochs=2, batch_size=8, device="cpu", folder=tmp_path / "run",
                           progress=False)
    with pytest.raises(InputError, match="07.png: there is no such file") as e: make().fit(images, lambda row: (tmp_path / "07.png").unlink())
    one_sentence(e)
    with pytest.raises(InputError, match="07.png: there is no such file"): images.sha256()
    assert len(load_checkpoint(tmp_path / "run/checkpoint.safetensors", {}, {})["history"]) == 1
    (tmp_path / "07.png").write_bytes(taken)
    assert len(make().fit(images)) == 2


# ---------------------------------------------------------------- memory

OUT = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has"), MemoryError(), RuntimeError("MPS backend out of memory (1 GB)"),
       RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")]


@pytest.mark.parametrize("error", OUT, ids=lambda e: str(e)[:12])
def test_training_without_memory_says_what_to_try_and_leaves_the_networks_as_they_were(error, monkeypatch):
    detector = Detector("gannext", channels=1, epochs=1, batch_size=16, device="cpu", progress=False, **SMALL)
    before = {name: t.clone() for name, t in detector.generator.state_dict().items()}
    monkeypatch.setattr(anogan.trainer, "gan_step", raising(error))
    with pytest.raises(TrainingError, match="out of memory with 16 images of 1×32×32 at once: use batch_size=8, or a smaller isize") as e:
        detector.fit(noise(32), noise(8, 1))
    one_sentence(e)
    assert all(torch.equal(t, before[name]) for name, t in detector.generator.state_dict().items()) and detector.threshold is None


def test_scoring_without_memory_says_how_many_images_to_try(monkeypatch):
    detector = fitted("gannext")
    monkeypatch.setattr(detector.generator, "forward", raising(OUT[0]))
    monkeypatch.setattr(detector.discriminator, "feature_maps", raising(OUT[0]))  # all that a score of the memory runs
    for use in (detector.score, detector.heatmap, detector.reconstruct):
        with pytest.raises(AnoganError, match="with 24 images of 1×32×32 at once: use no more than 12 images at a time"): use(noise(24))
    with pytest.raises(AnoganError, match="use a smaller network, or a smaller isize"): detector.score(noise(1))


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes"), enough_memory(noise(2)): raise RuntimeError("shapes cannot be multiplied")
    with pytest.raises(KeyError), enough_memory(noise(2)): raise KeyError("a")


def test_out_of_memory_is_exit_code_1(tmp_path, monkeypatch):
    monkeypatch.setattr(anogan.trainer, "gan_step", raising(OUT[0]))
    line = "train --model gannext --dim 8 --ndf 8 --nz 8 --n-train 32 --abnormal-class 0 --epochs 1 --batch-size 16 --device cpu --out"
    done = CliRunner().invoke(app, [*line.split(), str(tmp_path / "out")])
    assert done.exit_code == 1 and "batch_size=8" in done.stderr and "Traceback" not in done.stderr


# ---------------------------------------------------------------- invariances

NARROW = {"anotrans": dict(dim=8), "gannext": dict(dim=8, depths=(1, 1)), "skipganomaly": dict(ngf=4), "sagan": dict(ngf=4)}


@lru_cache
def fitted(model, recipe="recommended"):
    "A detector as after training, without the training."
    detector = Detector(model, channels=1, recipe=recipe, device="cpu", progress=False, ndf=8, nz=8, **NARROW[model])
    with torch.no_grad(): detector.discriminator.to_feature.weight *= 30  # features of the size that they have after training
    return detector.remember(noise(24)).calibrate(noise(12, 1))


@settings(max_examples=12, deadline=None)
@given(model=st.sampled_from(list(GENERATORS)), recipe=st.sampled_from(["recommended", "defects", "published"]), order=st.permutations(range(9)),
       cuts=st.sets(st.integers(1, 8)))
def test_a_score_and_a_heat_map_belong_to_one_image_in_any_company(model, recipe, order, cuts):
    detector, x, order = fitted(model, recipe), noise(9, 2), list(order)
    edges = [0, *sorted(cuts), 9]
    parts = [x[order[a:b]] for a, b in zip(edges, edges[1:])]
    torch.testing.assert_close(torch.cat([detector.score(part) for part in parts]), detector.score(x)[order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([detector.heatmap(part) for part in parts]), detector.heatmap(x)[order], rtol=1e-5, atol=1e-5)


@settings(max_examples=5, deadline=None)
@given(workers=st.integers(1, 8), size=st.integers(1, 20))
def test_nor_does_it_depend_on_who_decodes_the_files(workers, size, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for i in range(9): Image.effect_noise((40, 30), 60).save(folder / f"{i}.png")
    detector, expected = fitted("gannext"), load_images(folder).stack()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anogan.data, "MEMORY_LIMIT", 0)
        patch.setattr(anogan.data, "WORKERS", workers)
        patch.setattr("anogan.detector.SCORE_BATCH", size)
        found = detector.score(load_images(folder))
    torch.testing.assert_close(found, detector.score(expected), rtol=1e-5, atol=1e-5)


@lru_cache
def grey():
    "Trained on uniform grey images."
    train = ImageSet(torch.full((48, 1, 32, 32), 200, dtype=torch.uint8))
    options = dict(SMALL, depths=(1, 1, 1, 1))
    return Detector("gannext", epochs=6, batch_size=16, device="cpu", progress=False, **options).fit(train, train.subset(range(8))), train.stack()[:1]


@settings(max_examples=15, deadline=None)
@given(top=st.integers(0, 26), left=st.integers(0, 26))
def test_a_planted_defect_is_found_where_it_is(top, left):
    detector, x = grey()
    x = x.clone()
    x[:, :, top:top + 6, left:left + 6] = -1
    row, col = divmod(int(detector.heatmap(x)[0].argmax()), 32)
    assert top - 1 <= row <= top + 6 and left - 1 <= col <= left + 6


def test_the_same_config_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"): run(replace(CONFIG, epochs=2), tmp_path / name, progress=False)
    assert (tmp_path / "a/model/model.safetensors").read_bytes() == (tmp_path / "b/model/model.safetensors").read_bytes()
    assert (tmp_path / "a/model/detector.json").read_bytes() == (tmp_path / "b/model/detector.json").read_bytes()
