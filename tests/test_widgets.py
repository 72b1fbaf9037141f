"The explorer without a browser: every control, on tiny networks, with an event loop and without one."
import asyncio
import re
import subprocess
import sys
from dataclasses import replace
from datetime import datetime

import pytest
import torch
from PIL import Image

from anogan import widgets
from anogan.experiments import RunConfig
from anogan.widgets import Explorer

NARROW = {"anotrans": dict(dim=8, ndf=8, nz=16), "gannext": dict(dim=8, depths=(1, 1, 1, 1), ndf=8, nz=16)}
CONFIG = RunConfig(abnormal_class="3", n_train=64, epochs=1, batch_size=16, options=NARROW["anotrans"], device="cpu")


@pytest.fixture
def use():
    "Open an explorer and do something with it in an event loop, as a kernel would."
    def use(do, config=CONFIG):
        async def whole():
            explorer = Explorer(config)
            await explorer.idle()
            await do(explorer)
        asyncio.run(whole())
    return use


async def train(explorer):
    explorer.training.train_button.click()
    await explorer.idle()


def alt(place): return re.search('alt="(.*?)"', place.value)[1]


def test_a_data_set_brings_what_is_usual_for_it(use):
    async def do(explorer):
        training = explorer.training
        assert (training.recipe.value, training.config().n_train, training.config().isize) == ("recommended", 64, 32)
        training.dataset.value = "folder"
        await explorer.idle()
        training.side.value = 64
        config = training.config()
        assert (config.recipe, config.n_train, config.isize) == ("defects", None, 64)
    use(do)


def test_train_explore_look_inside(use):
    async def do(explorer):
        training, scores, inside = explorer.training, explorer.scores, explorer.inside
        assert "abnormal class 3: 6 normal, 6 abnormal" in alt(training.examples) and scores.view.children == (scores.empty,)
        await train(explorer)
        assert "trained for 1 epoch<" in training.message.value and training.bar.value == training.bar.max == 4
        assert training.stop_button.disabled and not training.train_button.disabled
        assert alt(training.losses).startswith("Losses over 1") and "6 normal validation images" in alt(training.rebuilt)
        judged = scores.trained[0]
        assert f"<b>{judged.detector.evaluate(judged.test)['auroc']:.3f}</b>" in scores.auroc.value and f"{judged.rival:.3f}" in scores.compared.value
        assert "This is the frozen threshold" in scores.counts.value

        worst = scores.places[0][0][1]
        assert inside.number.value == worst.number == int((scores.now[0] - 100 * judged.test.labels).argmax())
        before = scores.counts.value, alt(scores.figure)
        scores.threshold.value = scores.threshold.min
        await explorer.idle()
        assert "100.0%" in scores.counts.value and "promise nothing" in scores.counts.value and "100.0% hits" in alt(scores.figure)
        scores.frozen.click()
        await explorer.idle()
        assert (scores.counts.value, alt(scores.figure)) == before

        scores.kind.value = "mixed"
        scores.lat.value = 1.0
        await explorer.idle()
        assert torch.equal(scores.now[0], judged.terms["lat"]) and not scores.lat.disabled

        inside.number.value = 7
        inside.buttons[16 * 3 + 5].click()
        await explorer.idle()
        assert (inside.row.value, inside.col.value) == (3, 5) and "Test image 7" in inside.about.value
        mean = alt(inside.attention)
        inside.head.value = "2"
        await explorer.idle()
        assert alt(inside.attention) != mean and alt(inside.skips).startswith("What each skip carried")
    use(do)


def test_detectors_stay_for_comparison(use):
    async def do(explorer):
        training, scores = explorer.training, explorer.scores
        await train(explorer)
        first = scores.auroc.value, [image.value for places in scores.places for image, _ in places]
        training.model.value, training.abnormal.value, training.start = "gannext", "0", replace(CONFIG, options=NARROW["gannext"])
        await train(explorer)
        assert scores.compared.value.count("<tr>") == 3 and scores.detector.value == 1
        assert scores.auroc.value != first[0] and explorer.inside.patches.layout.display == "none"
        scores.detector.value = 0
        await explorer.idle()
        assert (scores.auroc.value, [image.value for places in scores.places for image, _ in places]) == first
        assert explorer.inside.patches.layout.display == ""
    use(do)


