"""Baselines against scikit-learn or their formula, alone and in company, and on odd input."""
import json
from types import SimpleNamespace

import pytest
import torch
from sklearn.metrics import roc_auc_score
from threadpoolctl import threadpool_limits
from torchvision.models import resnet18

from anogan.baselines import (BASELINES, IsolationForestPixels, MahalanobisPixels, MeanIntensity, NearestNeighbours, NetworkNeighbours,
                              OneClassSVMPixels, PCAReconstruction, PixelBaseline, cached_weights, run_baselines)
from anogan.data import ImageSet, load_dataset
from anogan.errors import InputError
from anogan.scoring import smooth


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with threadpool_limits(1): yield


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    "An empty cache of torch's, and no way to fill it."
    def download(url, *_, **__): raise AssertionError(f"{url} is downloaded")
    folder, before = tmp_path_factory.mktemp("hub"), torch.hub.get_dir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.hub, "download_url_to_file", download)
        torch.hub.set_dir(str(folder))
        yield folder / "checkpoints"
        torch.hub.set_dir(before)


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
    (lambda d: PCAReconstruction().heatmap(d.test), "call fit first"),
    (lambda d: PCAReconstruction().fit(d.train, None).heatmap(torch.zeros(1, 1, 16, 4)), "1×16×4 (channels, height, width) do not fit"),
    (lambda d: NetworkNeighbours("resnet81"), "unknown network 'resnet81' (did you mean 'resnet18'?)"),
    (lambda d: NetworkNeighbours(layer="layer5"), "unknown layer 'layer5' (did you mean"),
    (lambda d: NetworkNeighbours(k=0), "k is 0"),
    (lambda d: NetworkNeighbours().score(d.test), "learnt nothing yet"),
    (lambda d: NetworkNeighbours().fit(d.train.subset(range(5)), None).score(torch.zeros(1, 1, 9, 9)), "1×9×9"),
    (lambda d: PCAReconstruction(1.5), "components 1.5"),
    (lambda d: PCAReconstruction(True), "components True"),
    (lambda d: MahalanobisPixels(0), "components is 0"),
    (lambda d: OneClassSVMPixels(nu=0), "nu 0"),
    (lambda d: MeanIntensity().fit(d.test, d.val), "train on normal images only"),
    (lambda d: MeanIntensity().fit(d.train, d.test), "threshold from normal images only"),
    (lambda d: MeanIntensity().fit(d.train.subset([0]), None), "at least two"),
    (lambda d: MeanIntensity().score(d.test), "learnt nothing yet"),
    (lambda d: MeanIntensity().fit(d.train, None).predict(d.test), "no threshold"),
    (lambda d: MeanIntensity().fit(d.train, d.val).score(torch.zeros(1, 3, 8, 8)), "images of 3×8×8 (channels, height, width) do not fit a training on 1×8×8"),
    (lambda d: MeanIntensity().fit(d.train, ImageSet(torch.zeros(0, 1, 8, 8, dtype=torch.uint8))), "no images"),
])
def test_mistakes_are_named(call, says, digits):
    with pytest.raises(InputError) as caught: call(digits)
    assert says in str(caught.value)


def test_a_failed_fit_is_no_fit(digits):
    detector = NearestNeighbours(3).fit(digits.train, digits.val)
    with pytest.raises(InputError, match="3 neighbours asked of 2"): detector.fit(digits.train.subset([0, 1]), None)
    for call in (detector.score, detector.predict):
        with pytest.raises(InputError, match="call fit"): call(digits.val)


# ---------------------------------------------------------------- PCA's heat map

