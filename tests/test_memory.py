"The memory of normal images: distances, their independence of the batch, whitening, and the place that stands out."
import pytest
import torch
from sklearn.covariance import ShrunkCovariance
from sklearn.neighbors import NearestNeighbors

from anogan.contrast import Projection
from anogan.data import load_dataset
from anogan.detector import Detector
from anogan.discriminator import Discriminator, init_weights
from anogan.errors import InputError
from anogan.memory import NEIGHBOURS, Memory, nearest, places_as_map, standing_out, whitening

IMAGES = load_dataset("digits", isize=32, n_train=120).train.stack()


@pytest.fixture(scope="module")
def critic():
    torch.manual_seed(0)
    return init_weights(Discriminator(32, 1, ndf=4, nz=8)).eval()


@pytest.fixture(scope="module")
def memory(critic): return Memory.fit(critic, IMAGES[:80].split(32))


@pytest.mark.parametrize("k", [1, 5, 2000])
def test_nearest_is_scikit_learns(k):
    new, known = torch.randn(70, 30), torch.randn(1500, 30).half()
    oracle = NearestNeighbors(n_neighbors=min(k, 1500)).fit(known.double()).kneighbors(new.double())[0].mean(axis=1)
    torch.testing.assert_close(nearest(new, known, k), torch.from_numpy(oracle).float(), rtol=1e-6, atol=1e-6)


def test_nearest_measures_by_differences():
    "Far from the origin, where products of float32 numbers would be off by more than the distances themselves."
    steps = torch.arange(9.0)[:, None] * torch.tensor([0.1, 0.0])
    torch.testing.assert_close(nearest(torch.tensor([[999.9, 0.0]]), torch.tensor([1000.0, 0.0]) + steps, 2), torch.tensor([0.15]), rtol=1e-3, atol=0)


def test_the_terms_are_the_feature_the_map_and_its_places(critic, memory):
    shapes = {term: tuple(t.shape) for term, t in memory.features.items()}
    assert shapes == dict(near_image=(80, 4, 8), near_map=(80, 1, 512), near_patch=(80, 64, 8)) and set(shapes) == set(NEIGHBOURS)
    assert torch.allclose(memory.features["near_image"].float().norm(dim=2), torch.ones(80, 4), atol=1e-2)


@pytest.mark.parametrize("head", [None, Projection(8)], ids=["feature", "head"])
def test_the_image_is_measured_four_times_each_turn_against_its_own(critic, head):
    memory = Memory.fit(critic, IMAGES[:80].split(32), ["near_image"], head)
    expected = torch.zeros(10)
    for turns in range(4):
        with torch.no_grad(): features = critic(IMAGES.rot90(turns, (2, 3)))[1]
        seen = torch.nn.functional.normalize(head.layers(features) if head else features, dim=1).detach()
        search = NearestNeighbors(n_neighbors=5).fit(seen[:80].half().double())
        expected += torch.from_numpy(search.kneighbors(seen[80:90].double())[0].mean(axis=1)).float() / 4
    torch.testing.assert_close(memory.distances(critic, IMAGES[80:90])["near_image"], expected, rtol=1e-4, atol=1e-5)


def test_only_what_is_asked_for_is_looked_at(critic, monkeypatch):
    calls = []
    monkeypatch.setattr(Discriminator, "forward", lambda self, x: calls.append(x))
    assert Memory.look(critic, IMAGES[:2], ["near_patch"]).keys() == {"near_patch"} and not calls


def test_the_place_that_stands_out_counts(critic, memory):
    places = memory.by_place(memory.read(critic, IMAGES[80:90])["near_patch"], "near_patch")
    assert places.shape == (10, 64)
    torch.testing.assert_close(memory.distances(critic, IMAGES[80:90])["near_patch"], standing_out(places))
    quiet = torch.tensor([sorted(row)[16] for row in places.tolist()])
    torch.testing.assert_close(standing_out(places), places.amax(1) - quiet)


def test_a_map_of_places_is_quiet_but_for_what_stands_out():
    distances = torch.full((2, 64), 3.0)
    distances[0, 8 * 5 + 2] = 7  # row 5, column 2
    heat = places_as_map(distances, 64)
    assert heat.shape == (2, 64, 64) and heat[1].max() == 0 and heat.min() == 0
    row, col = divmod(int(heat[0].argmax()), 64)
    assert row // 8 == 5 and col // 8 == 2 and 0.8 * 4 < heat.max() <= 4 and heat[0, :32].max() == 0
    torch.testing.assert_close(places_as_map(distances + 100, 64), heat)  # strange everywhere is no place


