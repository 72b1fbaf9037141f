"What the chapter on looking inside cannot show: stopping at every moment, failing in the background, other networks, odd input."
import threading
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from anogan import explore
from anogan.attention import SwinBlock
from anogan.data import load_dataset
from anogan.detector import Detector
from anogan.errors import InputError
from anogan.experiments import RunConfig, prepare
from anogan.explore import BackgroundTraining, Watched

NARROW = {"anotrans": dict(dim=8, ndf=8, nz=16), "gannext": dict(dim=8, depths=(1, 1, 1, 1), ndf=8, nz=16)}


def config(model="gannext", **changes):
    return RunConfig(abnormal_class="3", model=model, n_train=64, epochs=2, batch_size=16, options=NARROW[model], device="cpu", **changes)


@pytest.fixture(scope="module", params=NARROW)
def trained(request):
    progress = BackgroundTraining(config(request.param)).start().wait()
    assert progress.phase == "done", progress.sentence
    return progress


@pytest.fixture(scope="module")
def image():
    return load_dataset("digits", abnormal_class=3).test[0][0]


# ---------------------------------------------------------------- training in the background

def test_training_in_the_background_gives_what_training_in_the_foreground_gives(trained):
    data, detector = prepare(trained.result.config, progress=False)
    detector.fit(data.train, data.val)
    scores, threshold = trained.result.scores()
    assert torch.equal(scores, detector.score(data.test)) and threshold == detector.threshold
    assert [row["loss_g"] for row in trained.history] == [row["loss_g"] for row in detector.history]
    assert trained.step == trained.steps == 8 and trained.rebuilt.shape == trained.images.shape == (6, 1, 32, 32)


def test_two_trainings_at_once_do_not_disturb_each_other(trained):
    both = [BackgroundTraining(trained.result.config).start() for _ in range(2)]
    for training in both: assert torch.equal(training.wait().result.scores()[0], trained.result.scores()[0])


class StopAt(BackgroundTraining):
    "Stops itself when the news is such."
    def __init__(self, config, when):
        super().__init__(config)
        self.when = when

    def tell(self, **news):
        super().tell(**news)
        if self.when(self.progress): self.stop()


@pytest.mark.parametrize("when, epochs", [(lambda p: p.step == 6, 1), (lambda p: len(p.history) == 1, 1), (lambda p: len(p.history) == 2, 2)],
                         ids=["in an epoch", "between epochs", "at the end"])
def test_a_stopped_training_is_one_of_fewer_epochs(when, epochs):
    progress = StopAt(config(), when).start().wait()
    shorter = BackgroundTraining(replace(config(), epochs=epochs)).start().wait().result
    assert progress.phase == ("stopped" if epochs < 2 else "done") and len(progress.result.detector.history) == len(progress.history) == epochs
    assert torch.equal(progress.result.scores()[0], shorter.scores()[0]) and progress.result.scores()[1] == shorter.scores()[1]


def test_stopped_in_the_first_epoch_there_is_nothing_to_keep():
    progress = StopAt(config(), lambda p: p.step == 2).start().wait()
    assert progress.phase == "stopped" and progress.result is None and "nothing to keep" in progress.sentence


def test_stopped_while_it_waits_for_another():
    with explore.ONE_AT_A_TIME:
        training = BackgroundTraining(config()).start()
        assert training.running and "waiting" in training.progress.sentence
        training.stop()
        assert training.wait().phase == "stopped"


@pytest.mark.parametrize("change, sentence", [(dict(abnormal_class="twelve"), "unknown class"), (dict(n_train=9999), "n_train must be"),
                                              (dict(options=dict(lr=1e30)), "training diverged")])
def test_what_goes_wrong_ends_as_a_sentence(change, sentence):
    progress = BackgroundTraining(replace(config(), **change)).start().wait()
    assert progress.phase == "failed" and sentence in progress.sentence and "\n" not in progress.sentence and progress.result is None
    assert not explore.ONE_AT_A_TIME.locked()


def test_a_fault_of_ours_is_a_sentence_too(monkeypatch, caplog):
    def broken(*args): raise ZeroDivisionError("of all things")
    monkeypatch.setattr(explore, "judge", broken)
    progress = BackgroundTraining(config()).start().wait()
    assert progress.phase == "failed" and progress.sentence == "training broke off with an unexpected ZeroDivisionError: of all things"
    assert "ZeroDivisionError" in caplog.text


def test_the_callers_thread_is_free_while_it_trains():
    training = BackgroundTraining(replace(config(), epochs=500)).start()
    assert threading.current_thread() is not training.thread and training.running
    training.stop()
    training.wait()


