"""Coarse noise: every shape, what it draws, how strong it is, and what stays untouched."""
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from anogan.corruption import coarse_noise
from anogan.errors import InputError


@settings(max_examples=40, deadline=None)
@given(b=st.integers(1, 3), c=st.integers(1, 4), h=st.integers(1, 20), w=st.integers(1, 20), cells=st.integers(1, 24))
def test_any_image_and_any_grid_keep_shape_and_dtype(b, c, h, w, cells):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = torch.zeros(b, c, h, w, dtype=dtype)
        noisy = coarse_noise(x, 0.5, cells)
        assert noisy.shape == x.shape and noisy.dtype == dtype and noisy.isfinite().all()
        assert not x.any(), "the input is left alone"


def test_same_seed_same_noise_and_another_seed_another():
    x = torch.zeros(2, 3, 16, 16)
    torch.manual_seed(1); first = coarse_noise(x)
    torch.manual_seed(1); again = coarse_noise(x)
    torch.manual_seed(2); other = coarse_noise(x)
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_std_zero_returns_the_images_and_draws_nothing():
    x = torch.rand(2, 1, 8, 8)
    state = torch.get_rng_state()
    assert coarse_noise(x, 0) is x
    assert torch.equal(torch.get_rng_state(), state), "a run without noise draws what it would draw without this function"


def test_every_image_and_every_channel_has_noise_of_its_own():
    torch.manual_seed(0)
    noise = coarse_noise(torch.zeros(4, 3, 16, 16)).flatten(0, 1).flatten(1)
    correlation = torch.corrcoef(noise) - torch.eye(12)
    assert correlation.abs().max() < 0.6


def test_mean_is_zero_and_strength_is_that_of_the_weights():
    torch.manual_seed(0)
    noise = coarse_noise(torch.zeros(20_000, 1, 16, 16), std=2.0, cells=4)[:, 0]
    assert noise.mean().abs() < 0.02
    weights = F.interpolate(torch.eye(4)[None], size=16, mode="linear", align_corners=False)[0]  # (cells, pixels): each cell's part
    expected = 2 * torch.outer(weights.square().sum(0), weights.square().sum(0)).sqrt()
    torch.testing.assert_close(noise.std(dim=0), expected, rtol=0.03, atol=0)


def test_as_many_cells_as_pixels_is_pixel_noise_and_one_cell_is_one_grey():
    torch.manual_seed(0); noisy = coarse_noise(torch.zeros(2, 1, 8, 8), 0.3, cells=8)
    torch.manual_seed(0); assert torch.allclose(noisy, 0.3 * torch.randn(2, 1, 8, 8))
    grey = coarse_noise(torch.zeros(3, 2, 8, 8), cells=1)
    assert torch.allclose(grey, grey[:, :, :1, :1].expand_as(grey)) and grey[:, :, 0, 0].unique().numel() == 6


def test_the_image_stays_under_the_noise_unclipped_and_gradients_pass():
    x = torch.rand(2, 1, 8, 8, requires_grad=True)
    torch.manual_seed(0); noisy = coarse_noise(x, 5.0)
    torch.manual_seed(0); noise = coarse_noise(torch.zeros(2, 1, 8, 8), 5.0)
    assert torch.allclose(noisy - noise, x, atol=1e-5) and noisy.abs().max() > 1
    noisy.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


@pytest.mark.parametrize("options, says", [(dict(std=-0.1), "use 0 or more"), (dict(std=float("nan")), "use 0 or more"),
                                           (dict(cells=0), "use 1 or more"), (dict(cells=-3), "use 1 or more")])
def test_impossible_noise_is_refused_in_one_sentence(options, says):
    with pytest.raises(InputError, match=says) as e: coarse_noise(torch.zeros(1, 1, 8, 8), **options)
    assert "\n" not in str(e.value)
