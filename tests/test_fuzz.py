"""A short run of `tests/fuzz.py`, whose long mode is one command; that it can fail; and what chance would find too rarely."""
import json
import os
import pickle
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))
import fuzz
from anogan.cli import app
from anogan.data import list_images, load_dataset, read_image
from anogan.detector import Detector
from anogan.errors import AnoganError, InputError
from anogan.released import load_released

CASES = 150
fuzz.SECONDS = 120  # a busy machine is no fault of the package
pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes and alarms are POSIX's")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return fuzz.Lab(tmp_path_factory.mktemp("lab"))


def test_every_case_ends_in_success_or_one_sentence(tmp_path):
    found = list(fuzz.fuzz(CASES, seed=1, root=tmp_path))
    assert len(found) == CASES and {ended for *_, ended, _ in found} >= {"success", "InputError"}
    assert not [row for row in found if row[3]]


# ---------------------------------------------------------------- the fuzzer can fail

def raising(error):
    def act(): raise error
    return act


def test_the_fuzzer_notices_what_it_is_there_for(lab, monkeypatch):
    path = lab.root / "x.png"
    assert fuzz.outcome("k", path, raising(KeyError("a")))[1].startswith("KeyError")
    assert fuzz.outcome("k", path, raising(AnoganError("x.png is\nbad")))[1] == "more than one line"
    assert fuzz.outcome("k", path, raising(AnoganError("something is bad")))[1] == "does not name the file"
    assert fuzz.outcome("k", path, raising(AnoganError("x.png is bad")))[1] == ""
    monkeypatch.setattr(fuzz, "limited", lambda: LIMITED(0.2))
    assert fuzz.outcome("k", path, lambda: [None for _ in iter(int, 1)])[0] == "hang"


LIMITED = fuzz.limited


def test_the_fuzzer_notices_code_that_ran(tmp_path, monkeypatch):
    def careless(lab, folder, rng):
        (folder / "x").write_bytes(pickle.dumps(fuzz.Evil(lab.canary)))
        return "careless", folder, lambda: pickle.loads((folder / "x").read_bytes())
    monkeypatch.setattr(fuzz, "CASES", [(careless, 1)])
    assert [fault for *_, fault in fuzz.fuzz(2, 0, tmp_path)] == ["code was executed"] * 2


def test_a_detector_that_gives_no_numbers_is_a_fault(lab):
    class Poisoned:
        def score(self, x): return torch.full((len(x),), torch.nan)
        heatmap = score
    assert "not finite" in fuzz.outcome("k", lab.root, lambda: fuzz.use(Poisoned(), lab))[1]


# ---------------------------------------------------------------- nothing runs

@pytest.mark.parametrize("opening", [
    lambda p: Detector.load(p, "cpu"), lambda p: load_released(p / "w.pth", "gannext"), lambda p: read_image(p / "w.png", 8, 1),
    lambda p: load_dataset("mnist", 0, root=p), lambda p: load_dataset("cifar10", 0, root=p)])
def test_no_door_runs_a_pickle(tmp_path, opening):
    evil = pickle.dumps(fuzz.Evil(tmp_path / "canary"))
    for name in ("model.safetensors", "detector.json", "w.pth", "w.png", "MNIST/raw/x", "MNIST/processed/training.pt", "MNIST/processed/test.pt",
                 *(f"cifar-10-batches-py/{name}" for name in ("data_batch_1", "test_batch", "batches.meta"))):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(evil)
    with pytest.raises(InputError): opening(tmp_path)
    assert not (tmp_path / "canary").exists()
    pickle.loads(evil)  # the canary does sing
    assert (tmp_path / "canary").exists()


# ---------------------------------------------------------------- single cases

def altered(lab, folder, change=None, **tensors):
    "A saved detector with other facts or tensors and a fingerprint that fits."
    folder.mkdir()
    weights = fuzz.save(fuzz.load(lab.weights) | tensors)
    facts = json.loads(json.dumps(lab.facts)) | dict(sha256=fuzz.sha256(weights).hexdigest())
    if change: change(facts)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "detector.json").write_text(json.dumps(facts))
    return folder


