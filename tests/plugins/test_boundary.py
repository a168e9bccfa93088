"""Samples near the teacher's decision boundary (BSS), and further passes of a term's models within its step."""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import golden
from kdgraft import (
    RECIPES,
    BoundarySamples,
    Distiller,
    DistillError,
    Ensemble,
    Itself,
    Peer,
    Step,
    Teacher,
    Views,
    WiringError,
)
from kdgraft.boundary import base_samples, boundary_samples, target_classes
from kdgraft.fit import fit
from kdgraft.losses import soft_targets
from kdgraft.registry import expand_recipe
from kdgraft.terms import build_terms

KEY = "distill.boundary_samples"


def net(other: float) -> nn.Module:
    """A small classifier by formula, in float64; ``other`` moves it away from the teacher, which has 0."""
    layers = dict(conv=nn.Conv2d(2, 4, 3, padding=1), act=nn.Tanh(), flat=nn.Flatten(), head=nn.Linear(64, 5))
    model = nn.Sequential(OrderedDict(layers)).double()
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            shape = tuple(p.shape)
            p.copy_(golden.wave(shape, 0.7 + 0.37 * k, 0.3, 0.8) + golden.wave(shape, 1.3 + 0.2 * k, 0.1, other))
    return model


IMAGES = golden.wave((12, 2, 4, 4), 0.61, 0.5, 1.5)
DRAWN = 0.5 + golden.wave((12,), 2.3, 0.4, 0.5)


def labels_of(model: nn.Module) -> Tensor:
    """The classes that a model gives, but for the first image, where it is wrong."""
    labels = model(IMAGES).argmax(1)
    labels[0] = (labels[0] + 1) % 5
    return labels


def distil(*terms: Any, student: nn.Module | None = None, teacher: nn.Module | None = None) -> Distiller:
    return Distiller(student or net(0.25), teacher or net(0.0), list(terms) or [BoundarySamples()], IMAGES[:2])


# --- the search

# bhheo/BSS_distillation@586b1411ed067af92ab781ac4fc58f8cf58798dc on IMAGES, the teacher net(0) and the student net(0.25), with
# labels_of(teacher) and DRAWN for the numbers of the chosen samples. train_BSS_distillation.py, base sample selection and target class
# sampling: the largest number of samples, their places, their target classes.
CHOSEN = {64: ([1, 2, 3, 7, 10, 11], [1, 1, 2, 4, 1, 0]), 4: ([1, 2, 3, 7], [1, 1, 2, 4])}
# attacks/attack_BSS.py with step_alpha=0.3, as a float64, on the six samples: by steps the sum, the sum of squares and the first
# number of the moved samples.
MOVED = {
    1: (6.093283841576257, 219.6570314677379, 1.3823959515977435),
    3: (5.992677046120122, 219.6522064405346, 1.3845716607867795),
    10: (5.644730538864385, 219.73189884278122, 1.3937661623538715),
}
# After 10 steps: the cross-entropy at T = 3 of train_BSS_distillation.py less the teacher's entropy.
KL = 0.02902641670670847


@pytest.mark.parametrize("most", list(CHOSEN))
def test_base_samples_and_target_classes_of_the_authors(most: int):
    teacher, student = net(0.0)(IMAGES), net(0.25)(IMAGES)
    places, count = base_samples(student, teacher, labels_of(net(0.0)), most)
    assert (places.tolist(), count) == (CHOSEN[most][0], len(places))
    assert target_classes(teacher[places], DRAWN[places]).tolist() == CHOSEN[most][1]


