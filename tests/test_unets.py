"The U-Nets: sizes, presets, what each path carries to the output, and what the parts do at the edges."
import pytest
import torch

from anogan.errors import InputError
from anogan.unets import CBAM, SAGAN, ChannelAttention, SkipGANomaly, SoftPool

MODELS = [SkipGANomaly, SAGAN]


def make(model, isize=32, channels=1, ngf=4):
    torch.manual_seed(0)
    return model(isize, channels, ngf)


@pytest.mark.parametrize(("model", "counts"), [(SkipGANomaly, (1043619, 4168003, 16659075)), (SAGAN, (111_641, 418_144, 1_617_326))])
def test_presets_have_their_size(model, counts):
    with torch.device("meta"): found = tuple(sum(p.numel() for p in model(**options).parameters()) for options in model.sizes.values())
    assert tuple(model.sizes) == ("tiny", "small", "paper") and found == counts


@pytest.mark.parametrize("isize", [32, 64, 128])
@pytest.mark.parametrize("model", MODELS)
def test_every_legal_side_comes_back_with_its_shape(model, isize):
    net, x = make(model, isize, 3, 2).eval(), torch.rand(1, 3, isize, isize) * 2 - 1
    assert net(x).shape == x.shape


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("isize", [0, 16, 33, 48, 512])
def test_other_sides_are_one_sentence(model, isize):
    with pytest.raises(InputError, match=f"isize {isize} is not legal for the U-Nets: use 32, 64, 128 or 256") as error: model(isize)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("model", MODELS)
def test_images_of_another_shape_are_one_sentence(model):
    for shape in ((1, 3, 32, 32), (1, 1, 64, 64), (1, 32, 32)):
        with pytest.raises(InputError, match=rf"this {model.__name__} takes images of \(1, 32, 32\)"): make(model)(torch.zeros(shape))


def test_skipganomaly_goes_down_to_one_place_with_doubling_widths_and_norms_in_between():
    net = make(SkipGANomaly, 128, 3, 2).eval()
    bottom, skips = net.encode(torch.zeros(1, 3, 128, 128))
    assert bottom.shape == (1, 16, 1, 1)
    assert [tuple(s.shape[1:]) for s in skips] == [(2, 64, 64), (4, 32, 32), (8, 16, 16), (16, 8, 8), (16, 4, 4), (16, 2, 2)]
    has_norm = [any(isinstance(m, torch.nn.BatchNorm2d) for m in level) for level in net.down]
    assert has_norm == [False, True, True, True, True, True, False]
    assert [name for name, p in net.named_parameters() if name.endswith("bias") and p.shape == (3,)] == ["up.0.1.bias"]


def test_sagan_has_five_levels_at_every_side():
    bottom, skips = make(SAGAN, 64, 3, 2).eval().encode(torch.zeros(1, 3, 64, 64))
    assert [tuple(m.shape[1:]) for m in (*skips, bottom)] == [(2, 64, 64), (4, 32, 32), (8, 16, 16), (16, 8, 8), (16, 4, 4)]


def test_skipganomaly_stays_in_range_and_sagan_is_free():
    x = torch.randn(2, 1, 32, 32) * 100
    assert make(SkipGANomaly)(x).abs().max() <= 1
    net = make(SAGAN).eval()
    torch.nn.init.constant_(net.out.bias, 7.0)
    assert net(x).max() > 1


@pytest.mark.parametrize("model", MODELS)
def test_each_path_reaches_the_output(model):
    net, x = make(model).eval(), torch.randn(1, 1, 32, 32)
    bottom, skips = net.encode(x)
    whole = net.decode(bottom, skips)
    assert len(skips) == 4 and torch.equal(whole, net(x))
    for i in range(len(skips)):
        assert not torch.equal(net.decode(bottom, [s + 1 if i == j else s for j, s in enumerate(skips)]), whole)
    assert not torch.equal(net.decode(bottom + 1, skips), whole)


@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_gets_a_gradient(model):
    net = make(model, ngf=16)
    net(torch.randn(4, 1, 32, 32)).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    still = [name for name, p in net.named_parameters() if p.grad.abs().max() == 0]
    assert all(".mlp." in name for name in still)  # a hidden ReLU of CBAM may be silent at first


@pytest.mark.parametrize("model", MODELS)
def test_in_eval_mode_an_image_does_not_depend_on_its_batch(model):
    net, x = make(model).eval(), torch.randn(5, 1, 32, 32)
    torch.testing.assert_close(net(x)[3:4], net(x[3:4]))


@pytest.mark.parametrize("model", MODELS)
def test_state_dict_reloads_exactly(model):
    net, other, x = make(model).eval(), model(32, 1, 4).eval(), torch.randn(2, 1, 32, 32)
    other.load_state_dict(net.state_dict())
    assert torch.equal(net(x), other(x))


def test_softpool_does_not_overflow_and_stays_between_mean_and_maximum():
    x = torch.randn(3, 2, 8, 8) * 10
    mean, soft, high = torch.nn.functional.avg_pool2d(x, 2), SoftPool()(x), torch.nn.functional.max_pool2d(x, 2)
    assert (mean <= soft + 1e-5).all() and (soft <= high + 1e-5).all()
    assert torch.equal(SoftPool()(torch.full((1, 1, 2, 2), 1e4)), torch.full((1, 1, 1, 1), 1e4))


def test_cbam_takes_few_channels_and_its_parts_look_where_they_should():
    assert ChannelAttention(4).mlp[0].out_features == 1 and ChannelAttention(64).mlp[0].out_features == 4
    torch.manual_seed(0)
    channel, spatial = CBAM(32).eval()
    x = torch.randn(1, 32, 16, 16).abs() + 0.1
    factors = channel(x) / x
    torch.testing.assert_close(factors, factors[:, :, :1, :1].expand_as(x))  # one factor per channel
    factors = spatial(x) / x
    torch.testing.assert_close(factors, factors[:, :1].expand_as(x))  # one factor per place
    y = x.clone()
    y[..., 15, 15] += 5
    changed = (spatial(y) / y - factors).abs().amax(dim=1)[0] > 0
    assert changed[12:, 12:].any() and not changed[:12].any() and not changed[:, :12].any()  # a kernel of 7 looks 3 places far
