"What the detector's chapter cannot show: colours, resuming, damaged files, other data than its own."
import json

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HFValidationError

from anogan.data import ImageSet, load_dataset
from anogan.detector import GENERATORS, Detector, model_card
from anogan.errors import InputError

NARROW = {"anotrans": dict(dim=8), "gannext": dict(dim=8, depths=(1, 1, 1, 1)), "skipganomaly": dict(ngf=4), "sagan": dict(ngf=4)}


def narrow(model="gannext", **options):
    return Detector(model, epochs=1, batch_size=16, device="cpu", progress=False, ndf=8, nz=16, **NARROW[model], **options)


@pytest.fixture(scope="module")
def data():
    return load_dataset("digits", abnormal_class=3, n_train=64)


@pytest.fixture(scope="module", params=GENERATORS)
def fitted(request, data):
    return narrow(request.param).fit(data.train, data.val)


def test_scores_do_not_depend_on_batch_order_or_companions(fitted, data):
    x = data.test.stack()[:40]
    scores = fitted.score(x)
    order = torch.randperm(40)
    assert torch.allclose(fitted.score(x[order]), scores[order], rtol=0, atol=1e-5)
    assert torch.allclose(torch.cat([fitted.score(one[None]) for one in x]), scores, rtol=0, atol=1e-5)
    assert torch.allclose(torch.cat([fitted.score(part) for part in x.split(7)]), scores, rtol=0, atol=1e-5)


def test_save_and_load_keep_every_number(fitted, data, tmp_path):
    fitted.save(tmp_path / "model")
    for folder in (tmp_path, tmp_path / "model"):
        again = Detector.load(folder, device="cpu")
        assert torch.equal(again.score(data.test), fitted.score(data.test))
        assert torch.equal(again.heatmap(data.test.stack()[:3]), fitted.heatmap(data.test.stack()[:3]))
        assert again.threshold == fitted.threshold and json.dumps(again.config()) == json.dumps(fitted.config())


def test_a_fingerprint_is_of_the_numbers_and_not_of_the_object(fitted, tmp_path):
    again = Detector.load(fitted.save(tmp_path), device="cpu")
    assert again.fingerprint() == fitted.fingerprint()
    again.threshold += 1e-9
    moved = again.fingerprint()
    with torch.no_grad(): next(again.discriminator.parameters()).view(-1)[0] += 1e-3
    assert len({fitted.fingerprint(), moved, again.fingerprint()}) == 3


def test_a_detector_goes_to_the_hub_and_back(data, tmp_path, monkeypatch):
    "The hub is a folder here: what is asked of its client, and what becomes of what it gives."
    detector, asked = narrow().fit(data.train, data.val), []
    gift = detector.save_pretrained(tmp_path / "gift", data, detector.evaluate(data.test))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **how: asked.append((name, how)) or str(gift))
    again = Detector.from_pretrained("owner/name", device="cpu", revision="abc")
    assert asked == [("owner/name", dict(revision="abc", allow_patterns=["detector.json", "model.safetensors"]))]
    assert torch.equal(again.score(data.test), detector.score(data.test)) and again.threshold == detector.threshold
    (gift / "model.safetensors").write_bytes(b"something else")
    with pytest.raises(InputError, match="not the file that was saved"): Detector.from_pretrained("owner/name")


@pytest.mark.parametrize("fault", [OSError("no network\nat all"), HFValidationError("bad name")])
def test_a_hub_that_gives_nothing_is_one_sentence(fault, monkeypatch):
    def refuse(name, **how): raise fault
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(InputError, match=f"owner/name is no folder here.*{type(fault).__name__}") as error: Detector.from_pretrained("owner/name")
    assert "\n" not in str(error.value)


def test_a_model_card_is_read_by_the_hubs_own_client_and_hides_no_gap(data, tmp_path):
    detector = narrow().fit(data.train, data.val)
    metrics = detector.evaluate(data.test)
    card = huggingface_hub.ModelCard.load(detector.save_pretrained(tmp_path, data, metrics) / "README.md")
    assert card.data.library_name == "anogan" and card.data.tags == ["anomaly-detection", "gannext"]
    low, high = metrics["auroc_ci"]
    assert f"| auroc | {metrics['auroc']:.3f} [{low:.3f}, {high:.3f}] |" in card.text and f"| n_normal | {metrics['n_normal']} |" in card.text
    for part in ("64 normal images to train on", "abnormal: 3", data.manifest()["sha256"][:16], detector.fingerprint(), "## Limits"): assert part in card.text
    silent = model_card(detector)
    assert "Not stated." in silent and "| not stated | |" in silent
    assert "My own screws, 300 of them." in model_card(detector, "My own screws, 300 of them.")


def test_an_unfitted_detector_scores_no_files(tmp_path):
    with pytest.raises(InputError, match="call fit before score_files"): next(narrow(channels=1).score_files([tmp_path / "a.png"]))