def test_watched_images_are_the_images(tmp_path):
    for i in range(3): Image.new("L", (32, 32), 80 * i).save(tmp_path / f"{i}.png")
    from anogan.data import load_images
    taken = []
    for n, images in enumerate((load_images(tmp_path), load_dataset("digits", abnormal_class=3).val)):
        watched = Watched(images, lambda: taken.append(1)).to("cpu")
        assert isinstance(watched, Watched) and torch.equal(watched.stack(), images.stack()) and len(taken) == n + 1
        assert torch.equal(watched.labels, images.labels) and watched.ids == images.ids


# ---------------------------------------------------------------- thresholds and galleries

def test_counts_agree_with_scikit_learn():
    from sklearn.metrics import confusion_matrix
    rng = np.random.default_rng(0)
    for n in (1, 7, 300):
        scores, labels = rng.normal(size=n).round(1), rng.integers(0, 2, n)
        for threshold in (-1.0, 0.0, 0.3, 9.0):
            counts = explore.counts_at(scores, labels, threshold)
            passed, alarms, misses, hits = confusion_matrix(labels, scores > threshold, labels=[0, 1]).ravel()
            assert (counts.hits, counts.misses, counts.false_alarms, counts.passed) == (hits, misses, alarms, passed)


def test_rates_of_a_kind_that_is_missing_are_none():
    counts = explore.counts_at([1.0, 2.0], [0, 0], 1.5)
    assert counts.hit_rate is None and counts.hits == counts.misses == 0 and counts.false_alarm_rate == 0.5
    figure, text = explore.threshold_figure([1.0, 2.0], [0, 0], 1.5)
    assert len(figure.axes) == 1 and "one kind" in text


def test_the_recipes_weights_are_the_detectors_score(trained):
    judged = trained.result
    scores, threshold = judged.scores()
    assert torch.equal(scores, judged.detector.score(judged.test)) and threshold == judged.detector.threshold
    mixed, _ = judged.scores(explore.mixture(0.25))
    assert torch.allclose(mixed, 0.75 * judged.terms["rec"] + 0.25 * judged.terms["lat"])
    assert judged.config.model in str(judged) and "2 epochs" in str(judged)


def test_a_large_test_set_is_drawn_from(trained, monkeypatch):
    monkeypatch.setattr(explore, "TEST_LIMIT", 100)
    data, _ = prepare(trained.result.config, progress=False)
    judged = explore.judge(trained.result.config, data, trained.result.detector)
    share = data.test.labels.float().mean()
    assert len(judged.test) == len(judged.terms["rec"]) == 100 and abs(judged.test.labels.float().mean() - share) <= 0.01


# ---------------------------------------------------------------- inside the network

def test_attention_laid_out_on_the_grid_gives_what_the_block_computed(trained, image):
    detector = trained.result.detector
    if detector.model != "anotrans":
        with pytest.raises(InputError, match="no attention to look at"): explore.attention_of_patch(detector, image, 0, 0)
        return
    inputs = {}
    blocks = {name: m for name, m in detector.generator.named_modules() if isinstance(m, SwinBlock)}
    with explore.hooked({b.norm1: lambda m, _, out: inputs.update({m: out}) for b in blocks.values()}): detector.reconstruct(image[None])
    for row, col in ((0, 0), (5, 9), (15, 15)):
        found = explore.attention_of_patch(detector, image, row, col)
        assert {a.block for a in found} == set(blocks) and len(found) == len(blocks)
        for attention in found:
            block, x = blocks[attention.block], inputs[blocks[attention.block].norm1]
            assert torch.allclose(attention.weights.sum((1, 2)), torch.ones(4), atol=1e-5)
            values = block.attention.qkv(x)[0, ..., 2 * x.shape[-1]:].unflatten(-1, (4, -1))
            mixed = torch.einsum("hrc,rchd->hd", attention.weights, values).flatten()
            assert torch.allclose(block.attention.proj(mixed), block.attend(x)[0][attention.place], atol=1e-5)


def test_a_patch_that_is_not_there(trained, image):
    if trained.result.detector.model == "anotrans":
        with pytest.raises(InputError, match="rows and columns go from 0 to 15"): explore.attention_of_patch(trained.result.detector, image, 16, 0)


@pytest.mark.parametrize("model, options, ways", [("anotrans", dict(dim=8), None), ("gannext", dict(dim=8, depths=(1, 1, 1, 1)), "skip"),
                                                  ("sagan", dict(ngf=8), "attend"), ("skipganomaly", dict(ngf=8), None)])
