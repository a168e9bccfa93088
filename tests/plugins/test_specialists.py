"""Specialists: groups of confusable classes, the dustbin class, and what generalist and specialists say together."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kdgraft import (
    BoundedRegression,
    Distiller,
    DistillError,
    Hint,
    SoftTargets,
    Specialists,
    WiringError,
)
from kdgraft.fit import fit
from kdgraft.specialists import (
    SpecialistData,
    combine_specialists,
    confusable_classes,
    correct_dustbin,
    specialist_of,
)
from kdgraft.telling import announced

X = torch.sin(torch.arange(6 * 3.0)).reshape(6, 3)


def net(width: int, seed: int, classes: int = 5) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, classes))


# --- groups


def blocks(groups: list[list[int]], classes: int) -> Tensor:
    """Predictions that hesitate between the classes of one group: (0.6, 0.4, …) and every other order within the group."""
    rows = []
    for group in groups:
        for top in group:
            row = torch.zeros(classes)
            row[group] = 0.4 / (len(group) - 1)
            row[top] = 0.6
            rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("groups", [[[0, 1, 2], [3, 4, 5]], [[0, 4], [1, 3], [2, 5]]])
def test_the_blocks_of_a_covariance_are_found(groups: list[list[int]]):
    predictions = blocks(groups, 6)
    assert sorted(confusable_classes(predictions, len(groups))) == groups
    assert sorted(confusable_classes(predictions, len(groups), len(groups[0]))) == groups
    assert sorted(confusable_classes(predictions.split(2), len(groups))) == groups  # in batches


def test_groups_of_a_size_are_the_classes_nearest_to_a_centre_and_may_share_some():
    both = torch.tensor([[0.15, 0.15, 0.4, 0.15, 0.15]])  # class 2 is as near to either group
    predictions = torch.cat([blocks([[0, 1], [3, 4]], 5), both])
    assert sorted(confusable_classes(predictions, 2, 3)) == [[0, 1, 2], [2, 3, 4]]


def test_certain_classes_are_groups_of_their_own():
    # Of predictions (1, 0), (0, 1) the covariance is ¼ (1, −1; −1, 1), with two different columns.
    assert sorted(confusable_classes(torch.eye(2), 2)) == [[0], [1]]


@pytest.mark.parametrize(
    ("predictions", "settings", "said"),
    [
        (torch.randn(8, 4), dict(count=2), r"probabilities \(N, C\), such as logits.softmax\(1\); got \(8, 4\)"),
        (torch.ones(4) / 4, dict(count=2), "must be probabilities"),
        (torch.eye(4)[:1], dict(count=2), "two samples or more"),
        ([], dict(count=2), "two samples or more"),
        (torch.ones(8, 4) / 4, dict(count=2), "fewer than 2 groups of classes; give a lower count"),
        (torch.eye(4), dict(count=2, size=4), "size must be below the number of classes, 4"),
        (torch.eye(4), dict(count=0), "count must be a whole number >= 1"),
        (torch.eye(4), dict(count=2, size=1), "size must be a whole number >= 2"),
    ],
)
def test_what_gives_no_groups_is_refused(predictions: Any, settings: dict, said: str):
    with pytest.raises(DistillError, match=said):
        confusable_classes(predictions, **settings)


# --- a specialist and its data


def test_a_specialist_starts_with_the_generalist_s_probabilities():
    generalist = net(8, 0).requires_grad_(False)
    with torch.no_grad():
        generalist[2].weight[[1, 3]] = generalist[2].weight[1].clone()  # the others score alike
        generalist[2].bias[[1, 3]] = generalist[2].bias[1].clone()
    before = copy.deepcopy(generalist.state_dict())
    model = specialist_of(generalist, [4, 0, 2])
    p = generalist(X).softmax(1)
    torch.testing.assert_close(model(X).softmax(1), torch.cat([p[:, [4, 0, 2]], p[:, [1, 3]].sum(1, True)], 1))
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in generalist.state_dict().items())
    assert not any(p.requires_grad for p in generalist.parameters())


def test_layers_without_bias_or_of_a_path():
    generalist = nn.ModuleDict(dict(head=nn.Linear(3, 4, bias=False), aside=nn.Linear(2, 7)))
    found = specialist_of(generalist, [1], head="head")
    assert found["head"].bias.tolist() == [0, pytest.approx(math.log(3))]
    assert found["aside"].out_features == 7
    assert specialist_of(nn.Linear(3, 4), [0, 2]).out_features == 3


def test_the_correction_of_the_dustbin_by_hand():
    """60 samples, 12 of them special: in training 12 of 24. The others are 4 times too rare, so that the dustbin gains log 4."""
    labels = [0] * 4 + [1] * 8 + [2] * 48
    data = SpecialistData([(i, None) for i in range(60)], labels, [1, 0])
    assert (len(data), data.oversampling) == (24, 4)
    model = specialist_of(nn.Linear(1, 3), [1, 0])
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([8 / 24, 4 / 24, 12 / 24]).log())  # as trained: the shares of its own data
    correct_dustbin(model, data.oversampling)
    torch.testing.assert_close(model(torch.zeros(1, 1)).softmax(1)[0], torch.tensor([8, 4, 48]) / 60)


def test_the_data_are_half_special_and_half_drawn_from_the_others():
    labels = torch.arange(40) % 5
    data = SpecialistData([(i, int(c)) for i, c in enumerate(labels)], labels, [3, 1])
    torch.manual_seed(0)
    seen = [data[i] for i in range(len(data))]
    assert len(seen) == 32
    special = seen[:16]
    assert sorted(x for x, _ in special) == [i for i in range(40) if i % 5 in (1, 3)]
    assert all(target == {3: 0, 1: 1}[x % 5] for x, target in special)
    assert all(target == 2 and x % 5 in (0, 2, 4) for x, target in seen[16:])
    assert seen[16:] != [data[i] for i in range(16, 32)]  # drawn anew
    torch.manual_seed(0)
    assert seen == [data[i] for i in range(32)]
    assert len([*data]) == 32  # it ends
    more = SpecialistData(data.dataset, labels, [3, 1], share=0.8)
    assert (len(more), more.oversampling) == (20, 24 / 4)


def test_a_trained_specialist_tells_its_classes_apart_and_is_calibrated():
    """Four classes on a line; the generalist sees nothing. The specialist knows 0 and 1, a fifth of the samples."""
    torch.manual_seed(0)
    labels = torch.tensor([0, 1, 2, 3, 2, 3, 2, 3, 2, 3]).repeat(8)
    inputs = F.one_hot(labels.clamp(max=2), 3).float()
    whole = [(x, int(c)) for x, c in zip(inputs, labels, strict=True)]
    generalist = nn.Sequential(nn.Linear(3, 4))
    with torch.no_grad():
        generalist[0].weight.zero_()
        generalist[0].bias.zero_()
    model, data = specialist_of(generalist, [0, 1]), SpecialistData(whole, labels, [0, 1])
    model[0].weight.requires_grad_(False)  # so that it learns shares alone
    fit(model, DataLoader(data, 32), F.cross_entropy, epochs=40, optimizer=torch.optim.SGD(model.parameters(), 1.0))
    torch.testing.assert_close(model(inputs[:1]).softmax(1)[0], torch.tensor([0.25, 0.25, 0.5]), rtol=0, atol=0.02)
    correct_dustbin(model, data.oversampling)
    torch.testing.assert_close(model(inputs[:1]).softmax(1)[0], torch.tensor([0.1, 0.1, 0.8]), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: specialist_of(nn.ReLU(), [0]), "the ReLU has no linear layer; a specialist needs one"),
        (lambda: specialist_of(net(4, 0), [0], head="3"), "the Sequential has no linear layer '3'; known: '0', '2'"),
        (lambda: specialist_of(net(4, 0), [5]), r"some of 0 … 4, got \[5\]"),
        (lambda: specialist_of(net(4, 0), range(5)), "some of 0 … 4"),
        (lambda: specialist_of(net(4, 0), [1, 1]), "a list of different numbers >= 0"),
        (lambda: specialist_of(net(4, 0), []), "a list of different numbers >= 0"),
        (lambda: SpecialistData([1, 2], [0], [0]), "2 samples need as many labels, got 1"),
        (lambda: SpecialistData([1, 2], [0, 0], [0]), "no sample of other classes"),
        (lambda: SpecialistData([1, 2], [0, 0], [1]), "no sample of its classes"),
        (lambda: SpecialistData([1, 2], [0, 1], [1], share=1), "share must be below 1"),
        (lambda: correct_dustbin(nn.Linear(2, 2, bias=False), 3), "has no bias"),
        (lambda: correct_dustbin(nn.Linear(2, 2), 0), "oversampling must be a number > 0"),
        (lambda: Specialists("g", {}), "give the name of the generalist, and the classes of each specialist"),
        (lambda: Specialists("g", dict(g=[0])), "'g' is the generalist and cannot be a specialist, too"),
        (lambda: Specialists("g", dict(a="01")), "a list of different numbers >= 0"),
    ],
)
def test_what_makes_no_sense_is_refused(build: Any, said: str):
    with pytest.raises(DistillError, match=said):
        build()


# --- together


def test_one_specialist_in_closed_form():
    """With one specialist q is the mean of both on its classes; the dustbin's mean is shared as the generalist shares it."""
    generalist = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.4, 0.3]]).log()
    specialist = torch.tensor([[0.3, 0.6, 0.1], [0.3, 0.6, 0.1]]).log()
    found = combine_specialists(generalist, [specialist], [[1, 0]]).exp()
    # Of the first: classes 0 and 1 are (0.4 + 0.6) / 2 and (0.3 + 0.3) / 2; the others share (0.3 + 0.1) / 2 by 2 : 1.
    # The generalist finds class 2 most probable for the second, of which the specialist knows nothing.
    expected = torch.tensor([[0.5, 0.3, 0.4 / 3, 0.2 / 3], [0.1, 0.2, 0.4, 0.3]])
    torch.testing.assert_close(found, expected)


