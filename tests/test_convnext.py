"What chapter 05 cannot show: every legal setting keeps shapes, gradients and repeatability."
import pytest
import torch
import torch.nn.functional as F

from anogan.convnext import DepthwiseBlock, DepthwiseConv, Downsample, LayerNorm2d, Upsample
from anogan.errors import AnoganError, InputError


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_layernorm_is_per_pixel_and_keeps_its_affine_parameters():
    norm, x = LayerNorm2d(5), torch.randn(2, 5, 3, 4)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    expected = F.layer_norm(x[1, :, 2, 3], (5,), norm.weight, norm.bias, 1e-6)
    torch.testing.assert_close(norm(x)[1, :, 2, 3], expected)
    assert norm.eps == 1e-6


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_block_equals_its_formula_in_functional_form(norm, kernel):
    block, x = DepthwiseBlock(4, kernel, norm, scale=0.3).eval(), torch.randn(2, 4, 6, 9)
    y = F.conv2d(x, block.depthwise.weight, block.depthwise.bias, padding=kernel // 2, groups=4)
    y = y / (1 + 1e-5)**0.5 if norm == "batch" else F.layer_norm(y.movedim(1, -1), (4,), eps=1e-6).movedim(-1, 1)
    y = torch.einsum("oc,bchw->bohw", block.expand.weight, y) + block.expand.bias[:, None, None]
    y = torch.einsum("oc,bchw->bohw", block.project.weight, F.gelu(y)) + block.project.bias[:, None, None]
    torch.testing.assert_close(block(x), x + 0.3 * y)


def test_block_gradients_agree_with_finite_differences():
    block = DepthwiseBlock(2, 3, "layer", scale=0.7).double()
    assert torch.autograd.gradcheck(block, torch.randn(1, 2, 4, 4, dtype=torch.double, requires_grad=True))


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (5, 5), (1, 9), (25, 1)])
def test_gradients_of_small_maps_agree_with_finite_differences(shape):
    layer, x = DepthwiseConv(2, 5).double(), torch.randn(2, 2, *shape, dtype=torch.double, requires_grad=True)
    assert "ProductGradient" in type(layer(x).grad_fn).__name__
    def by_weights(x, weight, bias): return torch.func.functional_call(layer, dict(weight=weight, bias=bias), (x,))
    assert torch.autograd.gradcheck(by_weights, (x, layer.weight, layer.bias))


def test_only_small_maps_take_the_other_gradient():
    layer = DepthwiseConv(4, 5)
    assert torch.equal(layer(torch.ones(1, 4, 5, 5)), F.conv2d(torch.ones(1, 4, 5, 5), layer.weight, layer.bias, padding=2, groups=4))
    assert "ProductGradient" not in type(layer(torch.ones(1, 4, 5, 6)).grad_fn).__name__


def test_under_autocast_the_gradient_of_small_maps_is_that_of_float32():
    layer, x = DepthwiseConv(4, 5), torch.randn(6, 4, 4, 4).bfloat16()
    (layer(x.float()) * x).sum().backward()
    in_float32, layer.weight.grad = layer.weight.grad, None
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        (out * x).sum().backward()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(layer.weight.grad, in_float32)


def test_block_state_dict_names_are_stable():
    names = ["depthwise.weight", "depthwise.bias", "norm.weight", "norm.bias", "expand.weight", "expand.bias",
             "project.weight", "project.bias", "scale"]
    assert set(DepthwiseBlock(4, norm="layer").state_dict()) == set(names)


def test_drop_path_of_one_always_skips_and_keeps_gradients_finite():
    block, x = DepthwiseBlock(4, drop_path=1.0, scale=1.0), torch.randn(3, 4, 5, 5, requires_grad=True)
    assert torch.equal(block(x), x)
    block(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("options, says", [(dict(kernel=6), "kernel 6 is even"), (dict(norm="instance"), "batch, layer"),
                                           (dict(drop_path=-0.1), "from 0 to 1"), (dict(drop_path=1.5), "from 0 to 1")])
def test_block_errors_are_one_sentence(options, says):
    with pytest.raises(InputError, match=says) as error: DepthwiseBlock(4, **options)
    assert isinstance(error.value, (AnoganError, ValueError)) and "\n" not in str(error.value)


def test_downsample_concatenates_convolution_before_pool():
    down, x = Downsample(2).eval(), torch.randn(1, 2, 4, 4)
    down.mix.weight.data.zero_(), down.mix.bias.data.zero_()
    down.mix.weight.data[0, 4] = 1  # inputs 0…3 are the convolution's, 4 and 5 the pool's
    torch.testing.assert_close(down(x)[:, 0], F.max_pool2d(x, 2)[:, 0] / (1 + 1e-5)**0.5)


def test_downsample_and_upsample_move_nothing_beyond_their_patch():
    x = torch.randn(1, 4, 6, 6, requires_grad=True)
    Downsample(4).eval()(x)[0, :, 1, 2].sum().backward()
    seen = x.grad[0].abs().sum(0) > 0
    assert seen[2:4, 4:6].all() and seen.sum() == 4
    small = torch.zeros(1, 4, 3, 3); small[0, :, 1, 2] = 1
    up = Upsample(4)
    changed = (up(small) - up(torch.zeros_like(small)))[0].abs().sum(0) > 0
    assert changed[2:4, 4:6].all() and changed.sum() == 4


def test_upsample_needs_an_even_number_of_channels():
    with pytest.raises(InputError, match="dim 7 is odd"): Upsample(7)
