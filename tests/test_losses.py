"""The losses: extremes, gradients, and which network each of them reaches."""
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from anogan.losses import LossWeights, adversarial_loss, contextual_loss, latent_loss


@pytest.mark.parametrize("real", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_adversarial_loss_is_finite_and_grows_straight_however_sure_the_critic_is(real, dtype):
    logits = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], dtype=dtype, requires_grad=True)
    losses = torch.stack([adversarial_loss(l[None], real) for l in logits])
    wrong = logits.detach() * (-1 if real else 1)
    torch.testing.assert_close(losses.detach(), torch.where(wrong == 0, np.log(2), wrong.clamp(min=0)).to(dtype))
    losses.sum().backward()
    slope = torch.tensor([-1.0, -1, -0.5, 0, 0] if real else [0.0, 0, 0.5, 1, 1], dtype=dtype)
    torch.testing.assert_close(logits.grad, slope)


def test_adversarial_loss_of_one_answer_mirrors_the_other():
    logits = torch.linspace(-5, 5, 11)
    torch.testing.assert_close(adversarial_loss(logits, real=True), adversarial_loss(-logits, real=False))


@pytest.mark.parametrize("loss, power", [(contextual_loss, 1), (latent_loss, 2)])
def test_distances_are_symmetric_zero_on_equals_and_scale_with_their_power(loss, power):
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 1, 4, 4).flatten(2 if loss is contextual_loss else 1)
    assert loss(a, a) == 0 < loss(a, b)
    torch.testing.assert_close(loss(a, b), loss(b, a))
    torch.testing.assert_close(loss(3 * a, 3 * b), 3**power * loss(a, b))
    torch.testing.assert_close(loss(a, b).double(), (a - b).double().abs().pow(power).mean())


def test_the_losses_are_means_so_that_batch_size_does_not_change_them():
    torch.manual_seed(0)
    a, b, logits = torch.randn(4, 1, 4, 4), torch.randn(4, 1, 4, 4), torch.randn(4)
    for loss, *args in ((contextual_loss, a, b), (latent_loss, a.flatten(1), b.flatten(1))):
        torch.testing.assert_close(loss(*(torch.cat([t, t]) for t in args)), loss(*args))
    torch.testing.assert_close(adversarial_loss(logits.repeat(2), True), adversarial_loss(logits, True))


def test_contextual_gradient_norm_does_not_depend_on_the_error():
    for error in (1e-3, 1.0):
        fake = torch.full((2, 3, 4, 4), error, requires_grad=True)
        contextual_loss(fake, torch.zeros_like(fake)).backward()
        assert fake.grad.norm().item() == pytest.approx(fake.numel() ** -0.5, rel=1e-5)


def test_latent_loss_pushes_both_sides_with_opposite_force():
    fake, real = (torch.randn(2, 5, requires_grad=True) for _ in range(2))
    latent_loss(fake, real).backward()
    torch.testing.assert_close(fake.grad, -real.grad)


def test_one_backward_pass_for_each_network_touches_no_other():
    torch.manual_seed(0)
    generator, critic, x = nn.Linear(4, 4), nn.Linear(4, 1), torch.randn(8, 4)
    logits = critic(generator(x)).flatten()
    adversarial_loss(logits, True).backward(inputs=list(generator.parameters()), retain_graph=True)
    assert all(p.grad is None for p in critic.parameters())
    before = [p.grad.clone() for p in generator.parameters()]
    adversarial_loss(logits, False).backward(inputs=list(critic.parameters()))
    for p, grad in zip(generator.parameters(), before): assert torch.equal(p.grad, grad)
    expected = torch.autograd.grad(adversarial_loss(critic(generator(x).detach()).flatten(), False), list(critic.parameters()))
    torch.testing.assert_close([p.grad for p in critic.parameters()], list(expected))


def test_weights_are_the_published_ones_and_cannot_be_changed_in_place():
    assert dataclasses.asdict(LossWeights()) == {"adv": 1.0, "con": 50.0, "lat": 1.0}
    with pytest.raises(dataclasses.FrozenInstanceError): LossWeights().con = 1.0
    assert len({LossWeights(), LossWeights(con=50.0), LossWeights(con=1.0)}) == 2