def divergence(q: Tensor, p: Tensor, said: list[Tensor], classes: list[list[int]]) -> Tensor:
    """The sum of the KLs of eq. 5 for one item, as the paper writes it."""
    total = (p * (p / q).log()).sum()
    for own, r in zip(classes, said, strict=True):
        rest = [c for c in range(len(q)) if c not in own]
        both = torch.cat([q[own], q[rest].sum()[None]])
        total = total + (r * (r / both).log()).sum()
    return total


def test_it_is_the_minimum_of_the_sum_of_divergences():
    torch.manual_seed(0)
    p = torch.randn(7).double().mul(2).log_softmax(0)
    top = int(p.argmax())
    classes = [
        [top, (top + 1) % 7, (top + 2) % 7],
        [(top + 3) % 7, top],
        [top, (top + 2) % 7, (top + 4) % 7, (top + 5) % 7],
    ]
    said = [torch.randn(len(own) + 1).double().mul(2) for own in classes]
    q = combine_specialists(p[None], [r[None] for r in said], classes)[0].exp()
    assert q.dtype == torch.float64
    torch.testing.assert_close(q.sum(), torch.ones((), dtype=torch.float64))
    # The conditions of optimality: the derivative of the sum by every probability is the same, −(1 + 3).
    leaf = q.clone().requires_grad_()
    said = [r.softmax(0) for r in said]
    (slope,) = torch.autograd.grad(divergence(leaf, p.exp(), said, classes), leaf)
    torch.testing.assert_close(slope, torch.full_like(slope, -4.0), rtol=1e-6, atol=0)
    # And the paper's own way: descent on the logits of q.
    z = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [z], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = divergence(z.softmax(0), p.exp(), said, classes)
        value.backward()
        return value

    optimizer.step(closure)
    torch.testing.assert_close(q, z.softmax(0).detach(), rtol=1e-5, atol=1e-8)


