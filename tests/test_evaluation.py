"""Metrics against scikit-learn and against their definitions, on inputs a notebook cell would not try."""
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import ttest_1samp
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from anogan.data import ImageSet, load_dataset
from anogan.detector import Detector
from anogan.errors import InputError
from anogan.evaluation import (BaseDetector, PairedTest, auroc, auroc_interval, average_precision, delong_test, evaluate_maps,
                               evaluate_scores, fpr_at_tpr, mean_difference, mean_sd, mid_ranks, peeking_gap, rates_at, threshold_from)

calm = settings(deadline=None, derandomize=True, database=None, max_examples=60)  # the same draws on every machine, however busy


@st.composite
def judged(draw, values=st.integers(-4, 4)):
    "Scores with many ties, and labels with both classes."
    n = draw(st.integers(2, 40))
    labels = draw(st.lists(st.integers(0, 1), min_size=n, max_size=n).filter(lambda y: 0 < sum(y) < len(y)))
    return np.array(draw(st.lists(values, min_size=n, max_size=n)), dtype=float), np.array(labels)


def pairs(scores, labels):
    "(abnormal, normal) matrix of wins, ties counting half."
    a, n = scores[labels == 1][:, None], scores[labels == 0][None]
    return (a > n) + 0.5 * (a == n)


@calm
@given(judged())
def test_agrees_with_all_pairs_and_with_scikit_learn(case):
    scores, labels = case
    assert auroc(scores, labels) == pytest.approx(pairs(scores, labels).mean(), abs=1e-12)
    assert auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert average_precision(scores, labels) == pytest.approx(average_precision_score(labels, scores), abs=1e-12)
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    for share in (0.5, 0.95, 1.0):
        assert fpr_at_tpr(scores, labels, share) == pytest.approx(fpr[np.argmax(tpr >= share - 1e-12)])


@calm
@given(judged(), st.sampled_from([1e-30, 1e-3, 1.0, 1e30]), st.floats(-2, 2))
def test_only_the_order_counts(case, scale, shift):
    scores, labels = case
    moved = scale * (scores + shift)
    assume(len(np.unique(moved)) == len(np.unique(scores)))  # a tiny shift may be rounded away
    for figure in (auroc, average_precision, fpr_at_tpr, auroc_interval):
        assert figure(moved, labels) == figure(scores, labels)
    assert auroc(np.exp(scores), labels) == auroc(scores, labels)
    assert auroc(torch.tensor(moved).float(), torch.tensor(labels)) == pytest.approx(auroc(moved, labels), abs=1e-12)


@pytest.mark.parametrize("change", [
    lambda s: s.astype(np.float16), lambda s: s.astype(np.int8), lambda s: (s - s.min()).astype(np.uint8), lambda s: s * 1e300, lambda s: s * 1e-300,
    lambda s: s * 5e-324, lambda s: s + 1e15, lambda s: s.tolist(), lambda s: torch.tensor(s).bfloat16(), lambda s: torch.tensor(s).half(),
    lambda s: torch.tensor(s, requires_grad=True), lambda s: torch.tensor(s.astype(np.int64)),
], ids=["float16", "int8", "uint8", "1e300", "1e-300", "subnormal", "offset", "list", "bfloat16", "half", "grad", "int64"])
def test_whatever_numbers_the_scores_are(change):
    rng = np.random.default_rng(4)
    scores, labels = rng.integers(-9, 10, 80).astype(float), rng.integers(0, 2, 80)
    moved = change(scores)
    expected, found = (evaluate_scores(s, labels, threshold_from(s, 0.5)) for s in (scores, moved))
    assert math.isfinite(found.pop("threshold")) and expected.pop("threshold") is not None
    assert found == expected
    assert delong_test(moved, scores, labels) == delong_test(scores, scores, labels)


@calm
@given(judged())
def test_swapped_labels_mirror_area_and_interval(case):
    scores, labels = case
    assert auroc(scores, 1 - labels) == pytest.approx(1 - auroc(scores, labels))
    assert auroc(-scores, labels) == pytest.approx(1 - auroc(scores, labels))
    low, high = auroc_interval(scores, labels)
    assert auroc_interval(-scores, labels) == pytest.approx((1 - high, 1 - low), abs=1e-9)