@pytest.mark.parametrize("steps", list(MOVED))
def test_moved_samples_of_the_authors(steps: int):
    places, classes = (torch.tensor(x) for x in CHOSEN[64])
    teacher = net(0.0).requires_grad_(False)
    moved = boundary_samples(teacher, IMAGES[places], classes, steps=steps)
    found = (moved.sum().item(), moved.square().sum().item(), moved[0, 0, 0, 0].item())
    assert found == pytest.approx(MOVED[steps], rel=1e-12)
    # Those that have crossed the boundary stay where they are.
    flipped = teacher(moved).argmax(1) != teacher(IMAGES[places]).argmax(1)
    assert flipped.tolist() == [False, False, True, True, False, True]
    later = boundary_samples(teacher, IMAGES[places], classes, steps=steps + 1)
    assert [torch.equal(a, b) for a, b in zip(moved, later, strict=True)] == flipped.tolist()


def test_two_steps_by_hand():
    # Scores are the two numbers: s_y - s_k is their difference d and g = (-1, 1), of norm √2, so that d falls by 0.6·(d + 1e-4)/√2.
    start = torch.tensor([[3.0, 1.0]], dtype=torch.float64)
    first = 2 - 0.6 / math.sqrt(2) * 2.0001
    for steps, gap in ((1, first), (2, first - 0.6 / math.sqrt(2) * (first + 1e-4))):
        moved = boundary_samples(lambda x: x, start, torch.tensor([1]), steps=steps, bound=None)
        assert (moved[0, 0] - moved[0, 1]).item() == pytest.approx(gap)
        assert moved.sum().item() == pytest.approx(4)
    assert boundary_samples(lambda x: x, 9 * start, torch.tensor([1]), steps=1).tolist() == [[2.5, 2.5]]
    # A step of 2.4 crosses at once, and no further step follows.
    crossed = [boundary_samples(lambda x: x, start, torch.tensor([1]), steps=k, step_size=2.4) for k in (1, 5)]
    assert torch.equal(*crossed) and crossed[0][0, 1] > crossed[0][0, 0]


def test_a_score_without_a_slope_leaves_a_sample_where_it_is():
    start = torch.ones(1, 2)
    moved = boundary_samples(lambda x: torch.tensor([[1.0, 0.0]]) + 0 * x, start, torch.tensor([1]))
    assert torch.equal(moved, start)


def test_classes_are_drawn_in_proportion_to_the_other_probabilities():
    scores = torch.tensor([0.1, 0.2, 0.5, 0.2]).log().expand(8000, 4)
    drawn = target_classes(scores, torch.rand(8000, generator=torch.Generator().manual_seed(0)))
    shares = drawn.bincount(minlength=4) / 8000
    torch.testing.assert_close(shares, torch.tensor([0.2, 0.4, 0.0, 0.4]), atol=0.02, rtol=0)
    assert target_classes(scores[:2], torch.tensor([0.0, 1.0])).tolist() in ([1, 0], [3, 0])


# --- the term


def expected(distiller: Distiller, labels: Tensor, *, drawn: Tensor | None = None, **search: Any) -> Tensor:
    """The loss by hand, with the numbers that the term will draw."""
    term, teacher, student = distiller.terms["boundary_samples"], distiller.teacher.model, distiller.student
    if drawn is None:
        copied = copy.copy(term._random)
        copied._generator = None
        copied.load(term.hidden_state()["random"])
        drawn = copied.of_rows((12, 1), torch.device("cpu"))[:, 0] / 2.0**62
    scores = teacher(IMAGES)
    places, _ = base_samples(student(IMAGES), scores, labels, search.pop("samples", 64))
    moved = boundary_samples(teacher, IMAGES[places], target_classes(scores[places], drawn[places]), **search)
    return soft_targets(student(moved), teacher(moved), 3.0)