def test_certain_models_give_finite_numbers():
    generalist = torch.tensor([[500.0, 0, 0, -500]])
    found = combine_specialists(generalist, [torch.tensor([[-300.0, 0, 300]])], [[0, 1]])
    assert torch.isfinite(found).all()
    # The dustbin is certain, and of its members the generalist prefers class 2: half for class 0, half for class 2.
    torch.testing.assert_close(found.exp(), torch.tensor([[0.5, 0, 0.5, 0]]))


def test_maps_have_their_classes_at_axis_1():
    torch.manual_seed(0)
    p, r = torch.randn(2, 4, 3, 5), torch.randn(2, 3, 3, 5)
    maps = combine_specialists(p, [r], [[3, 1]], dim=1)
    rows = combine_specialists(p.movedim(1, -1), [r.movedim(1, -1)], [[3, 1]])
    assert maps.shape == p.shape
    assert torch.equal(maps.movedim(1, -1), rows)


# --- as a source


def sources(**more: Any) -> dict[str, Any]:
    generalist = net(8, 1)
    a, b = specialist_of(net(7, 3), [3, 1]), specialist_of(net(6, 4), [2, 3, 4])
    both = dict(type="Specialists", generalist="g", specialists=dict(a=[3, 1], b=[2, 3, 4]))
    return dict(g=generalist, a=a, b=b, teacher=both) | more


