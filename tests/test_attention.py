"""What chapter 02 does not show: Swin without a roll and a mask, torchvision's whole block, batches, precision, names, errors."""
import copy
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torchvision.models.swin_transformer import SwinTransformerBlock

from anogan.attention import (AttentionBlock, SwinBlock, WindowAttention, relative_position_index, shift_mask, window_partition,
                              window_reverse)
from anogan.errors import InputError


def attend_token_by_token(block, x):
    "Shifted window attention as it is meant: every token gathers the tokens of its window, cut off at the edges of the grid."
    layer, (_, grid, _, c) = block.attention, x.shape
    w, heads, table = block.window, layer.heads, layer.bias_table
    q, k, v = layer.qkv(x).unflatten(-1, (3, heads, c // heads)).unbind(3)
    def window_of(row, col): return (row - block.shift) // w, (col - block.shift) // w
    out, places = torch.zeros_like(x), [(r, s) for r in range(grid) for s in range(grid)]
    for row, col in places:
        mates = [p for p in places if window_of(*p) == window_of(row, col)]
        scores = torch.stack([(q[:, row, col] * k[:, r, s]).sum(-1) / math.sqrt(c // heads)
                              + table[(row - r + w - 1) * (2 * w - 1) + col - s + w - 1] for r, s in mates])
        weights = scores.softmax(0)[..., None]
        out[:, row, col] = (weights * torch.stack([v[:, r, s] for r, s in mates])).sum(0).flatten(1)
    return layer.proj(out)


@pytest.mark.parametrize("grid, window, shift", [(4, 2, 0), (4, 2, 1), (6, 2, 1), (6, 3, 1), (6, 3, 2), (8, 4, 2), (2, 2, 1), (1, 2, 1)])
def test_roll_and_mask_equal_windows_cut_off_at_the_edges(grid, window, shift):
    torch.manual_seed(0)
    block, x = SwinBlock(8, grid, 2, window, shift), torch.randn(2, grid, grid, 8)
    torch.nn.init.normal_(block.attention.bias_table)
    with torch.no_grad(): torch.testing.assert_close(block.attend(x), attend_token_by_token(block, x))


@pytest.mark.parametrize("window, shift", [(2, 0), (2, 1), (4, 2)])
def test_whole_block_equals_torchvisions(window, shift):
    torch.manual_seed(0)
    ours, x = SwinBlock(16, 8, 4, window, shift), torch.randn(2, 8, 8, 16)
    theirs = SwinTransformerBlock(16, 4, [window] * 2, [shift] * 2)
    theirs.norm1, theirs.norm2, theirs.mlp[0], theirs.mlp[3] = ours.norm1, ours.norm2, ours.mlp[0], ours.mlp[2]
    theirs.attn.qkv, theirs.attn.proj = ours.attention.qkv, ours.attention.proj
    theirs.attn.relative_position_bias_table = ours.attention.bias_table
    torch.testing.assert_close(ours(x), theirs.eval()(x))


def test_an_image_does_not_depend_on_its_companions():
    torch.manual_seed(0)
    block, x = AttentionBlock(8, grid=6, heads=2), torch.randn(5, 6, 6, 8)
    torch.testing.assert_close(block(x), torch.cat([block(one[None]) for one in x]))
    torch.testing.assert_close(block(x.flip(0)), block(x).flip(0))


def test_each_head_works_on_its_own_slice():
    torch.manual_seed(0)
    layer, x = WindowAttention(8, window=2, heads=2), torch.randn(3, 4, 8)
    changed = copy.deepcopy(layer)
    with torch.no_grad():
        for first_head in (0, 8, 16): changed.qkv.weight[first_head:first_head + 4] += 1  # rows of q, k, v that head 0 reads
        layer.proj.weight.copy_(torch.eye(8)), changed.proj.weight.copy_(torch.eye(8))
    same = layer(x).isclose(changed(x)).flatten(0, 1).all(0)
    assert same.tolist() == [False] * 4 + [True] * 4


def test_weights_are_weights_and_forbidden_pairs_get_none():
    torch.manual_seed(0)
    layer, q, k, mask = WindowAttention(8, 2, 2), torch.randn(32, 2, 4, 4), torch.randn(32, 2, 4, 4), shift_mask(8, 2, 1)
    weights = layer.weights(q, k, mask)
    torch.testing.assert_close(weights.sum(-1), torch.ones(32, 2, 4))
    forbidden = (mask < 0)[:, None].expand(-1, 2, -1, -1).repeat(2, 1, 1, 1)
    assert weights[forbidden].max() < 1e-30 < weights[~forbidden].min()


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 3), cols=st.integers(1, 3), window=st.integers(1, 4), batch=st.integers(1, 3))
def test_windows_hold_neighbours_and_come_back(rows, cols, window, batch):
    x = torch.arange(batch * rows * cols * window**2 * 2.).reshape(batch, rows * window, cols * window, 2)
    windows = window_partition(x, window)
    assert windows.shape == (batch * rows * cols, window**2, 2)
    assert window_reverse(windows, rows * window, cols * window).equal(x)
    assert windows[-1].equal(x[-1, -window:, -window:].flatten(0, 1))


@pytest.mark.parametrize("window", [1, 2, 3, 4])
def test_bias_index_depends_on_the_offset_only(window):
    index, seen = relative_position_index(window), {}
    for q in range(window**2):
        for k in range(window**2):
            offset = (q // window - k // window, q % window - k % window)
            assert seen.setdefault(offset, index[q, k].item()) == index[q, k].item()
    assert sorted(seen.values()) == list(range((2 * window - 1)**2))


def test_mask_is_symmetric_and_leaves_every_token_itself():
    mask = shift_mask(12, 4, 2)
    assert mask.equal(mask.transpose(1, 2)) and mask.diagonal(dim1=1, dim2=2).eq(0).all()
    assert mask.unique().tolist() == [-100, 0]
    assert [i for i, window in enumerate(mask) if window.any()] == [2, 5, 6, 7, 8]  # the last column and row of windows


def test_a_lone_token_attends_to_itself():
    block, x = AttentionBlock(8, grid=1), torch.randn(3, 1, 1, 8)
    layer = block.shifted.attention
    assert block.shifted.mask is None and block.shifted.shift == 0 and len(layer.bias_table) == 1
    torch.testing.assert_close(block.shifted.attend(x), layer.proj(layer.qkv(x)[..., 16:]))


def test_every_weight_learns():
    torch.manual_seed(0)
    block = AttentionBlock(8, grid=4)
    (block(torch.randn(2, 4, 4, 8)) * torch.randn(2, 4, 4, 8)).sum().backward()
    for name, p in block.named_parameters(): assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_mixed_precision_stays_close():
    torch.manual_seed(0)
    block, x = AttentionBlock(16, grid=8), torch.randn(2, 8, 8, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16): mixed = block(x)
    assert (mixed.float() - block(x)).abs().max() < 0.1
    half = copy.deepcopy(block).to(torch.bfloat16)(x.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16 and (half.float() - block(x)).abs().max() < 0.2


def test_names_of_saved_weights_never_change():
    names = ["norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attention.bias_table", "attention.qkv.weight",
             "attention.qkv.bias", "attention.proj.weight", "attention.proj.bias", "mlp.0.weight", "mlp.0.bias", "mlp.2.weight",
             "mlp.2.bias"]
    expected = [f"{part}.{name}" for part in ("plain", "shifted") for name in names] + ["norm.weight", "norm.bias"]
    assert sorted(AttentionBlock(8, grid=4).state_dict()) == sorted(expected)  # neither mask nor index


@pytest.mark.parametrize("wrong, words", [
    (lambda: WindowAttention(10, 2, 4), "use a dim that 4 divides"),
    (lambda: SwinBlock(8, grid=6, window=4), "windows of 4×4 tokens do not tile a grid of 6×6"),
    (lambda: SwinBlock(8, grid=8, window=2, shift=2), "shift of 2 does not fit windows of side 2"),
    (lambda: SwinBlock(8, grid=8, shift=-1), "use a shift from 0 to 1"),
    (lambda: SwinBlock(8, grid=8, shift=1)(torch.zeros(4, 4, 4, 8)), "grid of 8×8 tokens and got 4×4"),
])
def test_errors_say_what_to_do(wrong, words):
    with pytest.raises(InputError, match=words) as error: wrong()
    assert "\n" not in str(error.value)
