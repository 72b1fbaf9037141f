"""Baselines against scikit-learn or their formula, alone and in company, and on odd input."""
import json
from types import SimpleNamespace

import pytest
import torch
from sklearn.metrics import roc_auc_score
from threadpoolctl import threadpool_limits

from anogan.baselines import (BASELINES, IsolationForestPixels, MahalanobisPixels, MeanIntensity, NearestNeighbours,
                              OneClassSVMPixels, PCAReconstruction, PixelBaseline, run_baselines)
from anogan.data import ImageSet, load_dataset
from anogan.errors import InputError


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with threadpool_limits(1): yield


@pytest.fixture(scope="module")
def digits(): return load_dataset("digits", abnormal_class=0, isize=8)


@pytest.fixture(scope="module")
def fitted(digits): return {name: kind().fit(digits.train, digits.val) for name, kind in BASELINES.items()}


@pytest.mark.parametrize("name", BASELINES)
def test_scores_are_each_image_s_own(name, fitted, digits):
    detector, images = fitted[name], digits.test.stack()[:300]  # more than one batch
    scores, order = detector.score(images), torch.randperm(300, generator=torch.Generator().manual_seed(0))
    assert scores.shape == (300,) and scores.dtype == torch.float32 and scores.device.type == "cpu" and scores.isfinite().all()
    torch.testing.assert_close(detector.score(images[order]), scores[order], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.cat([detector.score(image[None]) for image in images[:5]]), scores[:5], rtol=1e-5, atol=1e-6)
    pairs = [(image, 0) for image in images[:9]]  # any data set of (image, label)
    torch.testing.assert_close(detector.score(pairs), scores[:9], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", BASELINES)
def test_threshold_comes_from_validation_and_metrics_from_the_test_set(name, fitted, digits):
    detector = fitted[name]
    assert detector.predict(digits.val).float().mean() <= 0.05
    found = detector.evaluate(digits.test)
    assert found["auroc"] == pytest.approx(roc_auc_score(digits.test.labels, detector.score(digits.test)), abs=1e-12)
    assert found["threshold"] == detector.threshold and json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("name", BASELINES)
def test_what_is_far_from_training_scores_higher(name):
    near = 0.05 * torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    detector = BASELINES[name]().fit(near[:100], near[100:])
    assert detector.score(near[100:] + 0.7).min() > detector.score(near[100:]).max()


@pytest.mark.parametrize("name", BASELINES)
def test_one_seed_one_answer(name, fitted, digits):
    kind = BASELINES[name]
    torch.testing.assert_close(kind().fit(digits.train, None).score(digits.test), fitted[name].score(digits.test))


def test_random_baselines_listen_to_the_seed(digits):
    a, b = (IsolationForestPixels(trees=10, seed=seed).fit(digits.train, None).score(digits.val) for seed in (0, 1))
    assert not torch.equal(a, b)
    a, b, c = (OneClassSVMPixels(limit=50, seed=seed).fit(digits.train, None).score(digits.val) for seed in (0, 1, 0))
    assert torch.equal(a, c) and not torch.equal(a, b)


def test_neighbours_by_brute_force(digits):
    train, test = digits.train.stack().flatten(1).double(), digits.test.stack()[:40].flatten(1).double()
    distance, index = torch.cdist(test, train, compute_mode="donot_use_mm_for_euclid_dist").topk(3, largest=False)
    detector = NearestNeighbours(3).fit(digits.train, None)
    torch.testing.assert_close(detector.score(digits.test)[:40].double(), distance.mean(1), rtol=1e-5, atol=1e-6)
    assert torch.equal(detector.neighbours(digits.test)[:40], index)
    assert detector.score(digits.train).shape == (len(digits.train),)


def test_pca_as_a_share_keeps_as_many_components_as_needed(digits):
    detector = PCAReconstruction(0.9).fit(digits.train, None)
    kept = detector.pca.explained_variance_ratio_
    assert 0.9 <= kept.sum() and kept[:-1].sum() < 0.9
    few = PCAReconstruction(16).fit(digits.train.stack()[:3], None)  # fewer images than components
    assert few.score(digits.train.stack()[:3]).max() < 1e-6


def test_mahalanobis_undoes_a_stretch():
    "On two clusters of the same shape, stretched or not, the distances agree; Euclidean ones would not."
    x = torch.randn(4000, 1, 1, 2, generator=torch.Generator().manual_seed(0)) * 0.1
    scale = torch.tensor([1.0, 0.5])
    plain, stretched = (MahalanobisPixels().fit((x * s).clamp(-1, 1), None).score((x * s)[:50].clamp(-1, 1)) for s in (1, scale))
    torch.testing.assert_close(plain, stretched, rtol=0.02, atol=0.02)


def test_brightness_gives_lamps_away():
    train, dark = torch.rand(50, 1, 8, 8) * 0.5, -torch.rand(20, 1, 8, 8)
    detector = MeanIntensity().fit(train[:40], train[40:])
    assert detector.score(dark).min() > detector.score(train).max() and detector.predict(dark).all()


def test_colour_images_and_two_training_images():
    images = torch.rand(30, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for kind in BASELINES.values():
        assert kind().fit(images[:2], images[2:10]).score(images[10:]).shape == (20,)


def test_run_baselines_judges_all_on_the_same_split(digits, fitted):
    found = run_baselines(digits)
    assert list(found) == ["knn", "pca"] and found["knn"]["auroc"] > 0.99 > found["pca"]["auroc"]
    assert found["knn"] == fitted["knn"].evaluate(digits.test)
    assert found["knn"]["n_abnormal"] == found["pca"]["n_abnormal"] == int(digits.test.labels.sum())
    forests = [run_baselines(digits, "isolation_forest", seed=seed)["isolation_forest"]["auroc"] for seed in (0, 5)]
    assert forests[0] != forests[1]


def test_training_never_sees_validation_or_test(digits):
    "Scores do not move when validation and test images change."
    detector = NearestNeighbours().fit(digits.train, -digits.val.stack())
    assert torch.equal(detector.score(digits.test), NearestNeighbours().fit(digits.train, None).score(digits.test))
    other = SimpleNamespace(train=digits.train, val=digits.val, test=digits.test.subset(range(100)))
    assert run_baselines(other, ["pca"])["pca"]["threshold"] == run_baselines(digits, ["pca"])["pca"]["threshold"]


@pytest.mark.parametrize("call, says", [
    (lambda d: run_baselines(d, ["knn", "forest"]), "unknown baseline 'forest': choose among mean_image"),
    (lambda d: NearestNeighbours(0), "k is 0"),
    (lambda d: NearestNeighbours(9).fit(d.train.subset(range(5)), None), "9 neighbours asked of 5"),
    (lambda d: NearestNeighbours().neighbours(d.test), "call fit first"),
    (lambda d: PCAReconstruction(1.5), "components 1.5"),
    (lambda d: PCAReconstruction(True), "components True"),
    (lambda d: MahalanobisPixels(0), "components is 0"),
    (lambda d: OneClassSVMPixels(nu=0), "nu 0"),
    (lambda d: MeanIntensity().fit(d.test, d.val), "train on normal images only"),
    (lambda d: MeanIntensity().fit(d.train, d.test), "threshold from normal images only"),
    (lambda d: MeanIntensity().fit(d.train.subset([0]), None), "at least two"),
    (lambda d: MeanIntensity().score(d.test), "learnt nothing yet"),
    (lambda d: MeanIntensity().fit(d.train, None).predict(d.test), "no threshold"),
    (lambda d: MeanIntensity().fit(d.train, d.val).score(torch.zeros(1, 3, 8, 8)), "192 pixels but training had 64"),
    (lambda d: MeanIntensity().fit(d.train, ImageSet(torch.zeros(0, 1, 8, 8, dtype=torch.uint8))), "no images"),
])
def test_mistakes_are_named(call, says, digits):
    with pytest.raises(InputError) as caught: call(digits)
    assert says in str(caught.value)


def test_a_subclass_has_to_learn_and_judge(digits):
    with pytest.raises(NotImplementedError): PixelBaseline().fit(digits.train, None)
    class Half(PixelBaseline):
        def learn(self, rows): pass
    with pytest.raises(NotImplementedError): Half().fit(digits.train, None).score(digits.val)
