"The page for the plant: its counts against SciPy and by hand, what it never leaves out, and the command that writes it."
import json
import re

import pytest
import torch
from PIL import Image
from scipy.stats import beta
from typer.testing import CliRunner

from anogan.cli import app
from anogan.data import ImageSet
from anogan.detector import Detector
from anogan.errors import InputError
from anogan.plant import WORST, Share, errors, plant_page, ranking, spot, write_plant_page

METRICS = dict(auroc=0.75, auroc_ci=[0.7, 0.8], n_normal=40, n_abnormal=20, false_alarm_rate=0.05, tpr_at_threshold=0.6, model="gannext",
               baselines=dict(knn=dict(auroc=0.8)), versus_best_baseline=dict(name="knn", difference=-0.05, low=-0.08, high=-0.02))


@pytest.fixture(scope="module")
def detector():
    "It has learnt nothing; that is enough for a page."
    images = torch.rand(24, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    made = Detector("gannext", channels=1, recipe="defects", device="cpu", progress=False, dim=8, ndf=8, nz=16)
    return made.remember(images).calibrate(images)


@pytest.fixture
def folder(tmp_path):
    "Fifteen grey cells, the last of them striped."
    (tmp_path / "cells").mkdir()
    for i in range(15): Image.new("L", (32, 32), 120 + i).save(tmp_path / f"cells/c{i:02}.png")
    Image.effect_noise((32, 32), 200).save(tmp_path / "cells/c<odd>.png")
    return tmp_path / "cells"


@pytest.fixture
def run(detector, tmp_path):
    detector.save(tmp_path / "run/model")
    (tmp_path / "run/metrics.json").write_text(json.dumps(METRICS))
    return tmp_path / "run"


@pytest.mark.parametrize(("hits", "n"), [(0, 7), (7, 7), (3, 60), (1, 1000)])
def test_the_interval_is_clopper_and_pearsons(hits, n):
    low, high = Share(hits, n).interval
    assert low == pytest.approx(beta.ppf(0.025, hits, n - hits + 1) if hits else 0, abs=1e-6)
    assert high == pytest.approx(beta.ppf(0.975, hits + 1, n - hits) if hits < n else 1, abs=1e-6)


def test_both_errors_are_counts():
    assert errors(METRICS) == (Share(2, 40), Share(8, 20))
    for kind in ("n_normal", "n_abnormal"):
        with pytest.raises(InputError, match="nobody knows how often"): errors(METRICS | {kind: 0})


@pytest.mark.parametrize(("low", "high", "outcome"), [(0.01, 0.1, "ahead"), (-0.1, 0.1, "not ahead"), (-0.1, -0.01, "behind")])
def test_a_rival_that_wins_is_said_to_win(low, high, outcome):
    assert ranking(METRICS | dict(versus_best_baseline=dict(name="knn", low=low, high=high))).endswith(f"the detector is {outcome}.")


@pytest.mark.parametrize(("y", "x", "place"), [(0, 0, "top left"), (15, 15, "centre"), (31, 15, "bottom centre"), (15, 31, "middle right")])
def test_the_hottest_spot_in_words(y, x, place):
    heat = torch.zeros(32, 32)
    heat[y, x] = 1
    assert spot(heat) == place


def test_the_command_writes_the_page(run, folder, detector):
    out = run.parent / "page.html"
    done = CliRunner().invoke(app, ["plant", str(run), str(folder), "--out", str(out), "--device", "cpu"])
    assert done.exit_code == 0 and f"page in {out}" in done.stdout, done.output
    page = out.read_text(encoding="utf-8")
    assert "<h1>16 images checked, " in page and "http" not in page and page.count("<img alt=") == page.count("<img") == 1
    assert "2 of 40 good images" in page and "8 of 20 defective images" in page and "of every 10 defective images about 4 pass unseen" in page
    listed = re.findall(r">([^<>]*\.png)</td>", page)
    assert len(listed) == WORST and listed[0] == "c&lt;odd&gt;.png"


def test_no_flagged_cell_is_left_out(detector):
    noisy = ImageSet(torch.randint(256, (20, 1, 32, 32), dtype=torch.uint8), ids=[f"n{i}" for i in range(20)], isize=32, channels=1)
    flagged = int(detector.predict(noisy).sum())
    page = plant_page(detector, noisy, METRICS, noisy.subset([0]))
    assert flagged > WORST and f"20 images checked, {flagged} flagged" in page and "What it does not see" in page
    rest = re.search(r"Flagged too, by falling score: (.*?)\.<", page)[1].split(", ")
    assert len(rest) == flagged - WORST and not set(rest) & set(re.findall(r">(n\d+)</td>", page))


def test_what_nobody_can_say_is_one_sentence(run, folder):
    page = run.parent / "page.html"
    with pytest.raises(InputError, match="holds no metrics.json"): write_plant_page(run / "model", folder, page)
    with pytest.raises(InputError, match="no images in the folder"): write_plant_page(run, run, page)
    with pytest.raises(InputError, match="cannot write"): write_plant_page(run, folder, run / "no/page.html", "cpu")
    (run / "metrics.json").write_text(json.dumps(METRICS | dict(n_abnormal=0)))
    done = CliRunner().invoke(app, ["plant", str(run), str(folder), "--out", str(page)])
    assert done.exit_code == 2 and "nobody knows" in done.stderr and not page.exists()