@pytest.mark.parametrize("change, sentence", [
    (lambda f: f.update(threshold=float("nan")), "the threshold is nan, not a finite number"),
    (lambda f: f.update(heat_scale=0), "the scale of the heat map is 0, not a finite number above 0"),
    (lambda f: f["calibration"]["sd"].update(rec=-1.0), "the spread of rec is -1.0"),
    (lambda f: f.update(weights={"near_patch": 1.0}), "unknown term of the score 'near_patch'"),
    (lambda f: f.update(weights={}), "no term of the score has a weight"),
    (lambda f: f["config"]["network"].update(dim=10**9), "dim 1000000000 does not size a network"),
    (lambda f: f["config"]["network"].update(dim=4096), "float32, not"),
    (lambda f: f["config"]["network"].update(depths=[60] * 1000), "does not size a network"),
    (lambda f: f["config"].update(model="os.system"), "unknown model 'os.system'"),
    (lambda f: f["config"].update(isize=10**12), "isize 1000000000000 is not legal"),
])
def test_altered_facts_say_what_is_wrong(lab, tmp_path, change, sentence):
    with fuzz.limited(), pytest.raises(InputError) as e: Detector.load(altered(lab, tmp_path / "m", change), "cpu")
    assert sentence in str(e.value) and str(tmp_path / "m") in str(e.value) and "\n" not in str(e.value)


def test_altered_tensors_say_what_is_wrong(lab, tmp_path):
    tensors = fuzz.load(lab.weights)
    name = next(key for key in tensors if key.startswith("memory/"))
    weight = next(key for key, t in tensors.items() if key.startswith("generator/") and t.ndim == 4)
    bad = {"a": ({weight: tensors[weight].half()}, "float16, not"), "b": ({weight: tensors[weight] * torch.nan}, "values that are not finite"),
           "c": ({name: tensors[name][:0]}, f"{name} is (0,"), "d": ({name: tensors[name][:, :, 1:].contiguous()}, ", not None"),
           "e": ({"generator/x": torch.zeros(1)}, "generator/x is"), "f": ({"memory/near_far": tensors[name]}, "memory/near_far")}
    for folder, (change, sentence) in bad.items():
        with pytest.raises(InputError) as e: Detector.load(altered(lab, tmp_path / folder, **change), "cpu")
        assert sentence in str(e.value), str(e.value)
    assert Detector.load(altered(lab, tmp_path / "good"), "cpu").threshold == lab.detector.threshold


def test_a_folder_that_cannot_be_read_is_never_skipped_silently(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    fuzz.picture(fuzz.random.Random(0)).save(tmp_path / "a.png")
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("closed"): raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(InputError, match=r"the folder .*closed cannot be read \(Permission denied\)"): list_images(tmp_path)


def test_pipes_and_loops(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    for name, words in (("pipe.png", "it is a pipe or a device"), ("loop.png", "it cannot be opened")):
        with fuzz.limited(), pytest.raises(InputError, match=f"{name}: {words}"): read_image(tmp_path / name, 8, 1)


def test_a_name_that_is_no_text_comes_out_of_the_command_line_as_it_went_in(lab, tmp_path):
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xff.png"))
    fuzz.picture(fuzz.random.Random(0), (9, 9)).save(odd, "PNG")
    plain = tmp_path / "größe.png"
    fuzz.picture(fuzz.random.Random(0), (9, 9)).save(plain)
    done = CliRunner().invoke(app, ["score", str(lab.root / "model"), str(odd), str(plain), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert [json.loads(line)["path"] for line in done.stdout.splitlines()] == [str(odd), str(plain)] and "größe" in done.stdout


def test_a_file_list_does_not_lead_out_of_its_folder(tmp_path):
    (tmp_path / "labels.csv").write_text("images/a.png 0.0 mono\n../../secret.png 1.0 mono\n")
    with pytest.raises(InputError, match="names '../../secret.png', which lies outside"): load_dataset("elpv", root=tmp_path)
