"""What chapter 01 does not show: other shapes, colours, who writes which pixel, names of the weights, errors."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from anogan.errors import AnoganError, InputError
from anogan.patches import (LayerNorm, PatchEmbed, PatchExpanding, PatchMerging, PatchRestore, PositionEmbedding, gather_neighbours,
                            scatter_rows, spread)

sizes = st.integers(1, 5)


@settings(max_examples=25, deadline=None)
@given(h=sizes, w=sizes, c=st.integers(1, 3), factor=st.integers(1, 4))
def test_spread_writes_each_value_into_its_own_patch(h, w, c, factor):
    x = torch.arange(2 * h * w * factor**2 * c).reshape(2, h, w, factor**2 * c)
    fine = spread(x, factor)
    for row in range(h * factor):
        for col in range(w * factor):
            place = (row % factor) * factor + col % factor
            assert fine[:, row, col].equal(x[:, row // factor, col // factor, place * c:(place + 1) * c])


@settings(max_examples=25, deadline=None)
@given(h=sizes, w=sizes, factor=st.integers(1, 4))
def test_scatter_rows_keeps_every_value_in_the_band_of_its_row_and_agrees_with_spread_on_single_columns(h, w, factor):
    x = torch.arange(h * w * factor**2).reshape(1, h, w, factor**2)
    scattered, right = scatter_rows(x, factor), spread(x, factor)
    assert scattered.shape == right.shape
    for row in range(h):
        band = slice(row * factor, (row + 1) * factor)
        assert scattered[:, band].flatten().sort().values.equal(right[:, band].flatten().sort().values)
    assert scattered.equal(right) == (factor == 1 or w == 1)


def test_embedding_a_picture_moved_by_one_patch_moves_the_tokens():
    torch.manual_seed(0)
    embed, x = PatchEmbed(channels=3, dim=10, patch_size=4), torch.randn(2, 3, 16, 24)
    assert embed(x).shape == (2, 4, 6, 10)
    torch.testing.assert_close(embed(x.roll((4, -8), dims=(2, 3))), embed(x).roll((1, -2), dims=(1, 2)))


def test_a_token_depends_on_its_own_patch_only():
    embed, x = PatchEmbed(channels=1, dim=10, patch_size=4), torch.randn(1, 1, 16, 16, requires_grad=True)
    (embed(x)[0, 2, 1] * torch.randn(10)).sum().backward()
    rows, cols = x.grad[0, 0].nonzero().T
    assert (rows.min(), rows.max(), cols.min(), cols.max()) == (8, 11, 4, 7)


def test_tokens_are_normalised_across_their_width():
    tokens = PatchEmbed(channels=1, dim=50, patch_size=2)(torch.randn(4, 1, 8, 8))
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(4, 4, 4), atol=1e-5, rtol=0)
    assert (tokens.var(-1, unbiased=False) - 1).abs().max() < 0.01


def test_positions_start_small_and_collect_the_gradient_of_the_whole_batch():
    torch.manual_seed(0)
    position = PositionEmbedding(grid=16, dim=32)
    assert 0.018 < position.position.std() < 0.022
    position(torch.zeros(5, 16, 16, 32)).sum().backward()
    assert position.position.grad.eq(5).all()


def test_merging_and_expanding_work_on_oblong_grids():
    x = torch.randn(2, 4, 6, 8)
    assert PatchMerging(8)(x).shape == (2, 2, 3, 16)
    assert PatchExpanding(8)(x).shape == (2, 8, 12, 4)
    assert gather_neighbours(x)[1, 1, 2].equal(torch.cat([x[1, 2, 4], x[1, 3, 4], x[1, 2, 5], x[1, 3, 5]]))


@pytest.mark.parametrize("layout, rows, cols", [("patch", (4, 5), (2, 3)), ("released", (4, 4), (4, 7))])
def test_a_token_writes_these_pixels(layout, rows, cols):
    torch.manual_seed(0)
    restore, x = PatchRestore(dim=6, channels=3, factor=2, layout=layout), torch.randn(1, 4, 4, 6)
    changed = x.clone()
    changed[0, 2, 1] += 1
    r, c = (restore(x) != restore(changed)).any(1)[0].nonzero().T
    assert (r.min(), r.max(), c.min(), c.max()) == (*rows, *cols) and len(r) == 4


def test_colours_stay_together_when_pixels_are_laid_out():
    restore = PatchRestore(dim=12, channels=3, factor=2)
    with torch.no_grad():
        for p, value in zip(restore.parameters(), (torch.eye(12), torch.zeros(12), torch.eye(3)[:, :, None, None])): p.copy_(value)
    image = restore(torch.arange(12.).reshape(1, 1, 1, 12))
    assert image[0].flatten(1).T.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]  # red, green, blue of each pixel


def test_restore_is_not_squashed_to_the_range_of_images():
    restore = PatchRestore(dim=4, channels=1, factor=1)
    with torch.no_grad(): restore.expand.bias.fill_(50.0), restore.mix.weight.fill_(1.0)
    assert restore(torch.zeros(1, 2, 2, 4)).eq(50).all()


@pytest.mark.parametrize("module, names", [
    (PatchEmbed(3, 4, 2), ["proj.weight", "proj.bias", "norm.weight", "norm.bias"]),
    (PositionEmbedding(2, 4), ["position"]),
    (PatchMerging(4), ["norm.weight", "norm.bias", "reduction.weight"]),
    (PatchExpanding(4), ["expand.weight", "norm.weight", "norm.bias"]),
    (PatchRestore(4, 3, 2), ["expand.weight", "expand.bias", "mix.weight"]),
], ids=lambda value: type(value).__name__)
def test_names_of_saved_weights_never_change(module, names):
    assert list(module.state_dict()) == names


@pytest.mark.parametrize("wrong, words", [
    (lambda: PatchEmbed(1, 4, 4)(torch.zeros(1, 1, 32, 30)), "32×30 pixels"),
    (lambda: PositionEmbedding(8, 4)(torch.zeros(1, 1, 1, 4)), "build the network for this image side"),
    (lambda: PositionEmbedding(1, 4)(torch.zeros(1, 8, 8, 4)), "build the network for this image side"),
    (lambda: PatchMerging(4)(torch.zeros(1, 4, 5, 4)), "4×5 tokens"),
    (lambda: PatchExpanding(7), "even dim"),
    (lambda: PatchRestore(4, 3, 2, layout="Patch"), "'Patch': choose one of patch, released"),
])
def test_errors_say_what_to_do(wrong, words):
    with pytest.raises(InputError, match=words) as error: wrong()
    assert isinstance(error.value, AnoganError) and "\n" not in str(error.value)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_layer_norm_keeps_the_format_and_computes_in_float32():
    norm, usual = LayerNorm(64).cuda(), torch.nn.LayerNorm(64).cuda()
    for p, q in zip(norm.parameters(), usual.parameters()): p.data.copy_(torch.randn(64).bfloat16()), q.data.copy_(p.data)
    for middle in (0, 100):  # so far from 0, sums in bfloat16 would lose what varies
        x = middle + torch.randn(512, 64, device="cuda")
        assert torch.equal(norm(x), usual(x))
        with torch.autocast("cuda", torch.bfloat16): y = norm(x.bfloat16())
        exact = F.layer_norm(x.bfloat16().double(), (64,), usual.weight.double(), usual.bias.double())
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.double(), exact, rtol=2**-7, atol=1e-2)
        if middle == 0: (y * x).sum().backward(), (exact * x).sum().backward()
    for p, q in zip(norm.parameters(), usual.parameters()): assert (p.grad - q.grad).norm() < 0.05 * q.grad.norm()