@pytest.mark.parametrize("channels", [1, 3])
def test_pca_s_heat_is_the_blurred_residual(channels):
    images = torch.rand(60, channels, 12, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1
    rows = images.flatten(1).double()
    mean = rows[:40].mean(0)
    basis = torch.linalg.svd(rows[:40] - mean, full_matrices=False).Vh[:5]
    residual = ((rows - mean) - (rows - mean) @ basis.T @ basis).square().view(images.shape).mean(1)
    detector = PCAReconstruction(5).fit(images[:40], None)
    torch.testing.assert_close(detector.heatmap(images), smooth(residual, 12 / 32).float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(detector.score(images), residual.mean((1, 2)).float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.cat([detector.heatmap(x[None]) for x in images[:3]]), detector.heatmap(images)[:3])


def test_masks_give_pca_figures_per_pixel_and_the_others_none():
    pixels = torch.randint(100, 120, (60, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(60, 16, 16, dtype=torch.bool)
    masks[50:, 3:6, 3:6] = True
    pixels[:, 0][masks] = 255
    data = SimpleNamespace(train=ImageSet(pixels[:30]), val=ImageSet(pixels[30:40]), test=ImageSet(pixels[40:], masks[40:].any((1, 2)), masks=masks[40:]))
    found = run_baselines(data)
    assert found["pca"]["pixel_auroc"] > 0.95 and found["pca"]["aupro"] > 0.85
    assert found["knn"]["pixel_auroc"] is found["knn"]["aupro"] is None


# ---------------------------------------------------------------- a borrowed network

def keep(cache, seed=5, name="resnet18-f37072fd.pth"):
    "Put weights where torchvision would have put its download."
    torch.manual_seed(seed)
    model = resnet18()
    cache.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), cache / name)
    return model.eval()


@pytest.fixture
def filled(cache):
    yield keep(cache)
    for path in cache.iterdir(): path.unlink()


def test_weights_come_from_the_cache_or_are_random_and_it_says_which(digits, filled):
    few = SimpleNamespace(train=digits.train.subset(range(20)), val=digits.val.subset(range(20)), test=digits.test)
    found = run_baselines(few, "network_knn")["network_knn"]
    assert found["weights"] == cached_weights("resnet18").name == "IMAGENET1K_V1" and found["auroc"] is not None
    detector = NetworkNeighbours()
    for key, value in filled.state_dict().items():
        if key.startswith(("conv1", "layer1", "layer2")): assert torch.equal(dict(detector.features.state_dict())[key], value)
    control = NetworkNeighbours(pretrained=False)
    assert control.weights == NetworkNeighbours("resnet34").weights == "random"
    assert not torch.equal(control.features.state_dict()["conv1.weight"], filled.conv1.weight)


def test_an_empty_cache_is_random_and_the_seed_decides(digits):
    x = digits.train.stack()[:6]
    rows = {seed: next(NetworkNeighbours(seed=seed).rows(x)) for seed in (0, 1)}
    assert NetworkNeighbours().weights == "random" and cached_weights("resnet18") is None
    assert (rows[0] == next(NetworkNeighbours(pretrained=False).rows(x))).all() and abs(rows[0] - rows[1]).max() > 1e-3
    assert run_baselines(SimpleNamespace(train=x, val=x, test=ImageSet(digits.test.pixels[:4])), "network_knn")["network_knn"]["weights"] == "random"


def test_damaged_weights_are_one_sentence(cache, filled):
    (cache / "resnet18-f37072fd.pth").write_bytes((cache / "resnet18-f37072fd.pth").read_bytes()[:1000])
    with pytest.raises(InputError, match="are damaged .*pretrained=False") as caught: NetworkNeighbours()
    assert "\n" not in str(caught.value)
    assert NetworkNeighbours(pretrained=False).weights == "random"


def test_weights_are_read_without_running_code(cache, filled):
    class Trap:
        def __reduce__(self): return exec, ("raise SystemExit('code ran')",)
    torch.save(Trap(), cache / "resnet18-f37072fd.pth")
    with pytest.raises(InputError, match="damaged"): NetworkNeighbours()


def test_the_network_only_looks():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    detector = NetworkNeighbours()
    assert torch.equal(torch.rand(3), expected)  # the caller's random numbers are left alone
    images = torch.rand(40, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    before = {key: value.clone() for key, value in detector.features.state_dict().items()}
    detector.fit(images[:20], images[20:30]).score(images[30:])
    assert all(torch.equal(value, before[key]) for key, value in detector.features.state_dict().items())  # running statistics too
    assert not any(module.training for module in detector.features.modules())
    assert not any(p.requires_grad for p in detector.features.parameters())


@pytest.mark.parametrize("options, width", [(dict(layer="layer1"), 64), (dict(layer="layer4"), 512), (dict(layer="fc"), 1000),
                                            (dict(network="mobilenet_v3_small", layer="features"), 576)])
def test_other_layers_and_networks(options, width):
    images = torch.rand(6, 1, 12, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert next(NetworkNeighbours(**options).rows(images)).shape == (6, width)


def test_a_subclass_has_to_learn_and_judge(digits):
    with pytest.raises(NotImplementedError): PixelBaseline().fit(digits.train, None)
    class Half(PixelBaseline):
        def learn(self, rows): pass
    with pytest.raises(NotImplementedError): Half().fit(digits.train, None).score(digits.val)
