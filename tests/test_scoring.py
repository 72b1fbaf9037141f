"""Scores and maps: independent of company and order, calibrated without surprises, smoothed on any map."""
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from torch import nn

from anogan.discriminator import Discriminator
from anogan.errors import InputError
from anogan.gannext import GanNeXt
from anogan.scoring import Calibration, error_map, join_terms, latent_distance, reconstruction_error, score_terms, smooth

WHOLE = st.floats(-1e3, 1e3, allow_nan=False, width=32)


@pytest.fixture(scope="module")
def nets():
    torch.manual_seed(0)
    generator, discriminator = GanNeXt(32, 2, dim=4, depths=(1, 1)), Discriminator(32, 2, ndf=4, nz=6)
    for _ in range(3): discriminator(generator(torch.rand(8, 2, 32, 32)))  # BatchNorm with averages of its own
    return generator.eval(), discriminator.eval()


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(1)
    return torch.rand(11, 2, 32, 32) * 2 - 1


# the terms

def test_terms_of_any_batch_size_and_order_agree(nets, images):
    whole = score_terms(*nets, images)
    assert all(t.shape == (11,) and (t >= 0).all() for t in whole.values()) and set(whole) == {"rec", "lat"}
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    shuffled = score_terms(*nets, images[order])
    for name, values in whole.items():
        for size in (1, 4, 11):
            parts = torch.cat([score_terms(*nets, batch)[name] for batch in images.split(size)])
            torch.testing.assert_close(parts, values, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(shuffled[name], values[order], rtol=1e-4, atol=1e-7)


def test_scoring_leaves_no_gradient_and_changes_no_network(nets, images):
    before = [{k: v.clone() for k, v in net.state_dict().items()} for net in nets]
    assert not any(t.requires_grad for t in score_terms(*nets, images).values())
    for net, state in zip(nets, before): assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("which", [0, 1])
def test_training_mode_is_refused_even_in_one_layer(nets, images, which):
    norm = next(m for m in nets[which].modules() if isinstance(m, nn.BatchNorm2d))
    norm.train()
    with pytest.raises(InputError, match=r"training mode.*call \.eval\(\)"): score_terms(*nets, images)
    norm.eval()
    score_terms(*nets, images)


def test_a_perfect_generator_scores_zero(nets, images):
    terms = score_terms(nn.Identity().eval(), nets[1], images)
    assert not terms["rec"].any() and not terms["lat"].any()


def test_rec_is_the_mean_of_its_map_and_counts_channels_once(images):
    fake = images.flip(0)
    assert error_map(images, fake).shape == (11, 32, 32)
    torch.testing.assert_close(reconstruction_error(images, fake), error_map(images, fake).mean((1, 2)))
    grey, grey_fake = images[:, :1], fake[:, :1]
    torch.testing.assert_close(error_map(grey.expand(-1, 3, -1, -1), grey_fake.expand(-1, 3, -1, -1)), error_map(grey, grey_fake))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_is_kept(dtype):
    x, fake = torch.rand(2, 3, 2, 8, 8).to(dtype)
    assert reconstruction_error(x, fake).dtype == latent_distance(x.flatten(1), fake.flatten(1)).dtype == dtype
    assert smooth(error_map(x, fake), 1.0).dtype == dtype


@pytest.mark.parametrize("distance, a, b", [(error_map, (2, 3, 8, 8), (2, 1, 8, 8)), (reconstruction_error, (1, 1, 8, 8), (4, 1, 8, 8)),
                                            (latent_distance, (4, 6), (4, 1)), (latent_distance, (4, 6), (6,))])
def test_shapes_that_would_broadcast_are_refused(distance, a, b):
    with pytest.raises(InputError, match="do not fit together") as e: distance(torch.zeros(a), torch.zeros(b))
    assert str(a) in str(e.value) and str(b) in str(e.value)


# the join and the calibration

@pytest.mark.parametrize("name", ["rec", "lat"])
def test_a_term_without_a_weight_does_not_count(name):
    terms = dict(rec=torch.tensor([1.0, 2]), lat=torch.tensor([3.0, 7]))
    assert torch.equal(join_terms(terms, {name: 2.0}), 2 * terms[name])


def test_a_term_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="unknown term of the score 'near'"): join_terms(dict(rec=torch.ones(1), lat=torch.ones(1)), dict(near=1.0))


@settings(max_examples=50, deadline=None)
@given(st.lists(WHOLE, min_size=2, max_size=30))
def test_calibrated_validation_terms_have_mean_zero_and_spread_one(values):
    t = torch.tensor(values, dtype=torch.float64)
    z = Calibration.fit(dict(rec=t))(dict(rec=t))["rec"]
    if t.max() == t.min(): assert (z.abs() <= 1e-9 * t.abs().max() + 1e-12).all()
    elif t.std() > 1e-6 * t.abs().max():
        assert abs(z.mean()) < 1e-6 and abs(z.std() - 1) < 1e-6


