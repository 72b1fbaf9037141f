"What chapter 06 cannot show: other depths and options, the U's wiring, saving and loading, batch independence."
import pytest
import torch

from anogan.errors import InputError
from anogan.gannext import GanNeXt

TINY = dict(isize=16, channels=1, dim=4, depths=(1, 1, 1, 1))


def awake(**options):
    "A small GanNeXt whose layer scales are not 1e-6, so that every block matters."
    torch.manual_seed(0)
    model = GanNeXt(**TINY | options)
    for name, parameter in model.named_parameters():
        if name.endswith(".scale"): torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("depths, isize, bottom", [((2, 2, 6, 4), 32, (8 * 8, 2, 2)), ((1, 2), 4, (8 * 2, 1, 1)), ((3,), 2, (8, 1, 1))])
def test_depths_set_the_stages_and_the_bottom(depths, isize, bottom):
    model = GanNeXt(isize, 1, 8, depths).eval()
    assert [len(stage) for stage in model.encoder] == [len(stage) for stage in model.decoder] == list(depths[:-1])
    assert len(model.bottom) == depths[-1] and all(len(skip) == 1 for skip in model.skip)
    x = torch.randn(2, 1, isize, isize)
    assert model.encode(x)[0].shape[1:] == bottom and model(x).shape == x.shape


@pytest.mark.parametrize("size, parameters", [("tiny", 478_323), ("small", 1_566_411), ("paper", 7_216_763)])
def test_presets_have_their_size(size, parameters):
    with torch.device("meta"): model = GanNeXt(**GanNeXt.sizes[size])
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_state_dict_has_one_entry_per_part_and_reloads_exactly():
    model, other, x = awake().eval(), GanNeXt(**TINY).eval(), torch.randn(2, 1, 16, 16)
    parts = {"stem", "encoder", "down", "bottom", "skip", "up", "fuse", "decoder", "out"}
    assert {key.split(".")[0] for key in model.state_dict()} == parts
    assert not torch.equal(model(x), other(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(x), other(x))


def test_every_parameter_gets_a_gradient():
    model = awake().eval()
    model(torch.randn(2, 1, 16, 16)).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    still = [name for name, p in model.named_parameters() if p.grad.abs().max() == 0]
    assert still == []


def test_each_skip_reaches_the_output():
    model, x = awake().eval(), torch.randn(1, 1, 16, 16)
    bottom, skips = model.encode(x)
    whole = model.decode(bottom, skips)
    for i in range(len(skips)):
        cut = [torch.zeros_like(s) if i == j else s for j, s in enumerate(skips)]
        assert not torch.allclose(model.decode(bottom, cut), whole)
    assert not torch.allclose(model.decode(torch.zeros_like(bottom), skips), whole)


def test_in_eval_mode_an_image_does_not_depend_on_its_batch():
    model, x = awake().eval(), torch.randn(5, 1, 16, 16)
    torch.testing.assert_close(model(x)[3:4], model(x[3:4]))


def test_norm_kernel_and_drop_path_reach_every_block():
    from anogan.convnext import DepthwiseBlock, LayerNorm2d
    model = GanNeXt(**TINY, kernel=3, norm="layer", drop_path=0.2)
    blocks = [m for m in model.modules() if isinstance(m, DepthwiseBlock)]
    assert len(blocks) == 3 + 1 + 3 + 3
    assert all(b.depthwise.kernel_size == (3, 3) and isinstance(b.norm, LayerNorm2d) and b.drop_path.p == 0.2 for b in blocks)


@pytest.mark.parametrize("isize, depths, says", [(40, (1, 1, 1, 1), "isize 40 .* multiple of 16, such as 32, 64, 128, 256"),
                                                 (0, (1, 1, 1, 1), "isize 0 "), (8, (1, 1, 1, 1), "multiple of 16"),
                                                 (32, (1,) * 9, "with 8 stages .* multiple of 512, such as 512")])
def test_illegal_sizes_are_one_sentence(isize, depths, says):
    with pytest.raises(InputError, match=says) as error: GanNeXt(isize, depths=depths)
    assert "\n" not in str(error.value)
