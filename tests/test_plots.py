"""Figures: what is drawn, what importing costs, and that no figure goes without its alternative text."""
import subprocess
import sys

import numpy as np
import pytest
import torch

from anogan import plots
from anogan.anotrans import AnoTrans
from anogan.errors import InputError
from anogan.gannext import GanNeXt


def test_import_needs_neither_notebook_nor_window():
    code = "import sys, anogan.plots; print(*[m for m in ('IPython', 'matplotlib.pyplot') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_new_figure_leaves_the_users_settings_alone():
    import matplotlib
    before = dict(matplotlib.rcParams)
    fig, ax = plots.new_figure()
    assert not ax.spines["top"].get_visible() and fig.get_facecolor() == (1, 1, 1, 1)
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("alt", ["", "  ", None])
def test_show_demands_an_alternative_text(alt):
    with pytest.raises(InputError, match="alternative text"): plots.show(plots.new_figure()[0], alt=alt)


def test_show_hands_a_png_with_its_text_to_the_notebook(monkeypatch):
    display = pytest.importorskip("IPython.display")
    shown = []
    monkeypatch.setattr(display, "display", shown.append)
    assert plots.show(plots.new_figure()[0], alt="an empty pair of axes") is None
    [image] = shown
    assert image.data.startswith(b"\x89PNG") and image.alt == "an empty pair of axes"


@pytest.mark.parametrize("channels", [1, 3])
def test_image_rows_draws_minus_one_black_and_one_white_and_clips(channels):
    images = torch.tensor([-3.0, -1.0, 1.0, 3.0]).view(4, 1, 1, 1).expand(4, channels, 2, 2).clone().requires_grad_()
    fig = plots.image_rows({"grey": images}, titles=list("abcd"))
    drawn = [ax.images[0].get_array() for ax in fig.axes]
    assert [float(d.min()) for d in drawn] == [float(d.max()) for d in drawn] == [0, 0, 1, 1]
    assert [ax.get_title() for ax in fig.axes] == list("abcd")
    assert fig.axes[0].texts[0].get_text() == "grey"


def test_maps_share_one_fixed_scale_and_rows_may_differ_in_length():
    fig = plots.image_rows({"images": torch.zeros(3, 1, 4, 4), "maps": np.full((2, 4, 4), 0.01)})
    faint = fig.axes[3].images[0]
    assert faint.get_clim() == (0, 1) and faint.get_cmap().name == "magma"
    assert not fig.axes[5].images and not fig.axes[5].axison


def test_score_histogram_counts_every_image_and_tells_the_groups_apart_without_colour():
    _, ax = plots.new_figure()
    plots.score_histogram(ax, torch.arange(10.0), [0] * 7 + [1] * 3, threshold=6.5)
    normal, abnormal = ax.containers
    assert sum(b.get_height() for b in normal) == 7 and sum(b.get_height() for b in abnormal) == 3
    assert abnormal[0].get_hatch() and not normal[0].get_hatch()
    assert {t.get_text() for t in ax.get_legend().get_texts()} == {"normal", "abnormal", "threshold"}


def test_roc_curve_of_a_perfect_detector_touches_the_corner():
    _, ax = plots.new_figure()
    plots.roc_curve_plot(ax, [0.1, 0.2, 0.8, 0.9], [0, 0, 1, 1], label="perfect", ls="--")
    assert (0.0, 1.0) in list(map(tuple, ax.lines[0].get_xydata())) and ax.lines[0].get_linestyle() == "--"
    assert ax.get_legend().get_texts()[0].get_text() == "perfect"
    _, plain = plots.new_figure()
    plots.roc_curve_plot(plain, [0.1, 0.9], [0, 1])
    assert plain.get_legend() is None


def boxes(net, side=32):
    "What stands in the boxes of the drawn network, and its text."
    fig, alt = plots.network_figure(net, torch.zeros(1, 1, side, side))
    return [text.get_text().split("\n") for text in fig.axes[0].texts if text.get_bbox_patch() and "×" in text.get_text()], alt


@pytest.mark.parametrize(("depths", "dim"), [((1, 1), 4), ((2, 1, 3), 8), ((1, 1, 1, 1, 2), 4)])
def test_the_drawn_gannext_is_the_one_given(depths, dim):
    drawn, alt = boxes(GanNeXt(isize=32, channels=1, dim=dim, depths=depths).eval())
    for i, n in enumerate(depths[:-1]):
        shape = f"{dim * 2**i}×{16 // 2**i}×{16 // 2**i}"
        for part in (f"encoder.{i}", f"decoder.{i}"): assert [part, f"{n} block{'s' * (n > 1)}", shape] in drawn and f"{part}, {n} block" in alt
        assert [f"skip.{i}", "1 block", shape] in drawn
    assert len(drawn) == 3 * (len(depths) - 1) + 3


def test_the_drawn_anotrans_says_which_skips_attend():
    net = AnoTrans(isize=32, channels=1, dim=8, depth=2)
    drawn, alt = boxes(net)
    assert ["skip.0", "attended skip", "16×16×8"] in drawn and ["skip.1", "plain skip", "8×8×16"] in drawn and ["bottom", "attention block", "4×4×32"] in drawn
    assert "encoder.2" not in alt and "encoder.2, attention block, 4×4×64" in boxes(AnoTrans(isize=32, channels=1, dim=16))[1]
    assert ["skip.0", "plain skip", "16×16×8"] in boxes(AnoTrans(isize=32, channels=1, dim=8, skip="plain"))[0]
    assert not any(module._forward_hooks for module in net.modules())
