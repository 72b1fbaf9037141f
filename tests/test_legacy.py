"The released evaluation: it peeks as the released code does, says so, and leaves no trace."
import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from typer.testing import CliRunner

from anogan.cli import app
from anogan.data import load_dataset
from anogan.detector import GENERATORS, Detector
from anogan.errors import InputError
from anogan.experiments import RunConfig, run, verdict
from anogan.legacy import LegacyEval, batch_terms, in_mode, min_max

NARROW = {"anotrans": dict(dim=8), "gannext": dict(dim=8, depths=(1, 1, 1, 1)), "skipganomaly": dict(ngf=4), "sagan": dict(ngf=4)}
CONFIG = RunConfig(abnormal_class="3", model="gannext", n_train=48, epochs=3, batch_size=16, baselines=("pca",), device="cpu",
                   options=dict(ndf=8, nz=16, drop_path=0.2, **NARROW["gannext"]))
PEEKING = replace(CONFIG, legacy_eval=True)


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits", abnormal_class=3, n_train=48)


@pytest.fixture(scope="module")
def test(data):
    "40 normal and 24 abnormal images."
    return data.test.subset(torch.cat([(data.test.labels == label).nonzero()[:n, 0] for label, n in ((0, 40), (1, 24))]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, run(PEEKING, out, progress=False)


def narrow(model="gannext", **options):
    return Detector(model, batch_size=16, channels=1, device="cpu", progress=False, recipe="published", ndf=8, **{"epochs": 2, **NARROW[model], **options})


def test_the_bracket_puts_everything_back_even_after_an_error():
    network = nn.Sequential(nn.BatchNorm1d(3), nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3)), nn.Linear(3, 3))
    network[1].eval()  # a part in another mode than the whole
    modes, state, x = [m.training for m in network.modules()], deepcopy(network.state_dict()), torch.randn(8, 3)
    for training in (True, False):
        torch.manual_seed(4)
        expected = torch.rand(2)
        torch.manual_seed(4)
        with pytest.raises(ZeroDivisionError), in_mode(training, network):
            assert all(m.training == training for m in network.modules())
            assert not network(x).requires_grad
            raise ZeroDivisionError
        assert torch.equal(torch.rand(2), expected) and torch.is_grad_enabled()
        assert [m.training for m in network.modules()] == modes
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("model", GENERATORS)
def test_networks_threshold_and_scores_never_notice(model, data, test):
    plain, watched = narrow(model), narrow(model)
    plain.fit(data.train, data.val)
    watched.fit(data.train, data.val, on_epoch=LegacyEval(watched, test))
    for part in ("generator", "discriminator"):
        a, b = (getattr(d, part).state_dict() for d in (plain, watched))
        assert all(torch.equal(a[name], b[name]) for name in a), part
    assert (plain.threshold, plain.heat_scale, plain.calibration) == (watched.threshold, watched.heat_scale, watched.calibration)
    assert torch.equal(plain.score(test), watched.score(test))


def test_a_run_that_was_also_judged_as_released_is_otherwise_the_same_run(whole, tmp_path):
    out, metrics = whole
    honest = run(CONFIG, tmp_path / "honest", progress=False)
    assert "legacy" not in honest and set(metrics) - set(honest) == {"legacy"}
    for name in set(honest) - {"seconds", "environment"}: assert honest[name] == metrics[name], name
    for name in ("model/model.safetensors", "model/detector.json", "manifest.json"):
        assert (out / name).read_bytes() == (tmp_path / "honest" / name).read_bytes()
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "log.csv", "manifest.json", "metrics.json", "model", "picture.png", "scores.csv"]


def test_the_leaky_figure_stands_beside_the_honest_one(whole):
    legacy, text = whole[1]["legacy"], verdict(whole[1])
    assert legacy == json.loads((whole[0] / "metrics.json").read_text())["legacy"]
    assert len(legacy["by_epoch"]) == 3 and legacy["auroc"] == max(legacy["by_epoch"]) == legacy["by_epoch"][legacy["epoch"] - 1]
    assert legacy["last_epoch"] == legacy["by_epoch"][-1]
    assert f"as released {legacy['auroc']:.3f}, but this peeked" in text and f"judged honestly: {legacy['eval_mode']:.3f}" in text
    assert text.startswith("AUROC: gannext") and "peeked" not in verdict({k: v for k, v in whole[1].items() if k != "legacy"})