@calm
@given(judged(), st.floats(0.5, 0.99))
def test_interval_holds_the_area_and_grows_with_the_level(case, level):
    scores, labels = case
    low, high = auroc_interval(scores, labels, level)
    wider = auroc_interval(scores, labels, 0.995)
    assert 0 <= wider[0] <= low <= auroc(scores, labels) <= high <= wider[1] <= 1
    assert high - low > 0.01  # 40 images never settle anything


def test_interval_is_delong_on_the_logit_scale():
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=90) + np.repeat([0, 1], [60, 30]), np.repeat([0, 1], [60, 30])
    wins = pairs(scores, labels)
    variance = wins.mean(1).var(ddof=1) / 30 + wins.mean(0).var(ddof=1) / 60
    area, half = wins.mean(), 1.6448536269514722 * math.sqrt(variance) / (wins.mean() * (1 - wins.mean()))
    ends = [1 / (1 + math.exp(-(math.log(area / (1 - area)) + side * half))) for side in (-1, 1)]
    assert auroc_interval(scores, labels, level=0.9) == pytest.approx(ends, abs=1e-12)


@pytest.mark.parametrize("scores, area", [([1, 2, 3, 4], 1.0), ([4, 3, 2, 1], 0.0), ([1, 1, 1, 1], 0.5)])
def test_no_spread_is_not_certainty(scores, area):
    labels = [0, 0, 1, 1]
    low, high = auroc_interval(scores, labels)
    assert auroc(scores, labels) == area and high - low > 0.5
    def gap(t):  # Newcombe's equation: |area - t| = z · se(t), here with n0 = n1 = 2 and (n0 + n1)/2 - 1 = 1
        return abs(area - t) - 1.959963984540054 * math.sqrt(t * (1 - t) * (1 + (1 - t) / (2 - t) + t / (1 + t)) / 4)
    for end in (low, high): assert end == area or gap(end) == pytest.approx(0, abs=1e-9)


@calm
@given(judged(), st.randoms(use_true_random=False))
def test_paired_test_is_antisymmetric(case, random):
    scores, labels = case
    other = np.array([random.randint(-3, 3) for _ in scores], dtype=float)
    ab, ba = delong_test(scores, other, labels), delong_test(other, scores, labels)
    assert (ab.difference, ab.z, ab.p) == pytest.approx((-ba.difference, -ba.z, ba.p), abs=1e-9)
    assert (ab.low, ab.high) == pytest.approx((-ba.high, -ba.low), abs=1e-9)
    assert -1 <= ab.low <= ab.difference <= ab.high <= 1 and 0 <= ab.p <= 1
    assert ab.difference == pytest.approx(auroc(scores, labels) - auroc(other, labels), abs=1e-12)


def test_paired_test_is_calibrated_where_nothing_differs():
    rng, labels, small = np.random.default_rng(1), np.repeat([0, 1], 40), 0
    for _ in range(400):
        shared = rng.normal(size=80) + labels
        small += delong_test(shared + rng.normal(size=80), shared + rng.normal(size=80), labels).p < 0.05
    assert 0.02 < small / 400 < 0.09


def test_paired_test_without_spread_stays_finite():
    labels = [0, 0, 1, 1]
    same, opposite = delong_test([1, 2, 3, 4], [1, 2, 3, 5], labels), delong_test([1, 2, 3, 4], [4, 3, 2, 1], labels)
    assert (same.difference, same.z, same.p) == (0, 0, 1) and same.low == -same.high < -0.3
    assert opposite.difference == 1 and math.isfinite(opposite.z) and 1e-4 < opposite.p < 0.2
    assert delong_test([0.0, 1.0], [1.0, 0.0], [0, 1]).p > 0.05  # two images prove nothing