def test_the_loss_and_its_gradient():
    distiller = distil()
    labels = labels_of(distiller.teacher.model)
    value = expected(distiller, labels)
    before = copy.deepcopy(distiller.teacher.model.state_dict())
    out = distiller(IMAGES, targets=labels)
    torch.testing.assert_close(out.figures[f"{KEY}.raw"], value.detach())
    torch.testing.assert_close(out.loss, 2 / 9 * value.detach())
    assert out.losses[f"{KEY}.samples"] == 6 and out.host_share == 1
    out.loss.backward()
    slopes = torch.autograd.grad(2 / 9 * value, list(distiller.student.parameters()))
    for parameter, slope in zip(distiller.student.parameters(), slopes, strict=True):
        torch.testing.assert_close(parameter.grad, slope)
    assert all(torch.equal(before[name], x) for name, x in distiller.teacher.model.state_dict().items())
    assert not any(p.grad is not None for p in distiller.teacher.model.parameters())
    assert distiller.terms["boundary_samples"].passes is None


def test_the_authors_loss():
    places, classes = (torch.tensor(x) for x in CHOSEN[64])
    moved = boundary_samples(net(0.0), IMAGES[places], classes)
    assert soft_targets(net(0.25)(moved), net(0.0)(moved), 3.0).item() == pytest.approx(9 * KL, rel=1e-12)


def test_settings_of_the_search():
    settings: dict[str, Any] = dict(samples=3, steps=2, step_size=0.7, bound=1.2)
    distiller = distil(BoundarySamples(weight=1, **settings))
    labels = labels_of(distiller.teacher.model)
    value = expected(distiller, labels, **settings)
    out = distiller(IMAGES, targets=labels)
    torch.testing.assert_close(out.loss, value)
    assert out.losses[f"{KEY}.samples"] == 3


def test_without_a_sample_that_both_get_right_it_is_0_with_a_live_graph():
    distiller = distil()
    wrong = (labels_of(distiller.teacher.model) + 1) % 5
    wrong[0] = -100
    out = distiller(IMAGES, targets=wrong)
    out.loss.backward()
    assert out.loss.item() == 0 and out.losses[f"{KEY}.samples"] == 0
    assert not any(p.grad.any() for p in distiller.student.parameters())
    with pytest.raises(DistillError, match="boundary_samples needs the class of each item, and the batch has none"):
        distiller(IMAGES)


def test_the_classes_of_a_teacher_may_be_in_another_order():
    order = torch.tensor([3, 0, 4, 1, 2])
    mixed = net(0.0)
    with torch.no_grad():  # class k of the student is class order[k] of this teacher
        for p in mixed.head.parameters():
            p[order] = p.clone()
    source = Teacher(mixed)
    source.class_order = order
    labels = labels_of(net(0.0))
    found = []
    for teacher in (net(0.0), source):
        torch.manual_seed(0)
        term = BoundarySamples()
        found.append(distil(term, teacher=teacher)(IMAGES, targets=labels).loss)
    torch.testing.assert_close(*found)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.body = nn.BatchNorm2d(2).double(), nn.Dropout(0.3), net(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.drop(self.norm(x)))


def test_the_student_normalises_the_samples_by_their_own_statistics_as_the_authors_does():
    labels = labels_of(net(0.0))
    student, teacher = Normed(), Normed()
    distiller = distil(student=student, teacher=teacher)
    teacher_before = teacher.norm.running_mean.clone()
    drawn = torch.get_rng_state()
    distiller(IMAGES, targets=labels)
    own = torch.get_rng_state()
    assert student.norm.num_batches_tracked == 2 and torch.equal(teacher.norm.running_mean, teacher_before)
    assert student.training and not teacher.training
    # The numbers that its dropout draws there are none of the host's.
    torch.set_rng_state(drawn)
    nn.functional.dropout(IMAGES, 0.3)
    assert torch.equal(own, torch.get_rng_state())


def test_a_lone_sample_is_left_out_where_the_student_has_batch_norm():
    labels = torch.full((12,), -100)
    labels[3] = net(0.0)(IMAGES)[3].argmax()
    student = Normed()
    student.drop.p = 0.0
    for built in (student, net(0.25)):
        out = distil(student=built)(IMAGES, targets=labels)
        assert out.losses[f"{KEY}.samples"] == 1 and (out.loss == 0) == (built is student)
    assert student.norm.num_batches_tracked == 1


