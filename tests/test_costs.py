"FLOPs and parameters: the known figures, a count by other means, and a network that is left as it was."
from copy import deepcopy

import pytest
import torch
from torch import nn

from anogan.anotrans import AnoTrans
from anogan.attention import WindowAttention
from anogan.costs import flop_table, flops, parameters
from anogan.discriminator import Discriminator
from anogan.gannext import GanNeXt
from anogan.unets import SAGAN, SkipGANomaly

KNOWN = {"anotrans p=2": (AnoTrans, dict(patch_size=2), 498.2e6, 12_536_116), "anotrans p=4": (AnoTrans, dict(patch_size=4), 125.0e6, 12_526_365),
         "gannext": (GanNeXt, {}, 208.4e6, 7_216_763), "skipganomaly": (SkipGANomaly, {}, 172.5e6, 16_659_075),
         "discriminator": (Discriminator, {}, 35.9e6, 1_069_700)}


def on_meta(model, *sizes, **options):
    with torch.device("meta"): return model(*sizes, **options)


@pytest.mark.parametrize("name", KNOWN)
def test_the_known_figures_at_32_pixels(name):
    model, options, work, numbers = KNOWN[name]
    network = on_meta(model, **options)
    assert flops(network) == pytest.approx(work, rel=0.01) and parameters(network) == numbers


@pytest.mark.parametrize("side", [32, 64, 128])
def test_58_percent_fewer_at_every_size_with_patches_of_2_and_not_with_4(side):
    ours, *theirs = (flops(on_meta(model, side, **options), (1, 3, side, side))
                     for model, options in ((GanNeXt, {}), (AnoTrans, dict(patch_size=2)), (AnoTrans, dict(patch_size=4))))
    assert 1 - ours / theirs[0] == pytest.approx(0.58, abs=0.01) and ours > 1.6 * theirs[1]


def test_at_equal_width_the_saving_is_gone():
    for dim in (32, 40, 64): assert 1 < flops(on_meta(GanNeXt, dim=dim)) / flops(on_meta(AnoTrans, dim=dim)) < 1.1


def by_loops(network, shape):
    "Multiply-adds from the values that flow: each weight times the places where it is used, and attention's two products."
    total = []

    def note(module, inputs, output):
        x = inputs[0]
        if isinstance(module, WindowAttention): total.append(2 * x.shape[0] * x.shape[1] ** 2 * x.shape[2])
        elif isinstance(module, nn.Linear): total.append(x.numel() * module.out_features)
        elif isinstance(module, nn.ConvTranspose2d): total.append(x.numel() * module.weight[0].numel())
        elif isinstance(module, nn.Conv2d): total.append(output.numel() * module.weight[0].numel())
    for module in network.modules(): module.register_forward_hook(note)
    with torch.no_grad(): network.eval()(torch.zeros(shape))
    return sum(total)


@pytest.mark.parametrize("model, options", [(AnoTrans, dict(dim=8)), (AnoTrans, dict(dim=8, patch_size=4)), (AnoTrans, dict(dim=8, window=4, skip="plain")),
                                            (GanNeXt, dict(dim=8, kernel=7)), (SkipGANomaly, dict(ngf=4)), (SAGAN, dict(ngf=4)), (Discriminator, dict(ndf=4))])
@pytest.mark.parametrize("batch, channels, side", [(1, 3, 32), (3, 1, 64)])
def test_two_flops_for_each_multiply_add(model, options, batch, channels, side):
    network, shape = model(side, channels, **options), (batch, channels, side, side)
    assert flops(network, shape) == 2 * by_loops(deepcopy(network), shape)


def test_the_network_is_left_as_it_is():
    network = GanNeXt(channels=1, dim=8, depths=(1, 1, 1, 1), drop_path=0.5).train()
    network.bottom.eval()
    before, modes = deepcopy(network.state_dict()), [m.training for m in network.modules()]
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    flops(network, (2, 1, 32, 32))
    assert torch.equal(torch.rand(2), expected) and [m.training for m in network.modules()] == modes
    assert all(value.device.type == "cpu" and torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_the_table_has_every_part_and_its_parts_add_up():
    network = on_meta(AnoTrans, dim=8)
    table = flop_table(network)
    assert set(table[""]) <= {"aten.convolution", "aten.addmm", "aten.mm", "aten.bmm"}
    total = {name: sum(operators.values()) for name, operators in table.items()}
    tops = [name for name in total if name and name.count(".") == (name.split(".")[0] in ("encoder", "merge", "expand", "skip", "fuse", "decoder"))]
    assert sum(total[name] for name in tops) == total[""] == flops(network)
    assert total["bottom"] == total["bottom.plain"] + total["bottom.shifted"]


def test_what_has_no_multiply_add_counts_nothing():
    assert flops(nn.Sequential(nn.LayerNorm(8), nn.GELU()), (4, 8)) == 0 and flop_table(nn.GELU(), (4, 8)) == {"": {}}
    assert parameters(nn.GELU()) == 0
