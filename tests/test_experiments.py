"What the chapter on experiments cannot show: every way in which a run is refused before it writes, and how it resumes."
import json
from dataclasses import replace

import pytest
import torch

from anogan.errors import InputError
from anogan.experiments import RunConfig, claim, counted, peek, prepare, read_scores, run, verdict

NARROW = dict(dim=8, depths=(1, 1, 1, 1), ndf=8, nz=16)
CONFIG = RunConfig(abnormal_class="3", model="gannext", n_train=64, epochs=2, batch_size=16, options=NARROW, device="cpu")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, run(CONFIG, out, progress=False)


def test_a_run_leaves_everything_that_later_questions_need(finished):
    out, metrics = finished
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "log.csv", "manifest.json", "metrics.json", "model", "picture.png", "scores.csv"]
    assert json.loads((out / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    for name in ("auroc", "auroc_ci", "n_normal", "n_abnormal", "seed", "baselines", "false_alarm_rate", "threshold"): assert name in metrics
    assert metrics["n_abnormal"] == 183 and set(metrics["baselines"]) == {"knn", "pca"}
    assert len((out / "log.csv").read_text().splitlines()) == 3
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["splits"]["train"]["n"] == 64 and manifest["splits"]["test"]["n_abnormal"] == 183


def test_a_finished_run_is_read_not_repeated(finished):
    out, metrics = finished
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert run(CONFIG, out)["auroc"] == metrics["auroc"]
    assert run(replace(CONFIG, device="auto"), out)["auroc"] == metrics["auroc"]
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_a_run_that_was_cut_short_ends_with_the_same_numbers(finished, tmp_path):
    class PowerCut(Exception): pass

    def cut(row): raise PowerCut
    with pytest.raises(PowerCut): run(CONFIG, tmp_path / "half", progress=False, on_epoch=cut)
    assert (tmp_path / "half" / "checkpoint.safetensors").exists()
    metrics = run(CONFIG, tmp_path / "half", progress=False)
    assert metrics["auroc"] == finished[1]["auroc"] and metrics["threshold"] == finished[1]["threshold"]
    assert (tmp_path / "half/model/model.safetensors").read_bytes() == (finished[0] / "model/model.safetensors").read_bytes()


@pytest.mark.parametrize("change, fault", [
    (dict(dataset="digitz"), "unknown data set"), (dict(abnormal_class="twelve"), "unknown class"), (dict(isize=48), "32, 64, 128 or 256"),
    (dict(dataset="folder", root="no-such-place"), "not at hand"), (dict(epochs=0), "0 epochs train nothing"),
    (dict(batch_size=65), "larger than the 64"), (dict(model="gan"), "unknown model"),
    (dict(device="tpu"), "unknown device"), (dict(precision="fp8"), "unknown precision"), (dict(baselines=("kmn",)), "unknown baseline"),
    (dict(options=dict(wobble=3)), "unknown option"), (dict(recipe="secret"), "unknown recipe"), (dict(size="huge"), "unknown size"),
])
def test_what_is_wrong_shows_before_anything_is_written(tmp_path, change, fault):
    with pytest.raises(InputError, match=fault) as e: run(replace(CONFIG, **change), tmp_path / "out")
    assert "\n" not in str(e.value) and not (tmp_path / "out").exists()


def test_a_folder_belongs_to_one_run(finished, tmp_path):
    with pytest.raises(InputError, match="another run .seed 0, not 7"): claim(finished[0], replace(CONFIG, seed=7))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="no run of anogan"): claim(tmp_path, CONFIG)
    with pytest.raises(InputError, match="no run of anogan"): claim(tmp_path / "notes.txt", CONFIG)
    assert claim(finished[0], CONFIG) and not claim(tmp_path / "new", CONFIG)


def test_a_folder_of_good_images_alone_has_no_auroc(tmp_path):
    from PIL import Image
    good = tmp_path / "good"
    good.mkdir()
    for i in range(40): Image.new("L", (32, 32), 100 + i).save(good / f"{i:02}.png")
    config = RunConfig(dataset="folder", root=str(good), model="gannext", epochs=1, batch_size=8, options=NARROW, device="cpu")
    metrics = run(config, tmp_path / "out", progress=False)
    assert metrics["auroc"] is None and metrics["versus_best_baseline"] is None
    assert "no abnormal test images" in verdict(metrics)


def test_results_about_other_images_are_not_handed_over(tmp_path):
    "A folder of one's own can change, or another one be named: then a finished run is not the answer, and one on its way does not go on."
    from PIL import Image
    def folder(name, shade):
        (tmp_path / name).mkdir()
        for i in range(24): Image.new("L", (32, 32), shade + i).save(tmp_path / name / f"{i:02}.png")
        return RunConfig(dataset="folder", root=str(tmp_path / name), model="gannext", epochs=1, batch_size=8, options=NARROW, device="cpu")
    one, other, out = folder("one", 60), folder("other", 160), tmp_path / "out"
    run(one, out, progress=False)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    for change in ("another root", "finished, an image less", "on its way, an image less"):
        if change == "finished, an image less": (tmp_path / "one/07.png").unlink()
        if change == "on its way, an image less": (out / "metrics.json").unlink()
        with pytest.raises(InputError, match="begun with other images"): run(other if change == "another root" else one, out, progress=False)
    assert before == {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} | {"metrics.json": before["metrics.json"]}


def test_images_are_counted_at_the_threshold(finished):
    metrics, labels = finished[1], read_scores(finished[0] / "scores.csv")["label"]
    flagged = read_scores(finished[0] / "scores.csv")["gannext"].double() > metrics["threshold"]
    assert f"{int(flagged[labels == 0].sum())} of {int((labels == 0).sum())} normal images flagged" in counted(metrics)
    assert f"{int((~flagged)[labels == 1].sum())} of {int((labels == 1).sum())} abnormal ones missed" in counted(metrics)


def test_the_verdict_without_baselines(finished):
    metrics = finished[1] | dict(baselines={}, versus_best_baseline=None)
    assert verdict(metrics).startswith("AUROC: gannext") and "\n" not in verdict(metrics)


@pytest.mark.parametrize("ours, low, high, says", [
    (0.71, -0.29, -0.21, "gannext loses to knn: -0.250 [-0.290, -0.210]"),
    (0.95, -0.05, 0.03, "gannext is level with knn: -0.010 [-0.050, +0.030]"),
    (0.99, 0.01, 0.05, "gannext beats knn: +0.030 [+0.010, +0.050]"),
])
def test_the_verdict_names_the_winner(ours, low, high, says):
    "Side by side with intervals, and plainly when the detector loses."
    area = lambda value: dict(auroc=value, auroc_ci=[value - 0.02, min(1, value + 0.01)])
    metrics = dict(model="gannext", **area(ours), baselines=dict(knn=area(0.96), pca=area(0.8)),
                   versus_best_baseline=dict(name="knn", difference=ours - 0.96, low=low, high=high, z=0, p=0))
    first, second = verdict(metrics).splitlines()
    assert first == f"AUROC: gannext {ours:.3f} [{ours - 0.02:.3f}, {min(1, ours + 0.01):.3f}], knn 0.960 [0.940, 0.970], pca 0.800 [0.780, 0.810]"
    assert second == says


def test_tensorboard_gets_losses_and_pictures_and_disturbs_nothing(finished, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    metrics = run(CONFIG, tmp_path / "shown", progress=False, display=True)
    events = accumulator.EventAccumulator(str(tmp_path / "shown" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("con")] == [event.step for event in events.Images("rebuilt")] == [1, 2]
    assert {"images", "rebuilt", "heat"} == set(events.Tags()["images"])
    assert metrics["auroc"] == finished[1]["auroc"] and metrics["threshold"] == finished[1]["threshold"]


def test_peeking_leaves_training_as_it_was():
    data, detector = prepare(CONFIG, progress=False)
    before = {name: t.clone() for name, t in detector.generator.state_dict().items()}
    detector.generator.train()
    peek(detector, data.val.stack()[:3])
    assert detector.generator.training
    assert all(torch.equal(t, before[name]) for name, t in detector.generator.state_dict().items())


def test_the_display_without_tensorboard_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="anogan.log."): run(CONFIG, tmp_path / "out", display=True)
    assert not (tmp_path / "out").exists()


def test_prepare_takes_the_data_sets_channels():
    data, detector = prepare(CONFIG, progress=False)
    assert data.channels == detector.channels == 1 and len(data.train) == 64