def test_range_and_threshold_reach_the_page_in_one_message(use, monkeypatch):
    "Told the range alone, the page would pull the old threshold into it and send that back, and the kernel would take it for a reader's wish."
    async def do(explorer):
        await train(explorer)
        slider, sent = explorer.scores.threshold, []
        monkeypatch.setattr(slider, "send_state", lambda key=None: sent.append({key} if isinstance(key, str) else set(key)))
        explorer.scores.kind.value = "mixed"
        await explorer.idle()
        assert sent and all({"min", "max", "value"} <= names for names in sent if names & {"min", "max"}), sent
    use(do)


def test_stop_keeps_whole_epochs(use):
    async def do(explorer):
        explorer.training.epochs.value = 500
        explorer.training.train_button.click()
        while not explorer.training.losses.value: await asyncio.sleep(0.01)
        explorer.training.stop_button.click()
        await explorer.idle()
        kept = int(re.search(r"stopped; (\d+) of 500 epochs are kept", explorer.training.message.value)[1])
        assert 0 < kept < 500 and len(explorer.scores.trained[0].detector.history) == kept
    use(do)


def test_faults_are_sentences_on_the_page(use, monkeypatch):
    async def do(explorer):
        training = explorer.training
        training.n_train.value = 10**6
        await train(explorer)
        assert 'role="alert">⚠ n_train must be from 1' in training.message.value and not training.train_button.disabled and not explorer.scores.trained
        training.dataset.value = "cifar10"
        await explorer.idle()
        assert "is not at hand" in training.message.value and training.examples.value == "" and training.abnormal.value == "airplane"
        training.dataset.value = "mvtec"
        await explorer.idle()
        assert training.abnormal.options == (("every defect", ""),) and training.config().abnormal_class is None
        training.dataset.value = "digits"
        await explorer.idle()
        assert training.message.value == "" and "digits" in alt(training.examples)
        def broken(config): raise ZeroDivisionError("of all things")
        monkeypatch.setattr(widgets, "examples", broken)
        training.abnormal.value = "5"
        await explorer.idle()
        assert "unexpected ZeroDivisionError: of all things" in training.message.value
    use(do)


def test_own_images(use, tmp_path):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "<red>.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "<red>.png").read_bytes()[:50])
    (tmp_path / "good").mkdir()
    for i in range(3): Image.new("L", (32, 32), 100 * i).save(tmp_path / "good" / f"{i}.png")

    async def do(explorer):
        own = explorer.own
        own.folder.value = str(tmp_path / "good")
        own.read_button.click()
        await explorer.idle()
        assert "train one first" in own.message.value
        await train(explorer)
        own.read_button.click()
        await explorer.idle()
        assert own.message.value == "" and own.listed.value.count("<tr>") == 4 and alt(own.figure).startswith("3 of 3 images")
        files = [dict(name=p.name, type="image/png", size=1, content=memoryview(p.read_bytes()), last_modified=datetime.now()) for p in tmp_path.glob("*.png")]
        own.upload.value = files
        await explorer.idle()
        assert "cannot read the image half.png" in own.message.value and "&lt;red&gt;.png" in own.listed.value and own.upload.value == ()
        own.folder.value = str(tmp_path / "none")
        own.read_button.click()
        await explorer.idle()
        assert "there is no such file" in own.message.value
    use(do)


def test_of_many_requests_for_one_picture_the_newest_wins():
    drawn = []
    def draw(n):
        drawn.append(n)
        return f"<p>{n}</p>"

    async def do():
        panel, place = widgets.Panel(), widgets.w.HTML()
        for n in range(50): panel.show(place, draw, n)
        await panel.idle()
        return place.value
    assert asyncio.run(do()) == "<p>49</p>" and len(drawn) < 50 and drawn[-1] == 49


def test_without_an_event_loop_it_works_one_thing_after_the_other():
    explorer = Explorer(CONFIG)
    explorer.training.train_button.click()
    assert "trained for 1 epoch<" in explorer.training.message.value and explorer.scores.trained and explorer.inside.skips.value


def test_a_notebook_shows_it():
    assert "application/vnd.jupyter.widget-view+json" in Explorer(CONFIG)._repr_mimebundle_()


def test_only_this_module_needs_ipywidgets():
    code = "import sys, anogan.detector, anogan.explore; print('ipywidgets' in sys.modules, 'IPython' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == ["False", "False"]