# The 113 patients of Turck et al., Intensive Care Medicine 36 (2010), as the R package pROC ships them: poor outcome, and three scores.
POOR = np.array([c == "1" for c in "00001101001011001011101000000000100110110000000001100010001010011101101111000110100000010000000000001111110001000"])
WFNS = np.array([float(c) for c in "11113254125255125225211112121134214541425511241125521251222151125214524414121421232421451154221113125225552445111"])
S100B = np.array([
    0.13, 0.14, 0.1, 0.04, 0.13, 0.1, 0.47, 0.16, 0.18, 0.1, 0.12, 0.1, 0.44, 0.71, 0.04, 0.08, 0.49, 0.04, 0.07, 0.33, 0.09, 0.09, 0.07,
    0.11, 0.07, 0.17, 0.07, 0.11, 0.13, 0.19, 0.05, 0.16, 0.41, 0.14, 0.34, 0.35, 0.48, 0.09, 0.96, 0.25, 0.5, 0.46, 0.16, 0.07, 0.43, 0.45,
    0.11, 0.08, 0.09, 0.86, 0.52, 0.08, 0.06, 0.13, 2.07, 0.1, 0.14, 0.15, 0.07, 0.06, 0.77, 0.05, 0.09, 0.3, 0.03, 0.09, 0.04, 0.23, 0.7,
    0.09, 0.27, 0.71, 0.08, 0.26, 0.08, 0.16, 0.09, 0.13, 0.1, 0.08, 0.11, 0.33, 0.11, 0.28, 0.07, 0.1, 0.32, 0.22, 0.07, 0.05, 0.24, 0.38,
    0.1, 0.15, 0.08, 0.14, 0.1, 0.07, 0.04, 0.19, 0.56, 0.14, 0.58, 0.32, 0.82, 0.74, 0.15, 0.47, 0.17, 0.44, 0.15, 0.5, 0.48])
NDKA = np.array([
    3.01, 8.54, 8.09, 10.42, 17.4, 12.75, 6.0, 13.2, 15.54, 6.01, 15.96, 17.86, 5.18, 8.9, 13.41, 20.75, 11.6, 16.11, 32.37, 54.82, 32.41,
    49.94, 40.34, 9.47, 6.29, 12.53, 6.54, 6.3, 80.3, 12.8, 9.8, 9.81, 9.85, 18.21, 5.03, 14.04, 21.93, 8.02, 7.42, 8.38, 6.59, 9.63, 13.12,
    7.96, 14.34, 41.43, 7.63, 7.06, 12.59, 13.56, 3.87, 9.44, 7.66, 12.98, 419.19, 27.19, 22.27, 9.95, 21.22, 11.73, 10.4, 58.83, 6.39,
    11.09, 12.22, 13.67, 17.21, 22.63, 12.9, 9.7, 21.57, 8.23, 72.57, 15.54, 10.51, 10.6, 14.57, 5.19, 9.63, 4.61, 21.48, 17.3, 12.71, 9.44,
    11.07, 19.46, 10.83, 5.37, 11.97, 7.75, 9.83, 10.55, 28.49, 8.53, 12.57, 12.9, 46.83, 11.68, 12.67, 9.01, 9.57, 34.06, 11.72, 14.26,
    47.61, 11.67, 24.58, 10.33, 13.87, 15.89, 22.43, 6.79, 13.45])


@pytest.mark.parametrize("a, b, z, p, low, high", [
    (WFNS, S100B, 2.20898359144091, 0.0271757822291882, 0.0104061769564846, 0.174214419249478),
    (WFNS, NDKA, 2.79777591868904, 0.00514557970691098, 0.0634011709339876, 0.3600405634833566),
    (NDKA, S100B, -1.39077002573558, 0.164295175223054, -0.2876917446341914, 0.0488706064228094),
])
def test_delong_gives_what_proc_publishes(a, b, z, p, low, high):
    "The figures that pROC's own tests expect of its DeLong test (Robin et al., BMC Bioinformatics 12, 2011)."
    found = delong_test(a, b, POOR)
    assert (found.z, found.p, found.low, found.high) == pytest.approx((z, p, low, high), rel=1e-12)


@pytest.mark.parametrize("scores, variance", [(WFNS, 0.00146991470882363), (NDKA, 0.0031908105493913), (S100B, 0.00266868245717244)])
def test_the_interval_rests_on_the_variance_that_proc_publishes(scores, variance):
    area, (low, high) = auroc(scores, POOR), auroc_interval(scores, POOR)
    half = 1.959963984540054 * math.sqrt(variance) / (area * (1 - area))
    assert [math.log(end / (1 - end)) for end in (low, high)] == pytest.approx([math.log(area / (1 - area)) + side * half for side in (-1, 1)])


def test_area_of_hanley_and_mcneil():
    "109 CT images rated 1 to 5 (Radiology 143, 1982): they print an area of 0.893."
    ratings, labels = np.repeat([1, 2, 3, 4, 5] * 2, [33, 6, 6, 11, 2, 3, 2, 2, 11, 33]), np.repeat([0, 1], [58, 51])
    assert round(auroc(ratings, labels), 3) == 0.893


