"""No path in which training, stopping, calibration or a threshold sees a test image.

The test set is sealed until the model is saved, or it is garbage: nothing that was learnt may notice."""
import csv
import json
import pickle
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import anogan.experiments as experiments
from anogan.baselines import BASELINES, run_baselines
from anogan.cli import app
from anogan.data import ImageSet, load_dataset
from anogan.detector import Detector
from anogan.errors import InputError
from anogan.experiments import RunConfig, run

NARROW = {"anotrans": dict(dim=8, ndf=8, nz=16), "gannext": dict(dim=8, depths=(1, 1, 1, 1), ndf=8, nz=16)}


def config(model="gannext", recipe="recommended", **options):
    return RunConfig(**dict(abnormal_class="3", model=model, recipe=recipe, n_train=64, epochs=2, batch_size=16, options=NARROW[model],
                            device="cpu") | options)


@pytest.fixture(autouse=True)
def no_weights(tmp_path):
    "Whatever torch's cache holds, the borrowed network is the random one."
    before = torch.hub.get_dir()
    torch.hub.set_dir(str(tmp_path / "hub"))
    yield
    torch.hub.set_dir(before)


class Sealed:
    """A data set whose `.test` cannot even be named before `opens()` is true; `looks` counts how often it was, after that.

    Its manifest, made before training, holds the test images' names and fingerprint; the run writes it down and reads nothing from it."""
    def __init__(self, data, opens):
        self.data, self.opens, self.looks = data, opens, 0

    def __getattr__(self, name):
        if name == "test":
            if not self.opens(): raise AssertionError("the test set was used too early")
            self.looks += 1
        return getattr(self.data, name)


def load_sealed(monkeypatch, opens):
    "Let every run load sealed data; returns the list of them."
    loaded = []

    def load(*args, **options):
        loaded.append(Sealed(load_dataset(*args, **options), opens))
        return loaded[-1]
    monkeypatch.setattr(experiments, "load_dataset", load)
    return loaded


# ---------------------------------------------------------------- sealed

@pytest.mark.parametrize("model, recipe", [("gannext", "recommended"), ("anotrans", "recommended"), ("anotrans", "published")])
def test_a_run_opens_the_test_set_after_the_model_is_saved(model, recipe, tmp_path, monkeypatch):
    loaded = load_sealed(monkeypatch, (tmp_path / "out/model/detector.json").exists)
    metrics = run(config(model, recipe), tmp_path / "out", progress=False)
    assert len(loaded) == 1 and loaded[0].looks > 0 and metrics["n_abnormal"] == 183


def test_a_resumed_run_does_so_too(tmp_path, monkeypatch):
    class PowerCut(Exception): pass

    def cut(row): raise PowerCut
    loaded = load_sealed(monkeypatch, (tmp_path / "out/model/detector.json").exists)
    with pytest.raises(PowerCut): run(config(), tmp_path / "out", progress=False, on_epoch=cut)
    run(config(), tmp_path / "out", progress=False)
    assert [sealed.looks > 0 for sealed in loaded] == [False, True]