def test_the_figures_are_those_of_plain_loops(data, test):
    detector = narrow()
    legacy = LegacyEval(detector, test)
    detector.fit(data.train, data.val, on_epoch=legacy)
    G, D = (deepcopy(network).train() for network in (detector.generator, detector.discriminator))
    expected = dict(training=[], eval=[])
    for i in range(0, 64, 16):
        x = test.stack()[i:i + 16]
        with torch.no_grad(): fake = G(x); terms = (x - fake).square().mean((1, 2, 3)), (D(x)[1] - D(fake)[1]).square().mean(1)
        expected["training"] += (0.95 * terms[0] + 0.05 * terms[1]).tolist()
    terms = detector.terms(test)
    expected["eval"] = 0.95 * terms["rec"] + 0.05 * terms["lat"]
    report = legacy.report()
    assert report["last_epoch"] == pytest.approx(roc_auc_score(test.labels, expected["training"]), abs=2e-3)
    assert report["eval_mode"] == pytest.approx(roc_auc_score(test.labels, expected["eval"]), abs=2e-3)
    assert legacy.scores().min() == 0 and legacy.scores().max() == 1
    assert torch.equal(legacy.scores(), legacy.scores())  # nothing it does moves the next test


def test_all_normal_images_come_first_however_the_data_set_is_ordered(test):
    other = test.subset(range(63, -1, -1)).subset([*range(24, 64), *range(24)][::-1])  # the abnormal ones in front
    assert other.labels.tolist() == [1] * 24 + [0] * 40
    a, b = LegacyEval(narrow(dcgan_init=False), test), LegacyEval(narrow(dcgan_init=False), other)
    assert torch.equal(a.labels, b.labels) and a.labels.tolist() == [0] * 40 + [1] * 24
    torch.testing.assert_close(a.scores(), b.scores())


def test_terms_come_in_the_order_asked_for(test):
    detector = narrow(dcgan_init=False)
    networks, order = (detector.generator, detector.discriminator), torch.randperm(64)
    as_they_are, mixed = (batch_terms(*networks, test, n, o) for n, o in ((7, None), (64, order)))
    for name in ("rec", "lat"): torch.testing.assert_close(as_they_are[name][order], mixed[name])


def test_scaling_keeps_the_order_and_bears_equal_scores():
    scores = torch.randn(50)
    assert torch.equal(min_max(scores).argsort(), scores.argsort())
    assert torch.equal(min_max(torch.full((4,), 0.3)), torch.zeros(4))


class PowerCut(Exception): pass


def cut(*_): raise PowerCut


@pytest.mark.parametrize("tested", [True, False], ids=["cut after the test", "cut between the epoch and its test"])
def test_a_run_that_was_cut_short_reports_what_the_whole_run_does(whole, tmp_path, tested, monkeypatch):
    with monkeypatch.context() as patched, pytest.raises(PowerCut):
        if not tested: patched.setattr(LegacyEval, "__call__", cut)
        run(PEEKING, tmp_path / "half", progress=False, on_epoch=cut)
    assert (tmp_path / "half/legacy.json").exists() == tested
    assert run(PEEKING, tmp_path / "half", progress=False)["legacy"] == whole[1]["legacy"]


def test_figures_that_were_lost_are_one_sentence(tmp_path):
    def after_two(row):
        if row["epoch"] == 2: raise PowerCut
    with pytest.raises(PowerCut): run(PEEKING, tmp_path / "half", progress=False, on_epoch=after_two)
    damaged = [(content, "legacy.json is damaged") for content in ("{", "[" * 100_000, "[1]", '{"1": "x"}')]
    for content, fault in (*damaged, ('{"2": 0.5}', "no test of epoch 1")):
        (tmp_path / "half/legacy.json").write_text(content)
        with pytest.raises(InputError, match=fault) as e: run(PEEKING, tmp_path / "half", progress=False)
        assert "\n" not in str(e.value)


def test_it_has_to_be_there_from_the_first_epoch_on(data, test):
    detector = narrow(epochs=1)
    legacy = LegacyEval(detector, test)
    with pytest.raises(InputError, match="saw 0 epochs"): legacy.report()
    detector.fit(data.train, data.val)
    with pytest.raises(InputError, match="saw 0 epochs, and 1 were trained"): legacy.report()


def test_one_kind_of_test_images_is_refused_before_anything_is_written(tmp_path):
    from PIL import Image
    (tmp_path / "good").mkdir()
    for i in range(40): Image.new("L", (32, 32), 100 + i).save(tmp_path / "good" / f"{i:02}.png")
    with pytest.raises(InputError, match="compares two classes, but 0 of the"):
        run(replace(PEEKING, dataset="folder", abnormal_class=None, n_train=None, root=str(tmp_path / "good")), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_an_honest_run_is_not_judged_afterwards(whole):
    with pytest.raises(InputError, match="another run .legacy_eval True, not False"): run(CONFIG, whole[0])


def test_the_command_line_asks_for_it_by_name(tmp_path):
    line = "train --model gannext --dim 8 --ndf 8 --n-train 32 --abnormal-class 0 --epochs 1 --batch-size 16 --device cpu --legacy-eval --out"
    result = CliRunner().invoke(app, [*line.split(), str(tmp_path / "run")])
    assert result.exit_code == 0 and "but this peeked: the best of 1 epochs" in result.stdout and "judged honestly" in result.stdout
    assert "legacy" in json.loads((tmp_path / "run/metrics.json").read_text())
