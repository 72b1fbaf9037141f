"The discriminator's second task: views, the loss that joins them, and its place in a training step."
import math

import pytest
import torch
import torch.nn.functional as F

from anogan.contrast import Projection, contrastive_loss, crop_and_turn, quarter_turned, random_view, view_loss
from anogan.data import load_dataset
from anogan.discriminator import Discriminator, init_weights
from anogan.errors import InputError
from anogan.gannext import GanNeXt
from anogan.trainer import Recipe, Trainer

IMAGES = load_dataset("digits", isize=32, n_train=64).train.stack()


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_quarter_turns_are_exact(turns):
    x = torch.rand(2, 3, 8, 8)
    turned = crop_and_turn(x, torch.ones(2), torch.full((2,), turns * math.pi / 2), torch.zeros(2, 2))
    torch.testing.assert_close(turned, torch.rot90(x, turns, (2, 3)), rtol=0, atol=1e-4)


def test_half_a_side_shows_the_quarter_it_is_centred_on():
    x = torch.zeros(1, 1, 32, 32)
    x[..., 16:, :16] = 1  # lower left
    part = crop_and_turn(x, torch.tensor([0.5]), torch.zeros(1), torch.tensor([[-0.5, 0.5]]))
    assert part[..., 1:, :-1].min() > 0.99


def test_views_stay_in_range_differ_by_image_and_by_call():
    torch.manual_seed(0)
    x = IMAGES[:1].repeat(8, 1, 1, 1)
    a, b = random_view(x), random_view(x)
    assert a.shape == x.shape and a.min() >= -1 and a.max() <= 1
    assert len({tuple(v.flatten().tolist()) for v in [*a, *b]}) == 16


@pytest.mark.parametrize("options, sentence", [(dict(crop=0), "crop is 0"), (dict(crop=1.5), "crop is 1.5"), (dict(contrast=2), "contrast is 2")])
def test_views_that_cannot_be_are_refused(options, sentence):
    with pytest.raises(InputError, match=sentence): random_view(IMAGES[:2], **options)


def test_the_loss_is_that_of_the_definition():
    torch.manual_seed(0)
    a, b = F.normalize(torch.randn(2, 5, 4, dtype=torch.float64), dim=-1)
    views, total = torch.cat([a, b]), 0.0
    for i in range(10):
        others = [j for j in range(10) if j != i]
        logits = torch.stack([views[i] @ views[j] / 0.5 for j in others])
        total -= logits.log_softmax(0)[others.index((i + 5) % 10)]
    torch.testing.assert_close(contrastive_loss(a, b, 0.5), total / 10)


def test_the_loss_falls_when_partners_agree_and_is_log_of_the_choices_when_all_do():
    a, same = F.normalize(torch.randn(6, 8), dim=1), torch.ones(6, 1)
    assert contrastive_loss(a, a) < contrastive_loss(a, a.roll(1, 0))
    assert contrastive_loss(same, same).item() == pytest.approx(math.log(11), rel=1e-5)


def test_nobody_is_their_own_partner_and_gradients_are_finite():
    a = F.normalize(torch.randn(4, 8), dim=1).requires_grad_()
    contrastive_loss(a, a.detach().flip(0)).backward()
    assert a.grad.isfinite().all() and a.grad.abs().sum() > 0


def test_a_turned_image_is_the_image_turned_and_never_the_image():
    torch.manual_seed(0)
    x = torch.rand(60, 3, 5, 5)
    turned = quarter_turned(x)
    which = [[torch.equal(t, image.rot90(k, (1, 2))) for k in range(4)].index(True) for image, t in zip(x, turned)]
    assert set(which) == {1, 2, 3} and min(map(which.count, (1, 2, 3))) > 8


def test_turned_copies_are_other_images_and_not_partners():
    "A head that sees no difference between an image and its turned copy cannot get below two equal answers."
    x = torch.rand(6, 1, 8, 8)
    def blind(x): return None, F.normalize(torch.stack([x.mean((1, 2, 3)), torch.ones(len(x))], 1), dim=1)
    assert view_loss(blind, lambda f: torch.ones(len(f), 1), x, 1.0).item() == pytest.approx(math.log(4 * 6 - 1), rel=1e-5)


def networks(seed=0):
    torch.manual_seed(seed)
    return GanNeXt(32, 1, dim=4, depths=(1, 1, 1, 1)), init_weights(Discriminator(32, 1, ndf=4, nz=8))


def test_a_recipe_with_the_task_trains_its_head_with_the_discriminator_and_logs_it():
    trainer = Trainer(*networks(), Recipe(contrast=True), epochs=1, batch_size=16, device="cpu", progress=False)
    before = [p.clone() for p in trainer.networks["projection"].parameters()]
    row = trainer.fit(IMAGES)[0]
    assert row["contrast"] > 0 and row["loss_d"] == pytest.approx(row["d_real"] + row["d_fake"], rel=1e-4)
    assert all(not torch.equal(a, b) for a, b in zip(before, trainer.networks["projection"].parameters()))


def test_without_the_task_there_is_no_head():
    trainer = Trainer(*networks(), Recipe(contrast=False), epochs=1, batch_size=16, device="cpu", progress=False)
    assert set(trainer.networks) == {"generator", "discriminator"} and "contrast" not in trainer.fit(IMAGES)[0]


def test_a_run_with_the_task_resumes_to_the_same_bits(tmp_path):
    def train(epochs, folder=None):
        trainer = Trainer(*networks(), Recipe(), epochs=epochs, batch_size=16, seed=3, device="cpu", progress=False, folder=folder)
        trainer.fit(IMAGES)
        return trainer.networks
    whole = train(3)
    train(2, tmp_path)
    for name, network in train(3, tmp_path).items():
        assert all(torch.equal(t, whole[name].state_dict()[key]) for key, t in network.state_dict().items()), name


def test_the_features_learn_to_ignore_what_views_change():
    torch.manual_seed(0)
    (_, critic), head = networks(), Projection(8)
    optimizer = torch.optim.Adam([*critic.parameters(), *head.parameters()], 3e-3)
    first = view_loss(critic, head, IMAGES).item()
    for _ in range(40):
        loss = view_loss(critic, head, IMAGES)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert loss.item() < 0.9 * first