def test_the_command_line_does_so_too(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    loaded = load_sealed(monkeypatch, (tmp_path / "out/model/detector.json").exists)
    line = "train --abnormal-class 3 --model gannext --dim 8 --ndf 8 --nz 16 --n-train 32 --epochs 1 --batch-size 16 --device cpu --display --out"
    result = CliRunner().invoke(app, [*line.split(), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert len(loaded) == 1 and loaded[0].looks > 0


def test_the_seal_would_catch_a_cheat(tmp_path, monkeypatch):
    "A stopping rule that looks at test images."
    loaded = load_sealed(monkeypatch, (tmp_path / "out/model/detector.json").exists)
    with pytest.raises(AssertionError, match="too early"): run(config(), tmp_path / "out", progress=False, on_epoch=lambda row: len(loaded[0].test))
    assert not (tmp_path / "out/model").exists()


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_opens_the_test_set_after_its_threshold_is_fixed(name, monkeypatch):
    fitted = []

    class Watched(BASELINES[name]):
        def fit(self, train, val):
            super().fit(train, val)
            fitted.append(self.threshold)
            return self
    monkeypatch.setitem(BASELINES, name, Watched)
    sealed = Sealed(load_dataset("digits", 3, isize=8, n_train=40), lambda: bool(fitted))
    found = run_baselines(sealed, name)[name]
    assert sealed.looks > 0 and fitted == [found["threshold"]]


# ---------------------------------------------------------------- garbage

def garbage(test):
    "Noise in place of the test images, another number of them, every label turned round."
    n = len(test) - 7
    noise = torch.randint(0, 256, (n, test.channels, test.isize, test.isize), dtype=torch.uint8, generator=torch.Generator().manual_seed(9))
    return ImageSet(noise, 1 - test.labels[:n])


@pytest.mark.parametrize("model, recipe, baselines", [("gannext", "recommended", tuple(BASELINES)), ("anotrans", "published", ())])
def test_garbage_for_a_test_set_changes_no_bit_of_what_was_learnt(model, recipe, baselines, tmp_path, monkeypatch):
    chosen = config(model, recipe, baselines=baselines)
    honest = run(chosen, tmp_path / "honest", progress=False)

    def load(*args, **options):
        data = load_dataset(*args, **options)
        return replace(data, test=garbage(data.test))
    monkeypatch.setattr(experiments, "load_dataset", load)
    spoilt = run(chosen, tmp_path / "spoilt", progress=False)

    assert honest["auroc"] != spoilt["auroc"] and honest["n_normal"] != spoilt["n_normal"]  # the garbage did arrive
    for file in ("model.safetensors", "detector.json"):  # weights, memory; calibration, threshold, scale of the heat
        assert (tmp_path / "honest/model" / file).read_bytes() == (tmp_path / "spoilt/model" / file).read_bytes(), file
    facts = json.loads((tmp_path / "spoilt/model/detector.json").read_text())
    assert facts["threshold"] == honest["threshold"] and facts["heat_scale"] > 0 and (facts["calibration"] is None) == (recipe == "published")
    logs = [list(csv.DictReader((tmp_path / name / "log.csv").open())) for name in ("honest", "spoilt")]
    for row in sum(logs, []): del row["seconds"]
    assert logs[0] == logs[1] and len(logs[0]) == 2
    for name in baselines: assert honest["baselines"][name]["threshold"] == spoilt["baselines"][name]["threshold"], name


def test_the_log_of_an_epoch_holds_nothing_of_a_test(tmp_path):
    rows = []
    run(config(), tmp_path / "out", progress=False, on_epoch=rows.append)
    assert len(rows) == 2 and not [name for name in rows[0] if "auroc" in name or "test" in name or "threshold" in name]


# ---------------------------------------------------------------- judging leaves no trace

@pytest.fixture(scope="module")
def small():
    return load_dataset("digits", 3, isize=32, n_train=48)


def detectors(data):
    "Every detector there is, fitted."
    yield Detector("gannext", epochs=1, batch_size=16, device="cpu", progress=False, **NARROW["gannext"]).fit(data.train, data.val)
    for kind in BASELINES.values(): yield kind().fit(data.train, data.val)


def test_judging_a_test_set_changes_nothing(small, tmp_path):
    for detector in detectors(small):
        def state(detector=detector):
            if not isinstance(detector, Detector): return pickle.dumps(vars(detector))
            folder = detector.save(tmp_path / "model")
            return [(folder / name).read_bytes() for name in ("model.safetensors", "detector.json")]
        before = state()
        detector.evaluate(small.test), detector.predict(small.test)
        if hasattr(detector, "heatmap"): detector.heatmap(small.test)
        assert state() == before, type(detector).__name__


def test_abnormal_images_have_no_door(small):
    "Neither as training nor as validation images, whatever the detector."
    makers = {"detector": lambda: Detector("gannext", epochs=1, batch_size=16, device="cpu", progress=False, **NARROW["gannext"]), **BASELINES}
    for name, make in makers.items():
        with pytest.raises(InputError, match="training set holds 183 images labelled abnormal"): make().fit(small.test, small.val)
        detector = make()
        with pytest.raises(InputError, match="validation set holds 183 images labelled abnormal"): detector.fit(small.train, small.test)
        assert detector.threshold is None, name
