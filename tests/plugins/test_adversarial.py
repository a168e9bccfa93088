"""Adversarial class scores: the critic learns to tell them apart, the student to pass and to show the class."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdgraft import RECIPES, AdversarialScores, Distiller, DistillError, WiringError
from kdgraft.opponents import ConditionalOpponent, Opponent, ScoreCritic
from kdgraft.registry import expand_recipe
from kdgraft.terms import build_terms
from support.tensors import Emit

EXAMPLE = torch.zeros(1, 1)
LABELS = torch.arange(40) % 4
KEY = "distill.adversarial_scores"
KINDS = ("ac", "lsgan", "hinge")


def sure(size: float, seed: int = 0) -> Tensor:
    """Scores of 40 items over 4 classes, sure of the true class."""
    noise = torch.randn(40, 4, generator=torch.Generator().manual_seed(seed))
    return size * F.one_hot(LABELS, 4) + noise


def distil(student: Tensor, teacher: Tensor, seed: int = 0, **settings: Any) -> Distiller:
    torch.manual_seed(seed)
    return Distiller(Emit(student.clone()), Emit(teacher.clone()), [AdversarialScores(**settings)], EXAMPLE)


def critic_of(model: Distiller) -> Opponent:
    return model.terms["adversarial_scores"].opponent


def parameters(of: Opponent) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in of.critic.named_parameters()}


# --- the critic


def test_the_critic_is_a_residual_network_of_each_item():
    torch.manual_seed(0)
    critic = ScoreCritic(5, 7, blocks=2, width=3)
    assert [tuple(p.shape) for p in critic.parameters()] == [(3, 5), (3,), (5, 3), (5,)] * 2 + [(7, 5), (7,)]
    scores = torch.randn(4, 5)
    inner = scores
    for block in critic.blocks:
        first, _, second = block
        hidden = (inner @ first.weight.t() + first.bias).clamp(min=0)
        inner = (inner + hidden @ second.weight.t() + second.bias).clamp(min=0)
    torch.testing.assert_close(critic(scores), inner @ critic.last.weight.t() + critic.last.bias)
    torch.testing.assert_close(critic(scores)[1:2], critic(scores[1:2]))
    assert ScoreCritic(5, 1, 1, 3)(scores).shape == (4,)


def test_it_learns_who_gave_scores_and_their_class():
    torch.manual_seed(0)
    opponent = ConditionalOpponent(ScoreCritic(4, 6, 3, 16), penalty=0.0, lr=1e-2)
    real, fake = sure(9.0), sure(3.0, 1)
    shown = [opponent.learn(real, fake, labels=LABELS) for _ in range(80)]
    assert shown[-1]["critic"] < 0.5 * shown[0]["critic"] and shown[-1]["gap"] > 0.5 > shown[0]["gap"]
    outputs = opponent.judge(torch.cat([sure(9.0, 2), sure(3.0, 3)]))  # scores that it has not seen
    assert (outputs[:, :4].argmax(1) == LABELS.repeat(2)).float().mean() > 0.9
    believed = outputs[:, 4:].softmax(1)[:, 0]
    assert believed[:40].mean() > 0.7 > 0.4 > believed[40:].mean()


@pytest.mark.parametrize(("kind", "blocks", "lr"), [("ac", 1, 4e-3), ("lsgan", 3, 2e-3), ("hinge", 3, 2e-3)])
def test_a_student_learns_from_it_alone(kind: str, blocks: int, lr: float):
    # Without the L1 distance; the teacher's scores are sure, the student's are noise.
    model = distil(sure(0.0, 1), sure(6.0), kind=kind, l1=0, lr=lr, width=16, blocks=blocks)
    optimizer = torch.optim.Adam(model.student.parameters(), 0.1 if kind == "ac" else 0.05)

    def distance() -> float:
        return float((model.student.value.detach() - model.teacher.model.value).mean(0).abs().sum())

    before = distance()
    for _ in range(80 if kind == "ac" else 120):
        optimizer.zero_grad()
        model(EXAMPLE, targets=LABELS).loss.backward()
        optimizer.step()
    assert distance() < 0.8 * before


# --- the term


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_by_hand(kind: str):
    labels = LABELS.clone()
    labels[:7] = -100
    keep = labels >= 0 if kind == "ac" else torch.ones(40, dtype=torch.bool)
    student, teacher = sure(1.0, 1), sure(4.0)
    student[~keep] = torch.nan  # items without a label are left out
    model = distil(student, teacher, kind=kind, l1=0.25, blocks=2, width=8, lr=0.02, steps=2)
    twin = (ConditionalOpponent if kind == "ac" else Opponent)(
        ScoreCritic(4, 6 if kind == "ac" else 1, 2, 8), kind, penalty=0.0, steps=2, lr=0.02
    )
    twin.load(copy.deepcopy(critic_of(model).state()))
    out = model(EXAMPLE, targets=labels)
    s, t, y = student[keep].requires_grad_(), teacher[keep], labels[keep]
    shown = twin.learn(t, s, labels=y)
    outputs = twin.judge(s)
    if kind == "ac":
        verdict = F.cross_entropy(outputs[:, 4:], torch.zeros(33, dtype=torch.long)) + F.cross_entropy(
            outputs[:, :4], y
        )
    else:
        verdict = (outputs - 1).square().mean() if kind == "lsgan" else -outputs.mean()
    expected = verdict + 0.25 * (s - t).abs().sum(1).mean()
    torch.testing.assert_close(out.loss, expected)
    assert {name: value.item() for name, value in shown.items()} == {
        name: pytest.approx(out.losses[f"{KEY}.{name}"].item()) for name in ("critic", "gap")
    }
    out.loss.backward()
    expected.backward()
    slope = model.student.value.grad
    torch.testing.assert_close(slope[keep], s.grad)
    assert not slope[~keep].any()


def test_maps_and_tokens_are_items():
    student, teacher = (x.reshape(2, 4, 5, 4).movedim(-1, 1) for x in (sure(1.0, 1), sure(4.0)))
    labels = LABELS.reshape(2, 4, 5)
    maps = distil(student, teacher)(EXAMPLE, targets=labels).loss
    rows = distil(sure(1.0, 1), sure(4.0))(EXAMPLE, targets=LABELS).loss
    torch.testing.assert_close(maps, rows)


def test_no_label_at_all_is_0_and_no_step_of_the_critic():
    model = distil(sure(1.0, 1), sure(4.0))
    before = parameters(critic_of(model))
    loss = model(EXAMPLE, targets=torch.full((40,), -100)).loss
    loss.backward()
    assert loss.item() == 0 and not model.student.value.grad.any()
    assert all(torch.equal(before[name], value) for name, value in parameters(critic_of(model)).items())


def test_a_step_that_is_not_finite_is_skipped_and_dropped():
    student = sure(1.0, 1)
    student[3, 1] = torch.inf
    model = distil(student, sure(4.0))
    before = parameters(critic_of(model))
    out = model(EXAMPLE, targets=LABELS)
    assert out.loss == 0 and model.dropped == {"adversarial_scores": 1}
    assert critic_of(model).skipped == 1
    assert all(torch.equal(before[name], value) for name, value in parameters(critic_of(model)).items())


def test_it_is_out_of_sight_and_resumes_where_it_was(tmp_path: Path):
    model = distil(sure(1.0, 1), sure(4.0))
    hidden = {id(p) for p in critic_of(model).critic.parameters()}
    assert hidden and not hidden & {id(p) for p in model.parameters()}
    model(EXAMPLE, targets=LABELS)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert not any("critic" in key or "opponent" in key for key in state)
    whole = model(EXAMPLE, targets=LABELS)
    other = distil(sure(2.0, 5), sure(4.0), seed=9)
    other.load_state_dict(state)
    again = other(EXAMPLE, targets=LABELS)
    assert {k: v.item() for k, v in again.losses.items()} == {k: v.item() for k, v in whole.losses.items()}
    ours, theirs = (parameters(critic_of(one)) for one in (model, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_under_autocast():
    model = distil(sure(1.0, 1).bfloat16(), sure(4.0).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(EXAMPLE, targets=LABELS).loss
    assert loss.dtype is torch.float32 and loss.isfinite()
    exact = distil(sure(1.0, 1).bfloat16().float(), sure(4.0).bfloat16().float())(EXAMPLE, targets=LABELS).loss
    torch.testing.assert_close(loss, exact, rtol=1e-4, atol=1e-5)


# --- what it needs


def test_only_the_kind_with_classes_needs_labels_and_exclusive_classes():
    student, teacher = sure(1.0, 1), sure(4.0)
    with pytest.raises(DistillError, match="needs the class of each item, and the batch has none; pass targets"):
        distil(student, teacher)(EXAMPLE)
    with pytest.raises(WiringError, match="these models score each class on its own"):
        distil(student, teacher, independent=True)
    for kind in ("lsgan", "hinge"):
        for settings in ({}, dict(independent=True)):
            assert distil(student, teacher, kind=kind, **settings)(EXAMPLE).loss.isfinite()


def test_scores_of_several_widths_are_refused():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.few, self.many = nn.Linear(1, 3), nn.Linear(1, 4)

        def forward(self, x: Tensor) -> list[Tensor]:
            return [self.few(x), self.many(x)]

    with pytest.raises(WiringError, match="its critic needs scores of one fixed number of classes"):
        Distiller(Two(), Two(), [AdversarialScores(tap=["few", "many"])], EXAMPLE)
    both = Distiller(Two(), Two(), [AdversarialScores(tap=["many", "many"])], EXAMPLE)
    assert both(torch.zeros(2, 1), targets=torch.tensor([0, 3])).loss > 0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (dict(kind="wgan-gp"), "AdversarialScores: kind must be one of ac, lsgan, hinge, got 'wgan-gp'"),
        (dict(l1=-1), "AdversarialScores: l1 must be a number >= 0"),
        (dict(blocks=0), "AdversarialScores: blocks must be a whole number >= 1"),
        (dict(width=0), "AdversarialScores: width must be a whole number >= 1"),
        (dict(steps=0), "AdversarialScores: steps must be a whole number >= 1"),
        (dict(lr=0), "AdversarialScores: lr must be a number > 0"),
        (dict(betas=(0.5, 1.0)), "AdversarialScores: betas must be two numbers in [0, 1)"),
        (dict(penalty=1), "term AdversarialScores takes no argument 'penalty'"),
    ],
)
def test_wrong_settings(spec: dict, message: str):
    with pytest.raises(DistillError) as error:
        build_terms([dict(type="AdversarialScores", **spec)])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_recipe_and_row():
    (term,) = build_terms(expand_recipe(dict(type="akd", kind="lsgan"), RECIPES))
    assert (term.kind, term.needs, term.l1, term.weight) == ("lsgan", ("classes",), 1, 1)
    (row,) = distil(sure(1.0), sure(4.0)).rows
    assert row.adapter.startswith("critic ac, ")
    wide = torch.zeros(2, 600)
    model = Distiller(Emit(wide), Emit(wide.clone()), [AdversarialScores()], EXAMPLE)
    assert critic_of(model).critic.blocks[0][0].out_features == 512
