"""Be your own teacher: the loss of one exit, and the exit itself."""

from __future__ import annotations

import math

import pytest
import torch

from golden import self_teaching as golden
from kdgraft import DistillError
from kdgraft.losses import exit_imitation
from kdgraft.losses.byot import Exit


def authors_exit() -> Exit:
    """An exit with the parameters of the authors' one."""
    exit_ = Exit(3, 8, 5, size=(2, 2)).double()
    rates = iter(range(12))
    with torch.no_grad():
        for part in (exit_.enter, exit_.enter_norm, exit_.reduce, exit_.reduce_norm, exit_.leave, exit_.leave_norm):
            for parameter in part.parameters():
                number = next(rates)
                parameter.copy_(golden.wave(tuple(parameter.shape), 0.31 + 0.1 * number, 0.3 + number, 0.5))
    golden.fill(exit_.classifier, 0.9)
    return exit_


def test_an_exit_is_the_authors_one():
    scores, features = authors_exit()(golden.shallow()[0])
    torch.testing.assert_close(scores[0].tolist(), golden.EXIT_SCORES)
    assert features.sum().item() == pytest.approx(golden.EXIT_FEATURES)


def test_the_loss_is_the_authors_one():
    maps, labels, logits, deepest = golden.shallow()
    maps.requires_grad_()
    scores, features = authors_exit()(maps)
    # Their sum over a batch of 3 images is a mean here, and their cross-entropy is the KL and the teacher's entropy.
    loss = exit_imitation(scores, logits, labels, features, deepest, alpha=0.5, feature_weight=3 * 5e-7)
    p = (logits / 3).softmax(1)
    entropy = -(p * p.log()).sum(1).mean()
    assert (loss + 0.5 * 9 * entropy).item() == pytest.approx(golden.EXIT[0])
    loss.backward()
    assert maps.grad[0, 0, 0, 0].item() == pytest.approx(golden.EXIT[1])
    assert maps.grad.square().sum().item() == pytest.approx(golden.EXIT[2])


def test_the_authors_later_settings_as_the_documentation_has_them():
    maps, labels, logits, _ = golden.shallow()
    scores, features = authors_exit()(maps)
    loss = 11 / 15 * exit_imitation(scores, logits, labels, features, features, alpha=1 / 22)
    p = (logits / 3).softmax(1)
    assert (loss - 0.3 * (p * p.log()).sum(1).mean()).item() == pytest.approx(golden.EXIT_OF_JOURNAL)


def test_one_sample_by_hand():
    # Logits of two classes that give probabilities (1/4, 3/4) and (1/2, 1/2) at T = 2, and features (1, 2) and (1, 0).
    s, t = torch.tensor([[0.0, 2 * math.log(3)]]), torch.zeros(1, 2)
    features, deepest = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0]])
    hard = math.log(1 + 9)  # of class 0 at T = 1: −log(1 / (1 + 9))
    soft = 4 * (0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75))
    loss = exit_imitation(s, t, torch.tensor([0]), features, deepest, 2.0, alpha=0.3, feature_weight=0.1)
    assert loss.item() == pytest.approx(0.7 * hard + 0.3 * soft + 0.1 * 4, rel=1e-6)


def test_padding_of_maps_counts_in_no_exit():
    torch.manual_seed(0)
    exit_ = Exit(3, 6, 4, size=(2, 2), width=8)
    maps = torch.rand(3, 3, 8, 8)
    valid = torch.ones(3, 8, 8)
    valid[:, :, 4:] = 0
    scores, features = exit_(maps, valid)
    other, alone = exit_(maps.masked_fill(valid[:, None] == 0, math.inf), valid), exit_(maps[..., :4])
    for found in (other, alone):
        torch.testing.assert_close(found[0], scores)
        torch.testing.assert_close(found[1], features)


def test_one_image_and_half_precision():
    exit_ = Exit(3, 6, 4, size=(2, 2))
    with torch.autocast("cpu", torch.bfloat16):
        scores, features = exit_(torch.rand(1, 3, 2, 2).bfloat16())
    assert scores.dtype == features.dtype == torch.float32 and scores.isfinite().all()
    assert Exit(5, 6, 4)(torch.rand(2, 5))[0].shape == (2, 4)


def test_refused():
    x = torch.zeros(2, 3)
    with pytest.raises(DistillError, match=r"alpha must be in \[0, 1\]"):
        exit_imitation(x, x, torch.zeros(2).long(), x, x, alpha=1.5)
    with pytest.raises(DistillError, match="must have the same shape"):
        exit_imitation(x, x, torch.zeros(2).long(), x, x[:, :2])
