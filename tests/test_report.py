"The report on sweeps that nobody trained: its numbers against SciPy, its page against a parser, and what is missing in it."
import json
from dataclasses import asdict
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import t, ttest_rel

from anogan.data import ImageSet
from anogan.errors import InputError
from anogan.evaluation import delong_test, evaluate_scores, mean_sd
from anogan.experiments import RunConfig, label, write_json, write_scores
from anogan.report import Table, Text, areas, best_baseline, collect, compare, mean_row, methods_table, page, read_runs, write_report

LABELS = torch.tensor([0] * 30 + [1] * 20)
SKILL = dict(anotrans=1.0, gannext=1.5, knn=0.8, pca=0.2)
PARTS = ("a<b", "b|c", "c")


def scores_of(name, part, seed):
    random = torch.Generator().manual_seed(100 * PARTS.index(part) + seed)
    noise = torch.randn(50, generator=random) + 0.3 * torch.randn(50, generator=random.manual_seed(sum(map(ord, name)) + seed))
    return noise + SKILL[name] * (1 + 0.3 * PARTS.index(part)) * LABELS


def write_run(folder, config, part):
    folder.mkdir()
    seen = {name: scores_of(name, part, config.seed) for name in (config.model, "knn", "pca")}
    figures = {name: evaluate_scores(values, LABELS, 1.0) for name, values in seen.items()}
    metrics = figures.pop(config.model) | dict(dataset="digits", abnormal_class=part, model=config.model, seed=config.seed, epochs=2, n_train=100,
                                               seconds=3.0 + config.seed, parameters=1234567, flops=12_300_000, baselines=figures,
                                               versus_best_baseline=None, environment=dict(python="3.12", device="cpu"))
    write_json(folder / "metrics.json", metrics)
    (folder / "log.csv").write_text("epoch,con,loss_d,seconds,event\n1,0.5,1.4,1.0,\n2,0.4,1.3,1.0,discriminator collapsed\n")
    write_scores(folder / "scores.csv", ImageSet(torch.zeros(50, 1, 8, 8, dtype=torch.uint8), LABELS, list(range(50)), isize=8, channels=1), seen)
    Image.new("RGB", (60, 40), "white").save(folder / "picture.png")


@pytest.fixture
def folder(tmp_path):
    "Three parts, two models, two seeds."
    cells = {}
    for part in PARTS:
        for model in ("anotrans", "gannext"):
            for seed in (0, 1):
                config = RunConfig(abnormal_class=part, model=model, seed=seed)
                cells[label(config)] = asdict(config)
                write_run(tmp_path / label(config), config, part)
    write_json(tmp_path / "sweep.json", dict(cells=cells, faults={}))
    return tmp_path


def test_the_numbers_are_scipys(folder):
    results = collect(read_runs(folder))
    assert list(results) == ["anotrans (recommended)", "gannext (recommended)", "knn", "pca"]
    a, g, knn, _ = results.values()
    parts, seeds, values = areas(a)
    assert (tuple(parts), seeds) == (PARTS, [0, 1])
    wanted = [[evaluate_scores(scores_of("anotrans", part, seed), LABELS)["auroc"] for seed in (0, 1)] for part in PARTS]
    assert np.allclose(values, wanted)
    found, t_test = compare(a, g), ttest_rel(values.mean(1), areas(g)[2].mean(1))
    assert np.allclose((found.z, found.p), (t_test.statistic, t_test.pvalue))
    mean, interval, n = mean_row(a)
    middle, half = values.mean(), t.ppf(0.975, 2) * values.mean(1).std(ddof=1) / 3 ** 0.5
    assert mean == f"{middle:.3f} ± {mean_sd(wanted)[1]:.3f}" and interval == f"[{middle - half:.3f}, {min(1, middle + half):.3f}]" and n == 6
    assert best_baseline(results) == "knn"


def test_one_part_is_compared_image_by_image(folder):
    a, g, *_ = collect([run for run in read_runs(folder) if run.part == "c"]).values()
    wanted = delong_test(scores_of("anotrans", "c", 0), scores_of("gannext", "c", 0), LABELS)
    assert abs(compare(a, g).p - wanted.p) < 1e-4 and abs(compare(a, g).low - wanted.low) < 1e-6


def test_only_what_both_have_is_compared(folder):
    results = collect([run for run in read_runs(folder) if (run.method, run.part) != ("gannext (recommended)", "c") and (run.config.model, run.config.seed)
                       != ("anotrans", 1)])
    a, g, *_ = results.values()
    assert areas(a, g)[:2] == (list(PARTS[:2]), [0]) == areas(g, a)[:2]
    assert compare(a, {"other": g["a<b"]}) is None
    assert [row[3] for row in methods_table(results).rows] == [3, 4, 3, 3]


class Parser(HTMLParser):
    "What a page holds: pictures, texts, and tags that are not closed."
    def __init__(self):
        super().__init__()
        self.pictures, self.texts, self.open, self.links = [], [], [], []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "img": self.pictures.append(attributes)
        elif tag != "meta": self.open.append(tag)
        self.links += [value for name, value in attributes.items() if name in ("href", "src") and not value.startswith("data:")]

    def handle_endtag(self, tag): assert self.open.pop() == tag

    def handle_data(self, data): self.texts.append(data)


def test_the_page_stands_alone_and_every_picture_has_its_text(folder):
    path = write_report(folder)
    parser = Parser()
    parser.feed(path.read_text(encoding="utf-8"))
    assert parser.open == [] and parser.links == []
    assert len(parser.pictures) == 3 + 6  # bars, ROC curves, training; a picture per part and model, of the first seed
    assert all(picture["src"].startswith("data:image/png;base64,") and len(picture["alt"]) > 60 for picture in parser.pictures)
    said = "\n".join(parser.texts)
    for text in ("12 of 12 runs are finished.", "a<b", "gannext (recommended)", "1,234,567", "12.3", "3.5 ± "): assert text in said, text


def test_markdown_has_the_same_tables(folder):
    text = write_report(folder).with_suffix(".md").read_text(encoding="utf-8")
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 5 and "b\\|c" in text and "data:" not in text
    for lines in tables: assert len({line.replace("\\|", "").count("|") for line in lines}) == 1


def test_what_is_missing_stands_first(folder):
    plan = json.loads((folder / "sweep.json").read_text())
    first, second, *_ = plan["cells"]
    for name in (first, second): (folder / name / "metrics.json").unlink()
    write_json(folder / "sweep.json", plan | dict(faults={first: "Traceback (most recent call last):\n  ...\nOSError: the disk is full\n"}))
    lines = write_report(folder).with_suffix(".md").read_text(encoding="utf-8").split("\n\n")
    assert lines[1] == "10 of 12 runs are finished."
    assert f"| {first} | OSError: the disk is full |" in lines[2] and f"| {second} | not yet run |" in lines[2]


def test_nothing_finished_or_no_sweep_is_one_sentence(folder, tmp_path_factory):
    for path in folder.glob("*/metrics.json"): path.unlink()
    with pytest.raises(InputError, match="nothing to report"): write_report(folder)
    with pytest.raises(InputError, match="holds no sweep"): write_report(tmp_path_factory.mktemp("empty"))


def test_a_data_set_without_abnormal_images_has_no_comparison(folder):
    runs = read_runs(folder)
    for run in runs: run.metrics["auroc"] = None
    assert collect(runs) == {}


def test_blocks_escape_what_they_show():
    assert page([Text("<script>")], "a & b").count("<script>") == 0
    assert Table(("a", "b"), [("<i>", "&")]).html().count("&lt;i&gt;") == 1