def test_predictions_are_scores_above_the_threshold(fitted, data):
    scores = fitted.score(data.val)
    assert fitted.predict(data.val).tolist() == [int(s > fitted.threshold) for s in scores.tolist()]
    assert fitted.predict(data.val).double().mean() <= 0.05


def test_reconstructions_and_heat_maps_are_images_on_a_fixed_scale(fitted, data):
    x = data.test.stack()[:6]
    assert fitted.reconstruct(x).shape == x.shape
    heat = fitted.heatmap(x)
    assert heat.shape == (6, 32, 32) and heat.min() >= 0
    torch.testing.assert_close(fitted.heatmap(x[2:3])[0], heat[2])
    hottest = fitted.heatmap(data.val).amax(dim=(1, 2))
    assert 0 < (hottest > 1).double().mean() <= 0.1


@pytest.mark.parametrize("recipe", ["published", "recommended"])
@pytest.mark.parametrize("size", ["tiny", "small", "paper"])
@pytest.mark.parametrize("model", GENERATORS)
def test_every_model_has_every_preset_and_both_recipes(model, size, recipe):
    with torch.device("meta"): detector = Detector(model, size, channels=1, recipe=recipe, device="cpu")
    assert type(detector.generator) is GENERATORS[model] and detector.recipe.latent_in_d == (recipe == "published")
    assert sum(p.numel() for p in detector.generator.parameters()) > {"tiny": 1e5, "small": 4e5, "paper": 1.5e6}[size]


def test_the_width_of_the_u_nets_is_an_option_and_other_models_say_that_they_have_none():
    assert Detector("sagan", channels=1, ngf=8).generator.out.in_channels == Detector("skipganomaly", channels=1, ngf=8).generator.down[0][0].out_channels == 8
    with pytest.raises(InputError, match="unknown option 'ngf'"): Detector("gannext", ngf=8)
    with pytest.raises(InputError, match="unknown option 'dim'"): Detector("sagan", dim=8)


def test_fit_is_the_same_for_a_seed_and_leaves_the_callers_random_numbers_alone(data):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, two = narrow(seed=1).fit(data.train, data.val), narrow(seed=1).fit(data.train, data.val)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one.score(data.test), two.score(data.test))
    assert not torch.equal(one.score(data.test), narrow(seed=2).fit(data.train, data.val).score(data.test))


def test_the_test_set_has_no_way_into_fit(data):
    "Poison every test image: nothing a fitted detector holds may change."
    before = narrow().fit(data.train, data.val)
    data.test.pixels.fill_(255)
    after = narrow().fit(data.train, data.val)
    assert before.threshold == after.threshold and before.heat_scale == after.heat_scale and before.calibration == after.calibration
    assert all(torch.equal(a, b) for a, b in zip(before.generator.state_dict().values(), after.generator.state_dict().values()))
    data.test.pixels.copy_(load_dataset("digits", abnormal_class=3, n_train=64).test.pixels)


def test_the_published_recipe_keeps_raw_terms_and_no_memory(data):
    detector = narrow("gannext", recipe="published").fit(data.train, data.val)
    terms = detector.terms(data.test)
    assert detector.memory is None and set(terms) == {"rec", "lat"}
    assert torch.allclose(detector.score(data.test), 0.95 * terms["rec"] + 0.05 * terms["lat"])


def test_the_generator_runs_only_for_a_score_that_asks_for_it(data):
    runs = []
    for recipe, asks in (("recommended", False), ("published", True)):
        detector = narrow(recipe=recipe).fit(data.train, data.val)
        runs.clear()
        detector.generator.register_forward_hook(lambda *_: runs.append(1))
        detector.score(data.test)
        assert bool(runs) == asks
        assert {"rec", "lat"} <= set(detector.terms(data.test))


def test_published_networks_are_drawn_as_dcgan_draws_them():
    published, recommended = narrow(recipe="published", channels=1), narrow(channels=1)
    deviation = lambda d: float(d.generator.encoder[0][0].expand.weight.detach().std())
    assert abs(deviation(published) - 0.02) < 0.005 < abs(deviation(recommended) - 0.02)