def test_a_student_learns_what_they_say_together():
    given = sources()
    student = net(4, 0)
    model = Distiller(student, teachers=given, terms=[SoftTargets(2)], example=X[:1])
    out = model.train()(X)
    together = combine_specialists(given["g"](X), [given["a"](X), given["b"](X)], [[3, 1], [2, 3, 4]])
    kl = F.kl_div((student(X) / 2).log_softmax(1), (together / 2).softmax(1), reduction="batchmean")
    torch.testing.assert_close(out.losses["distill.soft_targets.loss"], 4 * kl)
    assert not torch.allclose(together, given["g"](X).log_softmax(1))
    out.loss.backward()
    assert all(p.grad is None for name in "gab" for p in given[name].parameters())
    assert "teacher: g with the specialists a, b into Sequential" in announced(model, student)


class Stopped(Exception):
    """The run was stopped."""


@pytest.mark.parametrize("kind", ["specialist", "student"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path: Path, kind: str):
    inputs, labels = torch.sin(torch.arange(40 * 3.0)).reshape(40, 3), torch.arange(40) % 5
    whole = TensorDataset(inputs, labels)
    data = SpecialistData(whole, labels, [3, 1]) if kind == "specialist" else whole
    steps = 0

    def stopping(output: Tensor, targets: Tensor) -> Tensor:
        nonlocal steps
        steps += 1
        if steps > 6:  # of four or five an epoch
            raise Stopped
        return F.cross_entropy(output, targets)

    def run(seed: int, loss: Any, name: str) -> Any:
        model: nn.Module = specialist_of(net(6, 4), [3, 1])
        if kind == "student":
            model = Distiller(net(4, 0), teachers=sources(), terms=[SoftTargets(2)], example=X[:1])
        torch.manual_seed(seed)
        loader = DataLoader(data, 8, shuffle=True)
        return fit(model, loader, loss, epochs=3, folder=tmp_path / name, resume=True)

    expected = run(0, F.cross_entropy, "whole")
    with pytest.raises(Stopped):
        run(0, stopping, "parts")
    found = run(1, F.cross_entropy, "parts")
    assert found.history == expected.history and len(found.history) == 3
    ours, theirs = found.model.state_dict(), expected.model.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_classes_of_a_specialist_in_another_order_are_refused():
    model = Distiller(net(4, 0), teachers=sources(), terms=[SoftTargets(2)], example=X[:1])
    model.sources["g"].class_order = torch.arange(5)  # the generalist's are put in the student's order, as usual
    model.train()(X)
    model.sources["a"].class_order = torch.tensor([1, 0, 2])
    with pytest.raises(DistillError, match="the order of the classes of 'a' must be that of the Specialists"):
        model(X)


@pytest.mark.parametrize(
    ("more", "term", "said"),
    [
        (
            dict(a=net(6, 2)),
            SoftTargets(),
            r"gives \(1, 5\) in 'a' and \(1, 5\) in 'g'; a specialist scores its own classes and",
        ),
        (
            dict(teacher=Specialists("g", dict(a=[0, 7], b=[2, 3, 4]))),
            SoftTargets(),
            r"Specialists, 'a': the classes of a specialist are some of 0 … 4",
        ),
        (
            dict(teacher=Specialists("g", dict(a=[0, 1], c=[2]))),
            SoftTargets(),
            "Specialists 'teacher': 'c' is not a source",
        ),
        ({}, Hint("0"), "hint: Specialists give predictions, which this term does not compare; use source='g'"),
        ({}, BoundedRegression(), "Specialists score classes, which this term does not compare"),
        ({}, SoftTargets(independent=True), "Specialists need exclusive classes"),
    ],
)
def test_what_they_cannot_teach_is_refused(more: dict, term: Any, said: str):
    with pytest.raises(DistillError, match=said) as caught:
        Distiller(net(4, 0), teachers=sources(**more), terms=[term], example=X[:1])
    assert isinstance(caught.value, WiringError) or "'c'" in str(caught.value) or "some of" in str(caught.value)
