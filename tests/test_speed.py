"The benchmark of speed: what it compares is the same arithmetic, what it tells is what was measured. No time is tested."
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from anogan.trainer import PUBLISHED, gan_step

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("speed", ROOT / "benchmarks" / "speed.py")
speed = importlib.util.module_from_spec(spec)
spec.loader.exec_module(speed)

CELL = dict(task="train", model="gannext", size="tiny", isize=32, batch=4, images=4, ways=[])


def test_the_released_style_step_and_ours_move_the_weights_alike():
    x = torch.rand(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    theirs, ours = ([network.double() for network in networks] for networks in (speed.build_released(CELL, "cpu"), speed.build(CELL)))
    speed.released_step(*theirs, *(torch.optim.SGD(network.parameters(), 0.1) for network in theirs), x)
    gan_step(*ours, *(torch.optim.SGD(network.parameters(), 0.1) for network in ours), x, x, PUBLISHED)
    for a, b in zip(theirs, ours): torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=1e-9, atol=1e-12)


def test_both_ways_to_load_give_the_same_batches():
    cell = CELL | dict(images=8)
    images = speed.random_images(cell)
    one_by_one = torch.cat([x for x, _ in speed.loader_of(images, 4, shuffle=False)])
    torch.testing.assert_close(one_by_one, torch.cat(list(speed.iterate(images, 4))), rtol=0, atol=1e-6)


def test_the_flops_of_a_step_are_counted_by_definition():
    "A depthwise convolution's gradients cost twice its forward pass."
    with torch.device("meta"): conv, x = torch.nn.Conv2d(8, 8, 5, padding=2, groups=8), torch.empty(1, 8, 16, 16, requires_grad=True)
    with speed.FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: speed.convolution_backward}) as counter:
        conv(x).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 25 * 8 * 256


def made_up(seconds, isize=32, batch=128, size="paper", ways=speed.RECIPES):
    ways = {name: dict(seconds=[s, s, s], flops=10**9, bytes=2**20) for name, s in zip([speed.OLD, *ways], seconds)}
    return dict(task="train", model="gannext", size=size, isize=isize, batch=batch, images=batch, ways=ways)


def test_tables_tell_what_was_measured():
    growth = [made_up((n**2 / 100, n / 100), isize=n, batch=4, ways=["recommended"]) for n in (32, 64, 128)]
    facts = dict(limits=dict(fp32=10**10), cells=[made_up((8.0, 4.0, 2.0, 1.0)), *growth], profiles=[])
    assert speed.ratio(facts["cells"][0], "recommended") == (8, 8, 8)
    found = {(what, name): round(slope, 6) for _, what, name, slope, _ in speed.exponents(facts)}
    assert found == {("pixels of an image", speed.OLD): 1.0, ("pixels of an image", "recommended"): 0.5}
    assert "| training | gannext | 32×32 | 128 | recommended | 128 | 8.00× (8.00 to 8.00) |" in speed.short_table(facts)
    assert "| recommended | 128 (128 to 128) | 8.00× (8.00 to 8.00) | 1 | 1 | 10% |" in speed.table(facts)


@pytest.mark.parametrize("path", sorted(speed.RESULTS.glob("speed-*.json")), ids=lambda path: path.stem)
def test_what_was_measured_can_be_told(path):
    facts = json.loads(path.read_text())
    assert speed.report(facts).count("\n| ") > len(facts["cells"])
    assert all(s > 0 for cell in facts["cells"] for way in cell["ways"].values() for s in way["seconds"])
    found = {(model, what) for model, what, *_ in speed.exponents(facts)}
    assert found >= {("anotrans", "pixels of an image")} | ({("gannext", "width")} if path.stem == "speed-cpu" else set())


def test_the_readme_tells_what_was_measured():
    rows = [row for row in speed.short_table(json.loads((speed.RESULTS / "speed-cpu.json").read_text())).splitlines() if "| 128 |" in row]
    assert len(rows) > 10 and set(rows) <= set((ROOT / "README.md").read_text().splitlines())