@calm
@given(st.lists(st.integers(-50, 50), min_size=1, max_size=60), st.floats(0, 0.99))
def test_threshold_keeps_its_promise_on_every_exchangeable_draw(values, alpha):
    "Leave each value out in turn: as often as not promised, it exceeds the threshold of the others."
    n = len(values)
    assume(n >= 2)
    alarms = np.mean([v > threshold_from(values[:i] + values[i + 1:], alpha) for i, v in enumerate(values)])
    assert alarms <= max(alpha, 1 / n) + 1e-9
    assert threshold_from(values, alpha) in values
    assert threshold_from(values, 0.0) == max(values)


@pytest.mark.parametrize("n, alpha, rank", [(9, 0.1, 9), (8, 0.1, 8), (99, 0.01, 99), (100, 0.05, 96), (199, 0.05, 190), (3, 0.5, 2)])
def test_threshold_rank(n, alpha, rank):
    assert threshold_from(np.random.default_rng(0).permutation(n) + 1, alpha) == rank


def test_metrics_are_plain_json_whatever_comes_in():
    scores, labels = torch.tensor([0.1, 0.4, 0.35, 0.8], requires_grad=True), torch.tensor([False, False, True, True])
    found = evaluate_scores(scores, labels, threshold=torch.tensor(0.5))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["auroc"] == 0.75 and found["prevalence"] == 0.5 and found["auroc_ci"][0] < 0.75 < found["auroc_ci"][1]
    assert (found["tpr_at_threshold"], found["false_alarm_rate"], found["n_normal"], found["n_abnormal"]) == (0.5, 0.0, 2, 2)
    assert list(found) == ["auroc", "auroc_ci", "average_precision", "prevalence", "fpr_at_95_tpr", "threshold",
                           "tpr_at_threshold", "false_alarm_rate", "n_normal", "n_abnormal"]
    bare = evaluate_scores(np.array([1, 2], dtype=np.int32), [0, 1])
    assert bare["threshold"] is bare["tpr_at_threshold"] is bare["false_alarm_rate"] is None


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_leaves_the_undefined_none(label):
    found = evaluate_scores([1.0, 2.0, 3.0], [label] * 3, threshold=1.5)
    assert all(found[key] is None for key in ("auroc", "auroc_ci", "average_precision", "fpr_at_95_tpr"))
    seen, unseen = ("tpr_at_threshold", "false_alarm_rate")[:: 1 if label else -1]
    assert found[seen] == pytest.approx(2 / 3) and found[unseen] is None and found["prevalence"] == label


@pytest.mark.parametrize("scores, labels, says", [
    ([0.1, math.nan], [0, 1], "1 values that are NaN or infinite"),
    ([0.1, -math.inf], [0, 1], "NaN or infinite"),
    (torch.tensor([math.nan, 1.0]), [0, 1], "NaN or infinite"),
    (np.array([np.inf, np.inf], dtype=np.float16), [0, 1], "2 values that are NaN or infinite, out of 2"),
    ([None, 1.0], [0, 1], "NaN or infinite"),
    ([1j, 2.0], [0, 1], "not all numbers"),
    ([1.0], [0, 1], "1 scores but 2 labels"),
    ([1.0, 2.0], [0, 2], "labels hold 2"),
    ([1.0, 2.0], [0.5, 1], "labels hold 0.5"),
    ([[1.0], [2.0]], [0, 1], "shape (2, 1)"),
    (["a", "b"], [0, 1], "not all numbers"),
    ([10**400, 1], [0, 1], "not all numbers"),
    ([], [], "no scores"),
])
def test_what_cannot_be_judged_is_refused_in_one_sentence(scores, labels, says):
    for judge in (evaluate_scores, auroc):
        with pytest.raises(InputError) as caught: judge(scores, labels)
        assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("call, says", [
    (lambda: auroc([1, 2], [1, 1]), "all 2 labels are 1"),
    (lambda: auroc_interval([1, 2], [0, 1], level=95), "level 95"),
    (lambda: fpr_at_tpr([1, 2], [0, 1], tpr=0), "tpr 0"),
    (lambda: rates_at([1, 2], [0, 1], math.nan), "threshold"),
    (lambda: threshold_from([]), "no normal scores"),
    (lambda: threshold_from([1.0], false_alarms=1.0), "false_alarms 1.0"),
    (lambda: threshold_from([math.nan]), "NaN"),
    (lambda: peeking_gap([]), "history is empty"),
])
def test_bad_arguments_are_named(call, says):
    with pytest.raises(InputError) as caught: call()
    assert says in str(caught.value)