def test_a_silenced_skip_is_a_network_without_it(model, options, ways, image):
    class Nothing(torch.nn.Module):
        def forward(self, x): return torch.zeros_like(x)

    detector = Detector(model, channels=1, ndf=8, nz=16, device="cpu", **options)
    generator, (bottom, skips) = detector.generator, detector.generator.encode(image[None])
    contents = explore.skip_contents(detector, image)
    assert [c.stage for c in contents] == list(range(len(skips))) and len(skips) >= 3
    for i, content in enumerate(contents):
        mute = deepcopy(generator)
        if ways:
            getattr(mute, ways)[i] = Nothing()
            without = mute(image[None])[0].detach()
        else: without = generator.decode(bottom, [torch.zeros_like(s) if i == j else s for j, s in enumerate(skips)])[0].detach()
        change = (generator(image[None])[0] - without).abs().mean().item()
        assert torch.allclose(content.without, without, atol=1e-6) and content.change == pytest.approx(change)
        side = skips[i].shape[2]
        passed = skips[i] if model in ("anotrans", "skipganomaly") else getattr(generator, ways)[i](skips[i])  # AnoTrans's encoder hands over what has passed
        carried = passed[0].abs().mean(-1 if model == "anotrans" else 0)
        assert content.carried.shape == (side, side) and torch.allclose(content.carried, carried / carried.max(), atol=1e-5)
    assert torch.equal(detector.reconstruct(image[None]), generator(image[None]).detach())  # no hook is left


# ---------------------------------------------------------------- choosing and bringing images

def test_every_data_set_offers_something_to_find():
    from anogan.data import DATASETS
    choices = {name: explore.abnormal_choices(name) for name in DATASETS}
    assert choices["digits"] == tuple("0123456789") and choices["elpv"] == choices["mvtec"] == choices["folder"] == (None,)


def test_examples_show_both_kinds():
    shown = explore.examples(config(), n=4)
    assert {name: tuple(x.shape) for name, x in shown.items()} == dict(normal=(4, 1, 32, 32), abnormal=(4, 1, 32, 32))
    assert list(explore.examples(replace(config(), abnormal_class=None))) == ["normal"]


def test_a_broken_upload_is_named_and_keeps_nobody_out(tmp_path):
    Image.new("RGB", (50, 40), "red").save(tmp_path / "good.png")
    good = (tmp_path / "good.png").read_bytes()
    images, faults = explore.read_uploads({"good.png": good, "half.png": good[:40], "../notes.txt": b"hello", "empty.png": b""}, 32, 3)
    assert images.ids == ["good.png"] and images.stack().shape == (1, 3, 32, 32)
    assert len(faults) == 3 and "half.png" in faults[0] and "../notes.txt: it is not an image" in faults[1] and "it is empty" in faults[2]
    assert not any("/tmp" in fault or "upload" in fault for fault in faults)
    assert explore.read_uploads({"empty.png": b""}, 32, 1)[0] is None


# ---------------------------------------------------------------- pictures

def test_pictures_carry_their_text_escaped():
    figure, _ = explore.new_figure()
    text = explore.picture(figure, 'a "quoted" <text>')
    assert 'alt="a &quot;quoted&quot; &lt;text&gt;"' in text and text.startswith('<img src="data:image/png;base64,')


@pytest.mark.parametrize("channels", [1, 3])
def test_thumbnails_show_the_pixels(channels):
    import base64
    import io
    image = torch.stack([torch.linspace(-1, 1, 16).view(4, 4)] * channels)
    data = explore.thumbnail(image, "a ramp").split("base64,")[1].split('"')[0]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    assert pixels.shape == ((4, 4) if channels == 1 else (4, 4, 3)) and pixels.flatten()[0] == 0 and pixels.flatten()[-1] == 255


def test_patch_colours_by_hand():
    image = torch.tensor([[[-1.0, -1, 1, 1], [-1, -1, 1, 1], [0, 0, -1, 1], [0, 0, 1, -1]]])
    assert explore.patch_colours(image, 2) == ["#000000", "#ffffff", "#7f7f7f", "#7f7f7f"]
    assert explore.patch_colours(torch.stack([torch.ones(2, 2), -torch.ones(2, 2), -torch.ones(2, 2)]), 1) == ["#ff0000"]


def test_every_figure_says_what_it_shows(trained, image):
    judged, detector = trained.result, trained.result.detector
    scores, threshold = judged.scores()
    pictures = [explore.losses_figure(trained.history), explore.rebuilt_figure(trained.images, trained.rebuilt),
                explore.threshold_figure(scores, judged.test.labels, threshold), explore.image_figure(detector, image),
                explore.skips_figure(explore.skip_contents(detector, image)), explore.own_figure(detector, judged.test, scores)]
    if detector.model == "anotrans":
        found = explore.attention_of_patch(detector, image, 3, 4)
        pictures += [explore.attention_figure(image, found), explore.attention_figure(image, found, head=2)]
    for figure, text in pictures: assert len(text) > 40 and len(explore.picture(figure, text)) > 5000