@settings(max_examples=50, deadline=None)
@given(st.lists(WHOLE, min_size=3, max_size=20, unique=True), st.floats(0.01, 100), WHOLE)
def test_units_of_a_term_do_not_matter(values, scale, shift):
    t = torch.tensor(values, dtype=torch.float64)
    if t.std() < 1e-3: return
    a, b = dict(rec=t), dict(rec=scale * t + shift)
    torch.testing.assert_close(Calibration.fit(a)(a), Calibration.fit(b)(b), rtol=1e-5, atol=1e-5)


@settings(max_examples=100, deadline=None)
@given(WHOLE, st.integers(1, 40))
def test_a_constant_term_keeps_its_units(value, n):
    calibration = Calibration.fit(dict(lat=torch.full((n,), value)))  # rounding must not pass for a spread
    assert calibration.sd == {"lat": 1.0}
    assert calibration(dict(lat=torch.tensor([value + 2.0])))["lat"].item() == pytest.approx(2.0, abs=1e-3)


def test_calibrated_scores_are_independent_of_companions():
    torch.manual_seed(0)
    validation, terms = ({name: torch.rand(40) for name in ("rec", "lat")} for _ in range(2))
    calibration = Calibration.fit(validation)
    whole = join_terms(calibration(terms))
    alone = torch.cat([join_terms(calibration({name: t[i:i + 1] for name, t in terms.items()})) for i in range(40)])
    assert torch.equal(whole, alone) and whole.dtype == torch.float32


def test_calibration_survives_json():
    calibration = Calibration.fit(dict(rec=torch.rand(5), lat=torch.rand(5)))
    assert Calibration(**json.loads(json.dumps(asdict(calibration)))) == calibration


@pytest.mark.parametrize("values, says", [([], "no value of lat"), ([1.0, float("nan")], "not finite"), ([float("inf")], "not finite")])
def test_nothing_and_nonsense_cannot_calibrate(values, says):
    with pytest.raises(InputError, match=says): Calibration.fit(dict(rec=torch.ones(2), lat=torch.tensor(values)))


# the maps

@settings(max_examples=40, deadline=None)
@given(n=st.integers(0, 3), h=st.integers(1, 9), w=st.integers(1, 9), sigma=st.floats(0.2, 6))
def test_any_map_is_smoothed_as_scipy_does_it_also_where_the_bell_is_wider_than_the_map(n, h, w, sigma):
    maps = torch.rand(n, h, w)
    blurred = smooth(maps, sigma)
    assert blurred.shape == maps.shape
    radius = max(1, round(3 * sigma))
    oracle = [gaussian_filter(m, sigma, mode="nearest", truncate=(radius + 0.1) / sigma) for m in maps.numpy()]
    np.testing.assert_allclose(blurred.numpy(), np.reshape(oracle, (n, h, w)), atol=1e-5)


def test_smoothing_keeps_constants_bounds_and_the_sum_inside():
    torch.testing.assert_close(smooth(torch.full((2, 7, 5), 3.0), 2.0), torch.full((2, 7, 5), 3.0))
    maps = torch.rand(3, 12, 12)
    blurred = smooth(maps, 1.5)
    assert blurred.min() >= maps.min() and blurred.max() <= maps.max()
    spot = torch.zeros(1, 21, 21); spot[0, 10, 10] = 5
    assert smooth(spot, 2.0).sum().item() == pytest.approx(5, rel=1e-5)


def test_maps_are_smoothed_each_on_its_own():
    maps = torch.rand(4, 9, 9)
    torch.testing.assert_close(smooth(maps, 1.0), torch.cat([smooth(m[None], 1.0) for m in maps]))


def test_sigma_zero_returns_the_maps():
    maps = torch.rand(2, 4, 4)
    assert smooth(maps, 0) is maps


@pytest.mark.parametrize("maps, sigma, says", [(torch.zeros(1, 4, 4), -1.0, "use 0 or more"), (torch.zeros(1, 4, 4), float("nan"), "use 0 or more"),
                                               (torch.zeros(1, 4, 4), float("inf"), "use 0 or more"), (torch.zeros(4, 4), 1.0, r"\(N, H, W\)"),
                                               (torch.zeros(1, 1, 4, 4), 1.0, r"\(N, H, W\)"), (torch.zeros(1, 4, 4, dtype=torch.long), 1.0, "float maps")])
def test_maps_and_sigmas_that_make_no_sense_are_refused_in_one_sentence(maps, sigma, says):
    with pytest.raises(InputError, match=says) as e: smooth(maps, sigma)
    assert "\n" not in str(e.value)


def test_an_error_counts_by_its_square_and_the_published_mix_is_nine_to_one():
    x, fake = torch.zeros(1, 2, 1, 1), torch.tensor([0.5, 1.0]).reshape(1, 2, 1, 1)
    assert error_map(x, fake).item() == pytest.approx((0.25 + 1) / 2) and reconstruction_error(x, fake).item() == pytest.approx(0.625)
    assert join_terms(dict(rec=torch.ones(1), lat=torch.zeros(1))).item() == pytest.approx(0.9)
