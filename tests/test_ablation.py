"What the chapter on ablations cannot show in its small example: pairs over classes, tables that lack a run, and the committed rows."
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import ttest_rel

from anogan.ablation import PARTS, VARIANTS, VIEWS, ablation_table, gain, gain_figure, gain_text, near_image_without, near_patch_without, train_variant
from anogan.data import ImageSet, load_dataset
from anogan.detector import Detector
from anogan.errors import InputError
from anogan.evaluation import mean_difference
from anogan.memory import Memory, standing_out
from anogan.trainer import TERMS

ROOT = Path(__file__).parent.parent
SMALL = dict(model="gannext", isize=32, epochs=1, batch_size=16, device="cpu", precision="fp32", dim=8, depths=(1, 1, 1, 1), ndf=8, nz=16)


def made_up(seeds=3, classes=("0", "1"), variants=("nothing", "noise")):
    random = np.random.default_rng(0)
    return [dict(model=model, variant=variant, abnormal_class=c, seed=seed, auroc=float(random.uniform(0.6, 1)),
                 terms={term: float(random.uniform(0.4, 1)) for term in TERMS})
            for model in ("anotrans", "gannext") for variant in variants for c in classes for seed in range(seeds)]


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits", abnormal_class=8, n_train=48)


@pytest.mark.parametrize("term", ["score", "rec"])
def test_a_gain_is_the_paired_test_over_seeds_after_averaging_over_classes(term):
    rows = made_up()
    def by_seed(variant):
        def value(r): return r["auroc"] if term == "score" else r["terms"][term]
        return [np.mean([value(r) for r in rows if (r["model"], r["variant"], r["seed"]) == ("gannext", variant, seed)]) for seed in range(3)]
    found, oracle = gain(rows, "gannext", "noise", term), ttest_rel(by_seed("nothing"), by_seed("noise"))
    assert found.difference == pytest.approx(np.mean(by_seed("nothing")) - np.mean(by_seed("noise")))
    assert found.p == pytest.approx(oracle.pvalue) and [found.low, found.high] == pytest.approx([*oracle.confidence_interval()])


def test_with_a_single_seed_the_classes_are_the_sample():
    rows = [r for r in made_up() if r["seed"] == 0]
    whole, without = ({r["abnormal_class"]: r["auroc"] for r in rows if (r["model"], r["variant"]) == ("gannext", v)} for v in ("nothing", "noise"))
    assert gain(rows, "gannext", "noise") == mean_difference([whole[c] - without[c] for c in sorted(whole)])
    with pytest.raises(InputError, match="says nothing about others"): gain([r for r in rows if r["abnormal_class"] == "1"], "gannext", "noise")


def test_the_order_of_the_rows_does_not_matter():
    rows = made_up()
    assert gain(rows, "gannext", "noise") == gain(rows[::-1], "gannext", "noise")


def test_a_run_without_a_partner_is_refused():
    rows = [r for r in made_up() if (r["variant"], r["abnormal_class"], r["seed"]) != ("noise", "1", 2)]
    with pytest.raises(InputError, match=r"\(2, '1'\).*has no partner"): gain(rows, "gannext", "noise")


def test_the_table_has_a_line_for_each_generator_and_ingredient():
    lines = ablation_table(made_up(), ("score", "rec")).splitlines()
    assert len(lines) == 2 + 4 and all(line.count("|") == lines[0].count("|") for line in lines)
    assert "it adds to rec" in lines[0] and lines[2].endswith("|  |  |") and gain_text(gain(made_up(), "gannext", "noise")) in lines[5]


def test_the_figure_says_every_gain_in_words():
    _, alt = gain_figure(made_up())
    assert all(gain_text(gain(made_up(), model, "noise")) in alt for model in ("anotrans", "gannext"))


def test_where_all_differences_are_the_same_no_interval_is_made_up():
    rows = made_up(variants=("nothing",))
    rows += [dict(r, variant="noise") for r in rows]
    assert gain_text(gain(rows, "gannext", "noise")) == "+0.000, no spread" and "no spread" in ablation_table(rows)
    fig, alt = gain_figure(rows)
    low, high = fig.axes[0].get_xlim()
    assert "no spread" in alt and high - low < 0.5


@pytest.mark.parametrize(("left_out", "field", "value"), [("noise", "noise", 0.0), ("second task", "contrast", False), ("drawn map", "keep_map", False)])
def test_a_variant_is_the_recipe_with_one_field_changed(data, left_out, field, value):
    changed, whole = (train_variant(name, data, seed=0, **SMALL).recipe for name in (left_out, "nothing"))
    assert {name: v for name, v in vars(changed).items() if v != getattr(whole, name)} == {field: value}


def test_without_its_adversarial_loss_g_is_trained_by_reconstruction_alone(data):
    weights = train_variant("adversarial loss of G", data, seed=0, **SMALL).recipe.weights
    assert (weights.adv, weights.lat) == (0, 0) and weights.con > 0


