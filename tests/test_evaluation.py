"""Metrics against scikit-learn and against their definitions, on inputs a notebook cell would not try."""
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from anogan.data import ImageSet
from anogan.errors import InputError
from anogan.evaluation import (BaseDetector, auroc, auroc_interval, average_precision, delong_test, evaluate_scores, fpr_at_tpr,
                               mid_ranks, peeking_gap, rates_at, threshold_from)

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