# ---------------------------------------------------------------- several classes and seeds

def test_mean_and_spread_over_seeds():
    assert mean_sd([0.6, 0.7, 0.8]) == pytest.approx((0.7, 0.1))
    assert mean_sd(torch.tensor([[1.0, 0.0], [0.0, 1.0]])) == (0.5, 0.0)  # a class's good seed is another's bad one
    assert mean_sd([[0.5], [0.7]]) == (pytest.approx(0.6), None)
    with pytest.raises(InputError, match="equally many seeds"): mean_sd([[0.5, 0.6], [0.7]])
    with pytest.raises(InputError, match="NaN"): mean_sd([0.5, math.nan])
    with pytest.raises(InputError, match="no figures"): mean_sd([])


@calm
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=15), st.floats(0.5, 0.999))
def test_the_class_is_the_observation(differences, level):
    assume(np.std(differences) > 1e-6)
    expected = ttest_1samp(differences, 0)
    found, low_high = mean_difference(differences, level), expected.confidence_interval(level)
    assert (found.z, found.p) == pytest.approx((expected.statistic, expected.pvalue), rel=1e-6, abs=1e-12)
    assert (found.low, found.high) == pytest.approx((max(-1, low_high.low), min(1, low_high.high)), abs=1e-9)
    assert mean_difference([[d + e for e in (-0.1, 0, 0.1)] for d in differences], level).p == pytest.approx(found.p, abs=1e-6)  # seeds are averaged


def test_more_seeds_are_not_more_classes():
    "Repeating what is known already must not make it surer."
    differences = np.array([0.02, 0.05, -0.01])
    assert mean_difference(np.repeat(differences[:, None], 10, axis=1)).p == pytest.approx(mean_difference(differences).p)


def test_classes_that_agree_to_the_last_digit_prove_nothing():
    for value in (0.0, 0.1): assert mean_difference([value] * 5) == PairedTest(value, -1.0, 1.0, 0.0, 1.0)
    assert mean_difference([0.1] * 5).mark == "="
    assert [PairedTest(0, low, high, 0, 1).mark for low, high in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1), (0, 0.1))] == ["▲", "▼", "=", "="]


@pytest.mark.parametrize("differences, says", [([], "0 class"), ([0.1], "use delong_test"), ([[0.1, 0.2]], "1 class"), ([0.1, math.nan], "NaN"),
                                               ([[0.1], [[0.2]]], "shape")])
def test_too_little_to_compare(differences, says):
    with pytest.raises(InputError, match=says): mean_difference(differences)
    with pytest.raises(InputError, match="level 95"): mean_difference([0.1, 0.2], level=95)


# ---------------------------------------------------------------- pixels