def test_without_training_and_without_the_gan_the_generator_is_as_drawn(data):
    drawn = Detector(seed=0, channels=1, **SMALL)
    for name, same in (("training", True), ("the GAN", False)):
        detector = train_variant(name, data, seed=0, **SMALL)
        assert all(torch.equal(a, b) for a, b in zip(detector.generator.state_dict().values(), drawn.generator.state_dict().values()))
        weights = [torch.equal(a, b) for a, b in zip(detector.discriminator.parameters(), drawn.discriminator.parameters())]
        assert all(weights) == same and detector.threshold is not None and detector.history == []


def test_the_discriminator_without_the_gan_takes_as_many_steps_as_with_one(data):
    with_it, without = (train_variant(name, data, seed=0, **SMALL).discriminator.layers[2][1] for name in ("nothing", "the GAN"))
    assert int(with_it.num_batches_tracked) == 3 * 3 and int(without.num_batches_tracked) == 2 * 3  # real, fake and views; views and real


def test_the_map_stays_as_drawn_in_every_variant_but_its_own(data):
    drawn = Detector(seed=0, channels=1, **SMALL).discriminator.layers[:2].state_dict()
    for name in VARIANTS:
        kept = train_variant(name, data, seed=0, **SMALL).discriminator.layers[:2].state_dict()
        assert all(torch.equal(kept[key], t) for key, t in drawn.items()) == (name != "drawn map")


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_near_patch_is_what_the_memory_computes_less_one_thought(data, part):
    detector = train_variant("training", data, seed=0, **SMALL)
    known, new = data.train.stack(), data.test.stack()[:20]
    memory = Memory.fit(detector.discriminator, known.split(256))
    look = Memory.look(detector.discriminator, known)["near_patch"], Memory.look(detector.discriminator, new)["near_patch"]
    if part == "worst place": expected = memory.by_place(memory.read(detector.discriminator, new)["near_patch"], "near_patch").amax(dim=1)
    else: expected = standing_out(torch.stack([torch.cdist(b, a).amin(dim=1) for a, b in zip(*(t.transpose(0, 1) for t in look))], dim=1))
    torch.testing.assert_close(near_patch_without(part, detector.discriminator, known, new), expected, rtol=1e-2, atol=1e-4)


def test_near_image_less_one_of_its_thoughts_is_a_memory_that_never_had_it():
    random = torch.Generator().manual_seed(0)
    known, new = (torch.rand(n, 1, 32, 32, generator=random) * 2 - 1 for n in (60, 20))
    detector = Detector("gannext", channels=1, dim=4, ndf=4, nz=8, depths=(1, 1), device="cpu")
    memory = Memory.fit(detector.discriminator, known.split(32), ["near_image"], detector.projection)
    without = {part: near_image_without(part, memory, detector.discriminator, known, new) for part in VIEWS}
    plain = Memory.fit(detector.discriminator, known.split(32), ["near_image"])
    torch.testing.assert_close(without["no head"], plain.distances(detector.discriminator, new)["near_image"], rtol=2e-2, atol=1e-3)
    first = memory.by_place(memory.read(detector.discriminator, new)["near_image"], "near_image")[:, 0]
    torch.testing.assert_close(without["not turned"], first, rtol=2e-2, atol=1e-3)
    assert not torch.allclose(without["no head"], without["not turned"], rtol=2e-2)


def test_the_watcher_gets_the_detector_and_every_row(data):
    seen = []
    detector = train_variant("nothing", data, lambda *args: seen.append(args), seed=0, **SMALL)
    assert [args[0] is detector for args in seen] == [True] and [args[1] for args in seen] == detector.history


@pytest.mark.parametrize("name", ["digits", "elpv"])
def test_the_committed_ablation_has_every_variant_of_both_generators_over_three_seeds(name):
    rows = json.loads((ROOT / f"results/ablation-{name}.json").read_text())["rows"]
    for model in ("anotrans", "gannext"):
        for variant in VARIANTS:
            runs = [(r["seed"], r["abnormal_class"]) for r in rows if (r["model"], r["variant"]) == (model, variant)]
            assert len(runs) == len(set(runs)) and len({seed for seed, _ in runs}) >= 3
    assert ablation_table(rows)


def test_the_yardstick_learns_the_names_of_the_kinds_it_is_given():
    spec = importlib.util.spec_from_file_location("labels", ROOT / "benchmarks" / "labels.py")
    spec.loader.exec_module(labels := importlib.util.module_from_spec(spec))
    kinds = torch.arange(64) % 2 * 5                                                                       # dark T-shirts, bright sandals
    grain = torch.randint(0, 50, (64, 1, 32, 32), generator=torch.Generator().manual_seed(0))
    images = ImageSet((kinds[:, None, None, None] * 40 + grain).to(torch.uint8))
    network, head = labels.train(images.stack(), kinds, seed=0, epochs=8, batch_size=16)
    assert not network.training and torch.equal(head(labels.features(network, images)).argmax(dim=1), kinds)


def test_the_yardstick_and_the_trial_are_over_all_classes():
    named, tried = (json.loads((ROOT / f"results/fashion_mnist-{name}.json").read_text())["rows"] for name in ("labels", "tried"))
    assert [row["abnormal_class"] for row in named] == [*"0123456789"] and all(row["right_on_validation"] > 0.85 for row in named)
    assert {(row["abnormal_class"], row["seed"]) for row in tried if row["variant"] == "nothing"} == {(c, seed) for c in "0123456789" for seed in range(3)}
