"""Relations: any similarity goes with any comparison; each by hand."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from scipy.spatial.distance import cdist

from kdgraft import DistillError
from kdgraft.losses import relations
from kdgraft.losses.relations import (
    angle,
    between_samples,
    cosine,
    distance,
    divergence,
    dot,
    huber,
    kernel,
    squared_difference,
)
from support.tensors import gradient

SIMILARITIES = dict(dot=dot, cosine=cosine, distance=distance, angle=angle, kernel=kernel)
COMPARISONS = dict(divergence=divergence, squared_difference=squared_difference, huber=huber)


def items(seed: int, width: int, *lead: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*lead, 4, width, generator=generator, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("comparison", COMPARISONS)
def test_they_compose_for_items_of_any_widths(similarity: str, comparison: str):
    both = SIMILARITIES[similarity], COMPARISONS[comparison]
    student, teacher = items(0, 3, 2), items(1, 5, 2)
    found = relations(student, teacher, *both)
    assert found.shape == (2, 4)
    assert (found > 0).all()
    for image in range(2):
        torch.testing.assert_close(relations(student[image], teacher[image], *both), found[image])
    assert not relations(teacher, teacher, *both).any()
    assert torch.autograd.gradcheck(lambda s, t: relations(s, t, *both), (student, teacher))


@pytest.mark.parametrize("comparison", COMPARISONS)
def test_relations_that_are_left_out_are_not_there(comparison: str):
    compare = COMPARISONS[comparison]
    student, teacher = items(0, 3), items(1, 5)
    others = student[:3], teacher[:3]
    valid = torch.tensor([True, True, True, False])
    torch.testing.assert_close(
        relations(student, teacher, cosine, compare, valid=valid),
        relations(student, teacher, cosine, compare, others=others),
    )


def test_distances_of_scipy_and_their_gradient_where_items_coincide():
    student, teacher = items(0, 3), items(1, 3)
    expected = torch.from_numpy(cdist(student.detach().numpy(), teacher.detach().numpy()))
    torch.testing.assert_close(distance(student, teacher), expected)
    same = torch.ones(3, 2, requires_grad=True)
    assert torch.equal(gradient(distance(same, same).sum(), same), torch.zeros(3, 2))


def test_angles_by_hand():
    # At the origin the others lie on the axes, at 90°, and one on the item itself, at which there is no angle.
    corner, axes = torch.zeros(1, 2), torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [0.0, 0.0]])
    expected = [[1.0, 0.0, -1.0, 0.0], [0.0, 1.0, 0.0, 0.0], [-1.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    assert angle(corner, axes).view(4, 4).tolist() == expected


def test_the_kernel_is_the_gaussian_of_directions_as_its_series_grows():
    student, teacher = items(0, 3), items(1, 3)
    unit = [x / x.norm(dim=1, keepdim=True) for x in (student, teacher)]
    exact = torch.exp(-0.4 * torch.cdist(*unit).square())
    torch.testing.assert_close(kernel(student, teacher, 0.4, 30), exact)
    # For equal directions: exp(-0.8) · (1 + 0.8 + 0.32).
    assert kernel(student, student)[0, 0].item() == pytest.approx(math.exp(-0.8) * 2.12)


def test_huber_by_hand():
    # 0.5 · 0.5² within 1, and 3 - 0.5 beyond.
    assert huber(torch.tensor([0.5, 3.0]), torch.zeros(2)).item() == pytest.approx(0.125 + 2.5)
    assert huber(torch.tensor([0.5, math.inf]), torch.zeros(2), torch.tensor([1, 0])).item() == 0.125


def test_between_samples_only_those_that_count_and_at_any_scale():
    rows = partial(between_samples, "rows", compute=lambda s, t: relations(s, t, cosine, huber))
    student, teacher = items(0, 3), items(1, 5)
    valid = torch.tensor([1, 0, 2, 1])
    found = rows(student, teacher, valid=valid, reduction="none")
    alone = rows(student[[0, 2, 3]], teacher[[0, 2, 3]], reduction="none")
    torch.testing.assert_close(found[[0, 2, 3]], alone)
    assert found[1] == 0
    torch.testing.assert_close(rows(student * 1e-200, teacher * 1e200), rows(student, teacher))
    for shapes in ((student[0], teacher[0]), (student[:2], teacher)):
        with pytest.raises(DistillError, match=r"rows: student .* must have the same samples, \(B, C\)"):
            rows(*shapes)