def test_colour_images_as_plain_tensors():
    x = torch.rand(32, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    detector = narrow("anotrans").fit(x[:24], x[24:])
    assert detector.channels == 3 and detector.score(x).shape == (32,) and detector.reconstruct(x[:2]).shape == (2, 3, 32, 32)


def test_64_pixels():
    x = torch.rand(20, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    detector = Detector("gannext", isize=64, epochs=1, batch_size=4, device="cpu", progress=False, dim=8, depths=(1, 1, 1, 1), ndf=8).fit(x[:16], x[16:])
    assert detector.heatmap(x).shape == (20, 64, 64)


def test_the_memory_is_bounded(data, monkeypatch):
    monkeypatch.setattr("anogan.detector.MEMORY_SIZE", 10)
    assert {len(t) for t in narrow().fit(data.train, data.val).memory.features.values()} == {10}


def test_training_ends_early_when_asked_to(data):
    detector = Detector("gannext", epochs=5, batch_size=16, device="cpu", progress=False, dim=8, depths=(1, 1, 1, 1))
    assert len(detector.fit(data.train, data.val, on_epoch=lambda row: row["epoch"] == 2).history) == 2


@pytest.mark.parametrize("arguments, fault", [
    (dict(model="gan"), "unknown model"), (dict(size="huge"), "unknown size"), (dict(recipe="secret"), "unknown recipe"),
    (dict(isize=48, channels=1), "32, 64, 128 or 256"), (dict(wobble=1), "unknown option"),
])
def test_bad_choices_are_one_sentence(arguments, fault):
    with pytest.raises(InputError, match=fault) as e: Detector(**{"model": "gannext", **arguments})
    assert "\n" not in str(e.value)


def test_abnormal_images_may_not_train_or_validate(data):
    with pytest.raises(InputError, match="training set holds"): narrow().fit(data.test, data.val)
    with pytest.raises(InputError, match="validation set holds"): narrow().fit(data.train, data.test)


def test_unfitted_detectors_say_so(data, tmp_path):
    detector = narrow()
    for use in (lambda: detector.score(data.test), lambda: detector.save(tmp_path), lambda: detector.predict(data.test)):
        with pytest.raises(InputError, match="not fitted|no networks|no threshold"): use()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("damage, fault", [
    (lambda f: (f / "detector.json").unlink(), "holds no detector"),
    (lambda f: (f / "model.safetensors").unlink(), "holds no detector"),
    (lambda f: (f / "detector.json").write_text("{"), "not JSON"),
    (lambda f: (f / "model.safetensors").write_bytes(b"junk"), "not the file that was saved"),
    (lambda f: (f / "detector.json").write_text("[]"), "not a detector of format 4"),
    (lambda f: (f / "detector.json").write_text((f / "detector.json").read_text().replace('"gannext"', '"anotrans"')), "detector.json"),
])
def test_damaged_files_are_one_sentence(data, tmp_path, damage, fault):
    narrow().fit(data.train, data.val).save(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=fault) as e: Detector.load(tmp_path)
    assert "\n" not in str(e.value)


def test_the_heat_map_of_defects_is_that_of_its_score(data):
    "A square on a digit is hottest where it is, and a map is as hot as its image's score says, whatever the generator makes of it."
    detector = narrow("gannext", recipe="defects").fit(data.train, data.val)
    x = data.val.stack().clone()
    x[:, :, 24:30, 2:8] = 0.5
    heat = detector.heatmap(x)
    rows, cols = heat.flatten(1).argmax(dim=1) // 32, heat.flatten(1).argmax(dim=1) % 32
    assert ((rows >= 20) & (cols <= 12)).double().mean() > 0.8
    assert torch.corrcoef(torch.stack([heat.amax(dim=(1, 2)), detector.terms(x)["near_patch"]]))[0, 1] > 0.9
    with torch.no_grad(): detector.generator.out[-1].weight.zero_()
    assert torch.equal(detector.heatmap(x), heat)


def test_a_planted_defect_is_found_where_it_is():
    "Uniform grey images with a black square: the heat map is hottest inside it."
    train = ImageSet(torch.full((48, 1, 32, 32), 200, dtype=torch.uint8))
    detector = Detector("gannext", epochs=6, batch_size=16, device="cpu", progress=False, dim=8, depths=(1, 1, 1, 1)).fit(train, train.subset(range(8)))
    x = train.stack()[:1].clone()
    x[:, :, 4:10, 20:26] = -1
    row, col = divmod(int(detector.heatmap(x)[0].argmax()), 32)
    assert 3 <= row <= 10 and 19 <= col <= 26


def test_a_threshold_written_as_a_huge_integer_is_a_number(data, tmp_path):
    narrow().fit(data.train, data.val).save(tmp_path)
    path = tmp_path / "detector.json"
    facts = json.loads(path.read_text())
    for threshold, message in ((10**30, None), (10**400, "the threshold is 1000.*not a finite number")):
        path.write_text(json.dumps(facts | dict(threshold=threshold)))
        if message:
            with pytest.raises(InputError, match=message): Detector.load(tmp_path, "cpu")
        else: assert not Detector.load(tmp_path, "cpu").predict(data.test).any()


def test_scores_that_are_no_numbers_are_refused(data):
    detector = narrow().fit(data.train, data.val)
    with torch.no_grad(): detector.discriminator.layers[0][0].weight.fill_(1e38)
    for ask in (detector.score, detector.predict):
        with pytest.raises(InputError, match="values that are not finite: its weights are damaged"): ask(data.test)