def test_whitened_features_vary_by_one_in_every_direction():
    torch.manual_seed(0)
    mixed = torch.randn(5000, 6) @ torch.randn(6, 6) + 3
    spread = torch.cov((mixed @ whitening(mixed)).T)
    assert (spread - spread.diag().diag()).abs().max() < 1e-5 and spread.diag().max() <= 1 and spread.diag().max() > 0.99
    a, b, oracle = mixed[:50], mixed[50:100], ShrunkCovariance(shrinkage=0.01 / 1.01).fit(mixed.double()).precision_
    gap = (a - b).double().numpy()
    expected = torch.from_numpy(((gap @ oracle) * gap).sum(1) / 1.01).float()
    torch.testing.assert_close(((a - b) @ whitening(mixed)).norm(dim=1).square(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("features", [torch.zeros(9, 3), torch.ones(1, 3), torch.tensor([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0]])])
def test_features_that_hardly_vary_can_be_whitened(features):
    assert whitening(features).shape == (3, 3) and whitening(features).isfinite().all()


def test_places_are_kept_whitened(critic, memory):
    kept = memory.features["near_patch"].float().flatten(0, 1)
    spread = torch.cov(kept[:32 * 64].T).diagonal()
    assert spread.max() < 1.01 and spread.max() > 0.5


def test_a_planted_defect_is_found_at_its_place(critic, memory):
    marked = IMAGES[80:81].clone()
    marked[..., 4:8, 24:28] = 1.0  # places are 4 pixels apart: row 1, column 6
    before, after = (memory.by_place(memory.read(critic, x)["near_patch"], "near_patch")[0].reshape(8, 8) for x in (IMAGES[80:81], marked))
    row, column = divmod(int((after - before).argmax()), 8)
    assert abs(row - 1) <= 1 and abs(column - 6) <= 1


def test_distances_do_not_depend_on_the_batch(critic, memory):
    together = memory.distances(critic, IMAGES[80:])
    for term, values in together.items():
        alone = torch.cat([memory.distances(critic, x[None])[term] for x in IMAGES[80:]])
        torch.testing.assert_close(alone, values, rtol=0, atol=1e-5)


def test_a_discriminator_in_training_mode_is_refused(critic):
    with pytest.raises(InputError, match="training mode"): Memory.fit(Discriminator(32, 1, 4, 8), [IMAGES[:4]])


def test_the_score_is_the_same_after_save_and_load(tmp_path):
    data, options = load_dataset("digits", 8, n_train=64), dict(epochs=1, batch_size=16, dim=4, ndf=4, nz=8, device="cpu", progress=False)
    for score in (dict(near_image=1.0, near_map=1.0), dict(near_patch=1.0, rec=1.0)):
        detector = Detector("gannext", score=score, **options).fit(data.train, data.val)
        again = Detector.load(detector.save(tmp_path / "-".join(score)), device="cpu")
        assert again.weights == detector.weights == score and again.recipe == detector.recipe
        assert torch.equal(again.score(data.test), detector.score(data.test))


def test_weights_that_the_recipe_gives_are_taken_as_they_are():
    data = load_dataset("digits", 8, n_train=64)
    options = dict(epochs=1, batch_size=16, dim=4, ndf=4, nz=8, device="cpu", progress=False)
    assert Detector("gannext", recipe="defects", **options).fit(data.train, data.val).weights == {"near_patch": 1.0}
    detector = Detector("gannext", score=dict(near_map=0.5, rec=0.5), **options).fit(data.train, data.val)
    assert detector.weights == dict(near_map=0.5, rec=0.5) and set(detector.memory.features) == {"near_map"}


def test_what_does_not_depend_on_the_new_images_is_computed_once(critic, monkeypatch):
    memory = Memory.fit(critic, IMAGES[:80].split(32))
    first = memory.distances(critic, IMAGES[80:])
    monkeypatch.setattr("anogan.memory.around_middle", None)
    assert all(torch.equal(first[term], again) for term, again in memory.distances(critic, IMAGES[80:]).items())


def test_whitening_lies_in_memory_as_a_file_keeps_it(): assert whitening(torch.randn(50, 6)).is_contiguous()
