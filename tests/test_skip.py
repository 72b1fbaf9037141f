"""Skips and fusing layers: what the chapter does not show."""
import pytest
import torch
import torch.nn.functional as F

from anogan.errors import InputError
from anogan.skip import AttendedSkip, FuseMaps, FuseTokens, PlainSkip, token_skip


def test_the_names_of_saved_weights_stay():
    assert list(FuseTokens(4).state_dict()) == list(FuseMaps(4).state_dict()) == ["mix.weight", "mix.bias"]
    assert not PlainSkip().state_dict()
    assert {name.split(".")[0] for name in AttendedSkip(8, 4).state_dict()} == {"plain", "shifted", "norm"}


def test_fusing_is_the_sum_of_two_linear_layers_decoder_first():
    torch.manual_seed(0)
    fuse, up, skip = FuseTokens(5), torch.randn(2, 3, 7, 5), torch.randn(2, 3, 7, 5)  # the grid need not be square
    from_up, from_skip = fuse.mix.weight.split(5, dim=1)
    torch.testing.assert_close(fuse(up, skip), F.linear(up, from_up, fuse.mix.bias) + F.linear(skip, from_skip))


def test_fusing_maps_is_a_convolution_of_the_concatenation():
    torch.manual_seed(0)
    fuse, up, skip = FuseMaps(5), torch.randn(2, 5, 3, 7), torch.randn(2, 5, 3, 7)
    by_hand = torch.einsum("oc,bchw->bohw", fuse.mix.weight[..., 0, 0], torch.cat([up, skip], 1)) + fuse.mix.bias[:, None, None]
    torch.testing.assert_close(fuse(up, skip), by_hand)


def test_fusing_mixes_no_places():
    fuse, up, skip = FuseTokens(4), torch.randn(1, 4, 4, 4), torch.randn(1, 4, 4, 4)
    changed = skip.clone()
    changed[0, 1, 2] += 1
    different = (fuse(up, changed) != fuse(up, skip)).any(dim=-1)[0]
    assert different.nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("fuse, shape", [(FuseTokens(4), (1, 2, 2, 4)), (FuseMaps(4), (1, 4, 2, 2))])
def test_gradients_reach_both_sides(fuse, shape):
    up, skip = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)
    fuse(up, skip).square().sum().backward()
    assert up.grad.abs().min() > 0 and skip.grad.abs().min() > 0


def test_a_plain_skip_takes_anything_and_an_attended_one_keeps_the_shape():
    assert token_skip("plain", 8, 4)(3) == 3
    for grid in (1, 2, 4, 8):
        tokens = torch.randn(2, grid, grid, 8)
        assert token_skip("attended", 8, grid)(tokens).shape == tokens.shape


def test_heads_and_window_are_passed_on():
    skip = token_skip("attended", 12, 9, heads=3, window=3)
    assert isinstance(skip, AttendedSkip)
    assert skip.plain.attention.heads == 3 and skip.plain.window == 3


@pytest.mark.parametrize("kind", ["", "Plain", "none", None])
def test_an_unknown_kind_is_one_sentence(kind):
    with pytest.raises(InputError, match="^unknown skip .*: choose attended or plain$"):
        token_skip(kind, 8, 4)
