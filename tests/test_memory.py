"The memory of normal images: distances, their independence of the batch, and the choice of a term by hidden clusters."
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from anogan import memory as module
from anogan.data import load_dataset
from anogan.detector import Detector
from anogan.discriminator import Discriminator, init_weights
from anogan.errors import InputError
from anogan.memory import NEIGHBOURS, Memory, hidden_clusters, nearest

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
    assert shapes == dict(near_image=(80, 1, 8), near_map=(80, 1, 512), near_patch=(80, 64, 8)) and set(shapes) == set(NEIGHBOURS)
    assert torch.allclose(memory.features["near_image"].float().norm(dim=2), torch.ones(80, 1), atol=1e-2)


def test_the_worst_place_counts(critic, memory):
    places = memory.by_place(memory.look(critic, IMAGES[80:90])["near_patch"], "near_patch")
    assert places.shape == (10, 64)
    torch.testing.assert_close(memory.distances(critic, IMAGES[80:90])["near_patch"], places.amax(1).float())


def test_a_planted_defect_is_found_at_its_place(critic, memory):
    marked = IMAGES[80:81].clone()
    marked[..., 4:8, 24:28] = 1.0  # places are 4 pixels apart: row 1, column 6
    before, after = (memory.by_place(memory.look(critic, x)["near_patch"], "near_patch")[0].reshape(8, 8) for x in (IMAGES[80:81], marked))
    row, column = divmod(int((after - before).argmax()), 8)
    assert abs(row - 1) <= 1 and abs(column - 6) <= 1


def test_distances_do_not_depend_on_the_batch(critic, memory):
    together = memory.distances(critic, IMAGES[80:])
    for term, values in together.items():
        alone = torch.cat([memory.distances(critic, x[None])[term] for x in IMAGES[80:]])
        torch.testing.assert_close(alone, values, rtol=0, atol=1e-5)


def test_a_discriminator_in_training_mode_is_refused(critic):
    with pytest.raises(InputError, match="training mode"): Memory.fit(Discriminator(32, 1, 4, 8), [IMAGES[:4]])


def kinds(n):
    "Dark and bright images, as different as can be."
    noise = 0.05 * torch.randn(2 * n, 1, 32, 32, generator=torch.Generator().manual_seed(n))
    return noise + torch.tensor([-0.8, 0.8]).repeat_interleave(n)[:, None, None, None]


def test_clusters_that_differ_are_found_when_they_are_hidden(critic, monkeypatch):
    monkeypatch.setattr(module, "CLUSTERS", 2)
    known = kinds(30)
    found = hidden_clusters(Memory.fit(critic, [known]), known, critic, kinds(10))
    assert found["near_map"] == 1.0


def test_a_term_that_sees_nothing_finds_nothing(critic, monkeypatch):
    monkeypatch.setattr(module, "CLUSTERS", 2)
    known = kinds(30)
    blind = Memory(dict(near_image=torch.ones(60, 1, 8).half(), near_map=Memory.fit(critic, [known]).features["near_map"]))
    monkeypatch.setattr(Memory, "look", staticmethod(lambda d, x: {**look(d, x), "near_image": torch.ones(len(x), 1, 8)}))
    found = hidden_clusters(blind, known, critic, kinds(10))
    assert found["near_image"] == 0.5 < found["near_map"]


look = Memory.look


def test_where_no_cluster_reaches_into_val_nothing_is_said(critic):
    assert hidden_clusters(Memory.fit(critic, [IMAGES[:1]]), IMAGES[:1], critic, IMAGES[80:]) == {}


def test_the_detector_takes_the_winner_and_keeps_it_over_save_and_load(monkeypatch, tmp_path):
    data = load_dataset("digits", 8, n_train=64)
    for winner in ("near_image", "near_map"):
        monkeypatch.setattr("anogan.detector.hidden_clusters", lambda *a, w=winner: {t: float(t == w) for t in ("near_image", "near_map")})
        detector = Detector("gannext", epochs=1, batch_size=16, dim=4, ndf=4, nz=8, device="cpu", progress=False).fit(data.train, data.val)
        assert detector.weights == {winner: 1.0} and set(detector.memory.features) == {winner}
        again = Detector.load(detector.save(tmp_path / winner), device="cpu")
        assert again.weights == detector.weights and again.recipe == detector.recipe
        assert torch.equal(again.score(data.test), detector.score(data.test))


def test_weights_that_the_recipe_gives_are_taken_as_they_are():
    data = load_dataset("digits", 8, n_train=64)
    options = dict(epochs=1, batch_size=16, dim=4, ndf=4, nz=8, device="cpu", progress=False)
    assert Detector("gannext", recipe="defects", **options).fit(data.train, data.val).weights == {"near_patch": 1.0}
    detector = Detector("gannext", score=dict(near_map=0.5, rec=0.5), **options).fit(data.train, data.val)
    assert detector.weights == dict(near_map=0.5, rec=0.5) and set(detector.memory.features) == {"near_map"}
