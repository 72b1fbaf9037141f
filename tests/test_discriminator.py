"""The discriminator: every legal size, the gradients that pass it, and how its weights are drawn."""
import pytest
import torch
from torch import nn

from anogan.discriminator import Discriminator, init_weights
from anogan.errors import InputError


@pytest.mark.parametrize("isize", [32, 64, 128, 256])
@pytest.mark.parametrize("channels", [1, 3])
def test_halves_down_to_four_and_returns_logits_and_features(isize, channels):
    critic = Discriminator(isize, channels, ndf=2, nz=5)
    x = torch.rand(2, channels, isize, isize)
    assert critic.feature_maps(x)[-1].shape == (2, isize // 4, 4, 4)  # 2 * 2**(log2(isize) - 3) channels
    logits, features = critic(x)
    assert logits.shape == (2,) and features.shape == (2, 5)


@pytest.mark.parametrize("isize", [16, 31, 48, 512, 0])
def test_other_sizes_are_refused_in_one_sentence(isize):
    with pytest.raises(InputError, match=f"isize {isize} .*use 32, 64, 128 or 256") as e: Discriminator(isize)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("size, ndf, nz", [("tiny", 32, 64), ("small", 48, 80), ("paper", 64, 100)])
def test_sizes_are_presets_of_the_constructor(size, ndf, nz):
    critic = Discriminator(32, 1, **Discriminator.sizes[size])
    parameters = 16 * ndf * (1 + 2 * ndf + 8 * ndf) + 2 * (2 * ndf + 4 * ndf) + 16 * 4 * ndf * nz + 9 * nz
    assert sum(p.numel() for p in critic.parameters()) == parameters


def test_state_dict_names_stay_so_that_saved_networks_load():
    names = Discriminator(32, 3, 4, 4).state_dict().keys()
    weights = {k for k in names if k.endswith("weight")}
    assert weights == {"layers.0.0.weight", "layers.1.0.weight", "layers.1.1.weight", "layers.2.0.weight", "layers.2.1.weight",
                       "to_feature.weight", "classify.weight"}
    assert not any("layers.0.1" in k for k in names), "no BatchNorm on pixels"
    assert {k for k in names if k.endswith("bias")} == {"layers.1.1.bias", "layers.2.1.bias"}, "no convolution has a bias"


def test_calling_the_maps_and_the_whole_agree_and_leave_the_image_alone():
    torch.manual_seed(0)
    critic, x = Discriminator(32, 1, 4, 4).eval(), torch.rand(2, 1, 32, 32)
    before = x.clone()
    logits, features = critic(x)
    torch.testing.assert_close(critic.to_feature(critic.feature_maps(x)[-1]).flatten(1), features)
    torch.testing.assert_close(features @ critic.classify.weight[0, :, 1, 1], logits)
    assert torch.equal(x, before), "LeakyReLU works in place, but never on the image"


def test_the_gradient_reaches_every_pixel():
    torch.manual_seed(0)
    x = torch.rand(2, 1, 32, 32, requires_grad=True)
    Discriminator(32, 1, 4, 4)(x)[0].sum().backward()
    assert (x.grad != 0).all()


def test_evaluation_mode_scores_each_image_alone():
    torch.manual_seed(0)
    critic, x = init_weights(Discriminator(32, 1, 8, 8)), torch.rand(6, 1, 32, 32)
    critic(x)
    critic.eval()
    together = critic(x)
    alone = [critic(one[None]) for one in x.flip(0)]
    for whole, parts in zip(together, zip(*alone)): torch.testing.assert_close(whole, torch.cat(parts).flip(0), atol=1e-5, rtol=1e-4)


def test_training_mode_does_not():
    torch.manual_seed(0)
    critic, x = Discriminator(32, 1, 8, 8), torch.rand(4, 1, 32, 32)
    companions = torch.cat([x[:1], -5 * x[1:]])
    assert not torch.allclose(critic(x)[0][0], critic(companions)[0][0], atol=1e-4)


def test_init_weights_of_every_kind_of_layer():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(32, 64, 3), nn.ConvTranspose2d(32, 64, 3), nn.Linear(200, 100), nn.BatchNorm2d(4000), nn.LayerNorm(8),
                            nn.Linear(100, 100, bias=False))
    nn.init.constant_(network[4].weight, 7.0)
    assert init_weights(network) is network
    conv, transposed, linear, batchnorm, layernorm, unbiased = network
    for layer in (conv, transposed, linear, unbiased):
        assert abs(layer.weight.mean()) < 1e-3 and abs(layer.weight.std() - 0.02) < 1e-3
    assert abs(batchnorm.weight.mean() - 1) < 2e-3 and abs(batchnorm.weight.std() - 0.02) < 1e-3
    assert (layernorm.weight == 1).all()
    assert all((layer.bias == 0).all() for layer in network if layer.bias is not None)


def test_init_weights_repeats_with_its_seed():
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(init_weights(Discriminator(32, 1, 4, 4)).to_feature.weight)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_a_kept_map_is_not_moved_by_training_and_the_rest_is():
    torch.manual_seed(0)
    critic = init_weights(Discriminator(64, 1, ndf=4, nz=8)).keep_map().train()
    x, before = torch.rand(8, 1, 64, 64), {name: t.clone() for name, t in critic.state_dict().items()}
    optimizer = torch.optim.Adam([p for p in critic.parameters() if p.requires_grad], 1e-2)
    for _ in range(2):
        logits, features = critic(x)
        optimizer.zero_grad(), (logits.sum() + features.square().sum()).backward(), optimizer.step()
    moved = {name for name, t in critic.state_dict().items() if not torch.equal(t, before[name])}
    assert {name for name in before if name.startswith(("layers.3", "to_feature", "classify"))} == moved
    assert critic.feature_maps(x)[2].shape[-1] == 8 and torch.equal(critic.feature_maps(x[:1])[2], critic.feature_maps(x)[2][:1])


def test_the_gradient_of_the_image_passes_a_kept_map():
    critic, x = Discriminator(32, 1, ndf=4, nz=8).keep_map(), torch.rand(2, 1, 32, 32, requires_grad=True)
    critic(x)[0].sum().backward()
    assert x.grad.abs().sum() > 0 and critic.layers[0][0].weight.grad is None and critic.to_feature.weight.grad is not None