def slow_figures(maps, masks, limit):
    "Pixel AUROC over all pairs, and AUPRO threshold by threshold; regions grow pixel by pixel through eight neighbours."
    regions, left = [], {tuple(map(int, at)) for at in np.argwhere(masks)}
    while left:
        region, edge = set(), [left.pop()]
        while edge:
            n, y, x = edge.pop()
            region.add((n, y, x))
            near = {(n, y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            edge += near
        regions.append(tuple(np.array(sorted(region)).T))
    points = [(0.0, 0.0)]
    for level in sorted(set(maps.flat), reverse=True):
        hot = maps >= level
        points.append((hot[~masks].mean(), np.mean([hot[region].mean() for region in regions])))
    area = 0.0
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x1 > limit > x0: x1, y1 = limit, y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
        if x1 <= limit: area += (x1 - x0) * (y0 + y1) / 2
    return pairs(maps.ravel(), masks.ravel()).mean(), area / limit


@calm
@given(st.integers(0, 10**6), st.integers(2, 6), st.sampled_from([2, 5, 1000]), st.sampled_from([0.05, 0.3, 1.0]))
def test_pixel_figures_agree_with_the_slow_way(seed, side, levels, limit):
    rng = np.random.default_rng(seed)
    maps, masks = rng.integers(0, levels, (3, side, side)).astype(np.float32), rng.random((3, side, side)) < rng.choice([0.1, 0.3, 0.6])
    assume(masks.any() and not masks.all())
    found = evaluate_maps(maps, masks, limit)
    assert (found["pixel_auroc"], found["aupro"]) == pytest.approx(slow_figures(maps, masks, limit), abs=1e-9)
    assert found["pixel_auroc"] == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-9)


def two_defects():
    "A block of 16 pixels and a diagonal of 4, far apart, in the second of two images."
    masks = np.zeros((2, 20, 20), dtype=bool)
    masks[1, 2:6, 2:6] = True
    masks[1, range(12, 16), range(12, 16)] = True
    return masks


def test_hand_made_maps():
    masks = two_defects()
    assert evaluate_maps(masks.astype(float), masks) == pytest.approx(dict(pixel_auroc=1, aupro=1))
    assert evaluate_maps(-masks.astype(float), masks) == pytest.approx(dict(pixel_auroc=0, aupro=0))
    assert evaluate_maps(np.full(masks.shape, 0.7), masks) == pytest.approx(dict(pixel_auroc=0.5, aupro=0.15))
    assert evaluate_maps(np.full(masks.shape, 0.7), masks, limit=1.0)["aupro"] == pytest.approx(0.5)
    missed = np.zeros(masks.shape)
    missed[1, 2:6, 2:6], missed[1, range(12, 16), range(12, 16)] = 1, -1  # the block found, the diagonal colder than all
    assert evaluate_maps(missed, masks) == pytest.approx(dict(pixel_auroc=16 / 20, aupro=1 / 2))
    half = np.where(masks, 1.0, 0.0)
    half[1, 2:4, 2:6] = -1  # half of the block, and all of the diagonal
    assert evaluate_maps(half, masks)["aupro"] == pytest.approx(3 / 4)


def test_pixels_of_normal_images_and_around_defects_are_normal_alike():
    masks, maps = two_defects(), np.zeros((2, 20, 20))
    maps[masks] = 2
    maps[0, 0, :19], maps[1, 19, :19] = 3, 1  # 19 of 780 normal pixels hotter than the defects
    for order in ([0, 1], [1, 0]):
        assert evaluate_maps(maps[order], masks[order])["pixel_auroc"] == pytest.approx(1 - 19 / 780)
        assert evaluate_maps(maps[order], masks[order])["aupro"] == pytest.approx(1 - 19 / 780 / 0.3)


@pytest.mark.parametrize("change", [lambda m: m * 1e-30, lambda m: m * 1e30, lambda m: m.astype(np.float16), lambda m: m.astype(np.int16),
                                    lambda m: torch.tensor(m).bfloat16(), lambda m: torch.tensor(m, requires_grad=True)])
def test_only_the_order_of_the_heat_counts(change):
    masks, maps = two_defects(), np.random.default_rng(0).integers(0, 50, (2, 20, 20)).astype(np.float32)
    assert evaluate_maps(change(maps), torch.tensor(masks)) == evaluate_maps(maps, 255 * masks.astype(np.uint8))


@pytest.mark.parametrize("maps, masks, options, says", [
    (np.zeros((2, 8, 8)), np.zeros((2, 4, 4)), {}, "(2, 8, 8) and masks (2, 4, 4) do not fit"),
    (np.zeros((8, 8)), np.zeros((8, 8)), {}, "pass both as (N, H, W)"),
    (np.full((1, 2, 2), np.nan), np.eye(2)[None], {}, "4 values that are NaN"),
    (np.zeros((1, 2, 2)), np.eye(2)[None], dict(limit=0), "limit 0"),
    (np.zeros((1, 2, 2)), np.eye(2)[None], dict(limit=30), "limit 30"),
])
def test_maps_that_cannot_be_judged(maps, masks, options, says):
    with pytest.raises(InputError) as caught: evaluate_maps(maps, masks, **options)
    assert says in str(caught.value)


def test_one_kind_of_pixel_has_no_figures():
    for masks in (np.zeros((1, 3, 3)), np.ones((1, 3, 3)), np.zeros((0, 3, 3))):
        assert evaluate_maps(np.zeros(masks.shape), masks) == dict(pixel_auroc=None, aupro=None)


def test_small_things():
    assert peeking_gap([0.5, 0.89, 0.52]) == pytest.approx(0.37) and peeking_gap([0.4, 0.9]) == 0
    assert mid_ranks([3, 1, 3, -0.0, 0.0]).tolist() == [4.5, 3, 4.5, 1.5, 1.5]
    assert rates_at([1, 2, 2, 3], [0, 0, 1, 1], 2) == (0.5, 0.0)  # strictly above


class Brightness(BaseDetector):
    def fit(self, train, val): return self.set_threshold(val)

    def score(self, images):
        images = images if torch.is_tensor(images) else images.stack()
        return images.flatten(1).mean(1)


def bright(levels, labels=None):
    return ImageSet(torch.tensor(levels, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8), labels)


def test_base_detector_from_validation_to_metrics():
    detector = Brightness()
    with pytest.raises(InputError, match="this Brightness has no threshold yet"): detector.predict(bright([1]))
    assert detector.fit(None, bright(range(1, 20))) is detector and isinstance(detector.threshold, float)
    called = detector.predict(bright([1, 19, 20, 200]))
    assert called.dtype == torch.int64 and called.tolist() == [0, 0, 1, 1]  # 19 itself is not above the threshold
    found = detector.evaluate(bright([1, 19, 20, 200], [0, 1, 0, 1]))
    assert found["auroc"] == 0.75 and found["threshold"] == detector.threshold
    assert (found["tpr_at_threshold"], found["false_alarm_rate"]) == (0.5, 0.5)
    assert detector.set_threshold(bright(range(1, 20)).stack(), false_alarms=0.5).predict(bright([10, 11])).tolist() == [0, 1]


def test_threshold_refuses_abnormal_validation_images():
    detector = Brightness()
    with pytest.raises(InputError, match="1 images labelled abnormal"): detector.set_threshold(bright([1, 2, 3], [0, 1, 0]))
    assert detector.threshold is None
    with pytest.raises(TypeError, match="abstract"): BaseDetector()


class Glow(Brightness):
    "Brightness, with a heat map: each pixel's own."
    def heatmap(self, images): return (images if torch.is_tensor(images) else images.stack()).mean(1)


@pytest.fixture
def plates(tmp_path):
    "MVTec AD's layout: dark grey plates; a defect is a white square, and its mask says so."
    for part, n in (("train/good", 20), ("test/good", 4), ("test/spot", 4)):
        (tmp_path / "plate" / part).mkdir(parents=True)
        for i in range(n):
            pixels = np.random.RandomState(len(part) * 100 + i).randint(0, 90, (16, 16)).astype(np.uint8)
            mask = np.zeros((16, 16), np.uint8)
            if "spot" in part:
                mask[4:8, i:i + 4] = 255
                (tmp_path / "plate/ground_truth/spot").mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask).save(tmp_path / f"plate/ground_truth/spot/{i:03}_mask.png")
            Image.fromarray(np.maximum(pixels, mask)).save(tmp_path / "plate" / part / f"{i:03}.png")
    return load_dataset("mvtec", root=tmp_path, category="plate", isize=32)


