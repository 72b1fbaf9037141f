"""AnoTrans: sizes, names of weights, gradients, and what one image may know of another."""
import re

import pytest
import torch

from anogan import anotrans
from anogan.anotrans import AnoTrans, check_sizes
from anogan.errors import InputError
from anogan.skip import AttendedSkip, PlainSkip


def tiny(**changes):
    torch.manual_seed(0)
    return AnoTrans(**{"channels": 1, "dim": 8, **changes})


def runs(isize, **sizes):
    with torch.device("meta"):
        return AnoTrans(isize, 1, 8, **sizes)(torch.empty(1, 1, isize, isize)).shape == (1, 1, isize, isize)


@pytest.mark.parametrize("patch_size, depth, window", [(2, 3, 2), (4, 2, 2), (2, 1, 3), (6, 1, 2)])
def test_sizes_pass_exactly_where_the_network_runs(patch_size, depth, window, monkeypatch):
    sizes = dict(patch_size=patch_size, depth=depth, window=window)
    refused = []
    for isize in (*range(5), *range(8, 81, 8)):
        try: check_sizes(isize, 8, **sizes)
        except InputError as error:
            refused.append(isize)
            for other in re.findall(r"\d+", str(error).split("use ")[-1].replace("isize ", "")): check_sizes(int(other), 8, **sizes)
        else: assert runs(isize, **sizes)
    assert 5 <= len(refused) < 15
    monkeypatch.setattr(anotrans, "check_sizes", lambda *args: None)
    for isize in refused:
        with pytest.raises((InputError, RuntimeError, ZeroDivisionError)): runs(isize, **sizes)


@pytest.mark.parametrize("isize, channels, patch_size, size", [
    (32, 3, 2, "paper"), (32, 1, 4, "small"), (64, 1, 2, "tiny"), (128, 3, 4, "tiny"), (256, 1, 2, "tiny"), (256, 3, 4, "paper")])
def test_sizes_run_from_32_to_256_pixels_grey_and_colour(isize, channels, patch_size, size):
    with torch.device("meta"):
        net = AnoTrans(isize, channels, patch_size=patch_size, **AnoTrans.sizes[size])
        assert net(torch.empty(2, channels, isize, isize)).shape == (2, channels, isize, isize)


@pytest.mark.parametrize("sizes, words", [
    (dict(isize=0), "use 16 or 32"),
    (dict(isize=300), "multiple of 16; use 288 or 320"),
    (dict(isize=80), "5×5 tokens at stage 3"),
    (dict(patch_size=0), "cannot be halved"), (dict(patch_size=5), "cannot be halved"),
    (dict(dim=0), "use an even multiple of 4"), (dict(dim=5, heads=1), "dim 5 is odd"),
    (dict(layout="rows"), "unknown layout"), (dict(skip="none"), "unknown skip")])
def test_what_does_not_fit_is_one_sentence(sizes, words):
    with pytest.raises(InputError, match=words) as caught: tiny(**sizes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(1, 1, 64, 64), (1, 3, 32, 32), (1, 32, 32), (32, 32)])
def test_a_wrong_image_is_one_sentence(shape):
    with pytest.raises(InputError, match=r"takes images of \(1, 32, 32\)"): tiny()(torch.zeros(shape))


def test_the_names_of_saved_weights_stay():
    keys = list(tiny().state_dict())
    assert len(keys) == 287 and len(list(tiny(skip="plain").state_dict())) == 287 - 2 * 28
    assert {key.split(".")[0] for key in keys} == {"embed", "encoder", "merge", "bottom", "expand", "skip", "fuse", "decoder", "restore"}
    assert {"embed.0.proj.weight", "embed.1.position", "encoder.2.shifted.attention.bias_table", "merge.0.reduction.weight",
            "expand.3.expand.weight", "skip.1.plain.mlp.2.bias", "fuse.0.mix.weight", "restore.mix.weight"} <= set(keys)


def test_weights_go_from_one_network_to_another():
    one, other, x = tiny(), AnoTrans(channels=1, dim=8), torch.randn(2, 1, 32, 32)
    assert not torch.equal(one(x), other(x))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(x), other(x))


def test_the_deepest_skip_is_plain():
    assert [type(skip) for skip in tiny().skip] == [AttendedSkip, AttendedSkip, PlainSkip]
    assert [type(skip) for skip in tiny(depth=1).skip] == [PlainSkip]
    assert [type(skip) for skip in tiny(skip="plain").skip] == [PlainSkip] * 3


def test_skips_carry_what_each_stage_receives():
    net, x, received = tiny().eval(), torch.randn(2, 1, 32, 32), []
    for skip in net.skip: skip.register_forward_hook(lambda skip, args, out: received.append(args[0]))
    bottom, handed_over = net.encode(x)
    assert [skip(s).equal(out) for skip, s, out in zip(net.skip, list(received), handed_over)] == [True] * 3
    skips = received[:3]
    assert bottom.shape == (2, 2, 2, 64)
    assert [tuple(s.shape) for s in skips] == [(2, 16, 16, 8), (2, 8, 8, 16), (2, 4, 4, 32)]
    torch.testing.assert_close(skips[0], net.embed(x), rtol=0, atol=0)
    torch.testing.assert_close(skips[2], net.merge[1](net.encoder[1](skips[1])), rtol=0, atol=0)


def test_images_of_a_batch_do_not_see_each_other_in_either_mode():
    net, x = tiny(), torch.randn(3, 1, 32, 32)
    together = net.train()(x)
    torch.testing.assert_close(torch.cat([net.eval()(image[None]) for image in x]), together, rtol=1e-4, atol=1e-5)


def test_the_layouts_agree_at_patches_of_two_only():
    for patch_size, same in [(2, True), (4, False)]:
        nets = [tiny(patch_size=patch_size, layout=layout).eval() for layout in ("patch", "released")]
        nets[1].load_state_dict(nets[0].state_dict())
        x = torch.randn(1, 1, 32, 32)
        assert torch.equal(nets[0](x), nets[1](x)) is same


def test_every_weight_gets_a_gradient():
    net, x = tiny(), torch.randn(2, 1, 32, 32)
    (net(x) - x).square().mean().backward()
    idle = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not idle


def test_a_bottom_of_one_token_has_nothing_to_compare():
    net, x = tiny(patch_size=4), torch.randn(2, 1, 32, 32)
    assert net.encode(x)[0].shape[1:3] == (1, 1)
    (net(x) - x).square().mean().backward()
    assert not net.bottom.plain.attention.bias_table.grad.any()  # softmax over one score is 1 whatever the score
    assert net.bottom.plain.attention.proj.weight.grad.any()