def test_a_resumed_run_continues(tmp_path: Path):
    labels = labels_of(net(0.0))
    torch.manual_seed(0)
    distiller = distil()
    distiller(IMAGES, targets=labels)
    torch.save(distiller.state_dict(), tmp_path / "state.pt")
    following = [distiller(IMAGES, targets=labels).loss.item() for _ in range(3)]
    torch.manual_seed(1)
    other = distil()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [other(IMAGES, targets=labels).loss.item() for _ in range(3)] == following
    assert len(set(following)) > 1


def test_a_run_that_is_interrupted_ends_as_one_that_is_not(tmp_path: Path):
    loader = DataLoader(list(zip(IMAGES, labels_of(net(0.0)), strict=True)), batch_size=6, shuffle=True)

    def run(folder: str, epochs: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = Distiller(net(0.25), net(0.0), recipe=dict(type="bss", epochs=4, steps=2), example=IMAGES[:2])
        found = fit(model, loader, nn.functional.cross_entropy, epochs=epochs, folder=tmp_path / folder, resume=True)
        return found.model.state_dict()

    run("parts", 1)
    parts, whole = run("parts", 2), run("whole", 2)
    assert parts.keys() == net(0.0).state_dict().keys()
    assert all(torch.equal(parts[name], x) for name, x in whole.items())


def test_under_autocast():
    student, teacher = net(0.25).float(), net(0.0).float()
    distiller = Distiller(student, teacher, [BoundarySamples()], IMAGES[:2].float())
    with torch.autocast("cpu", torch.bfloat16):
        out = distiller(IMAGES.float(), targets=labels_of(net(0.0)))
    out.loss.backward()
    assert out.loss.dtype is torch.float32 and out.loss > 0
    assert all(p.grad.isfinite().all() for p in student.parameters())


def test_vectors_are_samples_too():
    torch.manual_seed(0)
    student, teacher = nn.Linear(3, 4), nn.Linear(3, 4)
    student.load_state_dict({name: x + 0.1 for name, x in teacher.state_dict().items()})
    x = torch.randn(20, 3)
    out = Distiller(student, teacher, [BoundarySamples()], x)(x, targets=teacher(x).argmax(1))
    assert out.losses[f"{KEY}.samples"] > 10 and out.loss.isfinite()


def test_a_term_that_is_not_active_runs_nothing():
    distiller = distil(BoundarySamples(schedule=dict(type="Stop", end=0)))
    runs: list[int] = []
    distiller.teacher.model.register_forward_hook(lambda *_: runs.append(1))
    out = distiller(IMAGES, targets=labels_of(net(0.0)))
    assert not runs and out.loss == 0


# --- what it needs


def test_it_attacks_a_frozen_teacher_alone():
    for source, kind in ((Peer(net(0.0)), "a Peer"), (Itself(), "the student itself")):
        with pytest.raises(
            WiringError, match=f"boundary_samples attacks a frozen model .* its source is {kind}; use a"
        ):
            Distiller(net(0.25), source, [BoundarySamples()], IMAGES[:2])
    teachers = dict(a=Teacher(net(0.0)), b=Teacher(net(0.1)), both=Ensemble(["a", "b"]))
    with pytest.raises(WiringError, match=r"boundary_samples: .* add a term for each of a, b, source='a'"):
        Distiller(net(0.25), None, [BoundarySamples(source="both")], IMAGES[:2], teachers=teachers)
    average = Distiller(net(0.0), Itself(momentum=0.9), [BoundarySamples()], IMAGES[:2])
    assert average(IMAGES, targets=labels_of(net(0.0))).losses[f"{KEY}.samples"] == 11


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = net(0.0)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.body(x if mask is None else x * mask)


def test_a_batch_with_more_than_samples_is_refused():
    distiller = distil(student=Masked(), teacher=Masked())
    labels = labels_of(net(0.0))
    assert distiller(IMAGES, targets=labels).losses[f"{KEY}.samples"] == 11
    with pytest.raises(
        DistillError, match="boundary_samples runs models on samples alone, and the student also gets mask"
    ):
        distiller(IMAGES, mask=torch.ones(1).double(), targets=labels)


def test_both_models_see_the_same_samples():
    distiller = distil()
    larger = nn.functional.interpolate(IMAGES, scale_factor=2)
    with pytest.raises(
        DistillError, match=r"sees \(12, 2, 4, 4\), the teacher \(12, 2, 8, 8\); give both models one size"
    ):
        Distiller(net(0.25), Sized(), [BoundarySamples()], IMAGES)(
            Views(IMAGES, teacher=larger), targets=labels_of(net(0.0))
        )
    assert distiller(Views(IMAGES), targets=labels_of(net(0.0))).losses[f"{KEY}.samples"] == 6


class Sized(nn.Module):
    """A classifier of images of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(nn.functional.adaptive_avg_pool2d(x, 4))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = net(0.0)

    def forward(self, x: Tensor, scale: float) -> Tensor:
        return self.body(x * scale)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: distil(BoundarySamples(independent=True)), "these models score each class on its own"),
        (
            lambda: Distiller(net(0.25), TwoInputs(), [BoundarySamples()], Views(IMAGES[:2], teacher=(IMAGES[:2], 2.0))),
            "boundary_samples: the teacher cannot run on other samples alone (TypeError: ",
        ),
        (
            lambda: Distiller(nn.Conv2d(2, 5, 1), nn.Conv2d(2, 5, 1), [BoundarySamples()], torch.zeros(2, 2, 4, 4)),
            "boundary_samples needs one row of class scores for each sample (2, 2, 4, 4), and '(output)' of the student gives "
            "(2, 5, 4, 4); use SoftTargets",
        ),
        (
            lambda: Distiller(nn.Embedding(9, 5), nn.Embedding(9, 5), [BoundarySamples()], torch.zeros(2, dtype=torch.long)),
            "boundary_samples moves samples of numbers (B, …), and the student's input is (2,) torch.int64",
        ),
        (
            lambda: distil(student=nn.Sequential(nn.SyncBatchNorm(2), *net(0.0)).double()),
            "boundary_samples: the student has SyncBatchNorm",
        ),
    ],
)  # fmt: skip
def test_what_it_cannot_use_is_refused_when_wired(build: Any, message: str):
    with pytest.raises(DistillError) as error:
        build()
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (dict(samples=0), "BoundarySamples: samples must be a whole number >= 1"),
        (dict(steps=1.5), "BoundarySamples: steps must be a whole number >= 1"),
        (dict(step_size=0), "BoundarySamples: step_size must be a number > 0"),
        (dict(bound=0), "BoundarySamples: bound must be a number > 0"),
        (dict(temperature=-1), "temperature must be > 0"),
        (dict(tau=1), "term BoundarySamples takes no argument 'tau'"),
    ],
)
def test_wrong_settings(spec: dict, message: str):
    with pytest.raises(DistillError) as error:
        build_terms([dict(type="BoundarySamples", **spec)])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_recipe_has_the_weights_of_the_authors_code():
    soft, near = build_terms(expand_recipe(dict(type="bss", epochs=80, samples=32), RECIPES))
    assert (near.samples, near.temperature, soft.temperature) == (32, 3, 3)
    # Of 80 epochs, by those that are over: ratio and attack_ratio of train_BSS_distillation.py, divided by T².
    for epoch in (0, 30, 60, 79):
        at = Step(0, epoch)
        assert soft.weight_at(at) == pytest.approx((3 * (1 - epoch / 80) + 1) / 9)
        assert near.weight_at(at) == pytest.approx(max(2 * (1 - 4 / 3 * epoch / 80), 0) / 9)
    with pytest.raises(DistillError, match="bss: epochs must be a whole number >= 1"):
        expand_recipe(dict(type="bss", epochs=0), RECIPES)