def test_a_trained_detector_is_judged_by_its_heat_map(plates):
    detector = Detector("gannext", epochs=2, batch_size=9, device="cpu", progress=False, dim=8, depths=(1, 1, 1, 1), ndf=8, nz=16)
    found = detector.fit(plates.train, plates.val).evaluate(plates.test)
    expected = evaluate_maps(detector.heatmap(plates.test), plates.test.masks)
    assert (found["pixel_auroc"], found["aupro"]) == (expected["pixel_auroc"], expected["aupro"])
    assert found["pixel_auroc"] > 0.7  # white squares on dark plates


def test_masks_bring_figures_per_pixel(plates):
    found = Glow().fit(plates.train, plates.val).evaluate(plates.test)
    assert (found["auroc"], found["pixel_auroc"], found["aupro"]) == pytest.approx((1, 1, 1))
    assert found == json.loads(json.dumps(found, allow_nan=False))
    upside_down = type("Blind", (Glow,), dict(heatmap=lambda self, images: -images.stack().mean(1)))().fit(plates.train, plates.val)
    assert upside_down.evaluate(plates.test)["pixel_auroc"] == pytest.approx(0)


def test_without_masks_or_heat_map_there_are_none(plates):
    for found in (Brightness().fit(plates.train, plates.val).evaluate(plates.test),
                  Glow().fit(plates.train, plates.val).evaluate(plates.test.subset([0, 1, 2])),  # masks, and no defect
                  Glow().fit(plates.train, plates.val).evaluate(bright([1, 2], [0, 1]))):
        assert found["pixel_auroc"] is None and found["aupro"] is None
