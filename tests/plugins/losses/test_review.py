"""Knowledge review: the fusion of levels, and the comparison at several sizes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import golden.dense
from kdgraft import Batch, Distiller, DistillError, Review, WiringError
from kdgraft.losses import hierarchical_context
from kdgraft.losses.review import LevelFusion, ValidNorm
from support.tensors import gradient

# dvlab-research/ReviewKD@cede6ea6387ae9b6127de0e561507177bf19c11e: Detection/model/kd_trans.py, ReviewKD([3, 4, 5], [6, 5, 4], 4)
# in training mode and hcl, in float64 on levels(); each level's modules filled by fill(): value, gradients at the first number of
# each of the student's levels, sums of their squares. And hcl alone of the teacher's first level against itself with its channels
# in reverse.
REVIEW = (
    4.395833088990784,
    *(0.001652274348864865, 0.0028406012681163923, 0.01033578912802909),
    *(0.0005797931441025018, 0.0036856897861308477, 0.02430348139668453),
)
CONTEXT = 2.4333017890323934


def levels() -> tuple[list[Tensor], list[Tensor]]:
    """Three levels of student and teacher of 9×7, 5×4 and 3×2."""
    chirp = golden.dense.chirp
    student = [
        chirp((2, 3, 9, 7), 0.41, 0.6, 1.2),
        chirp((2, 4, 5, 4), 0.37, 0.2, 1.1),
        chirp((2, 5, 3, 2), 0.29, 0.1, 0.9),
    ]
    teacher = [
        chirp((2, 6, 9, 7), 0.53, 0.9, 2.0),
        chirp((2, 5, 5, 4), 0.47, 0.3, 1.5),
        chirp((2, 4, 3, 2), 0.43, 0.8, 1.7),
    ]
    return student, teacher


def fusion() -> LevelFusion:
    module = LevelFusion([3, 4, 5], [6, 5, 4], 4)
    for level in module.levels:
        golden.dense.fill(level)
    return module


def test_authors_figures():
    student, teacher = levels()
    assert hierarchical_context(teacher[0], teacher[0].flip(1)).item() == pytest.approx(CONTEXT, rel=1e-10)
    fused = fusion()([s.requires_grad_() for s in student], [None] * 3)
    value = torch.stack([hierarchical_context(s, t) for s, t in zip(fused, teacher, strict=True)]).sum()
    slopes = torch.autograd.grad(value, student)
    found = [value.item(), *(g[0, 0, 0, 0].item() for g in slopes), *(g.square().sum().item() for g in slopes)]
    assert found == pytest.approx(REVIEW, rel=1e-10)


def test_sizes_by_hand():
    # Squares 16 + 4 + 4 + 4 + 36 = 64 of nine differences. The four cells of 2×2 overlap in the middle row and column.
    difference = torch.tensor([[4.0, 0.0, 2.0], [2.0, -2.0, 0.0], [0.0, 0.0, -6.0]])
    cells = [(4 + 0 + 2 - 2) / 4, (0 + 2 - 2 + 0) / 4, (2 - 2 + 0 + 0) / 4, (-2 + 0 + 0 - 6) / 4]  # 1, 0, 0 and −2
    halves = sum(cell**2 for cell in cells) / 4
    expected = (64 / 9 + 0.5 * halves + 0.25 * 0.0) / 1.75  # the mean of all is 0
    found = hierarchical_context(difference[None, None], torch.zeros(1, 1, 3, 3))
    assert found.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("size", [(9, 7), (4, 4), (2, 5), (1, 1)])
def test_padding_changes_nothing_whatever_its_size(size: tuple[int, int]):
    student, teacher = (
        golden.dense.chirp((2, 3, *size), 0.41, 0.6, 1.2),
        golden.dense.chirp((2, 3, *size), 0.53, 0.9, 2.0),
    )
    wide = [nn.functional.pad(x, (0, 3, 0, 2), value=math.nan) for x in (student, teacher)]
    valid = nn.functional.pad(torch.ones_like(student[:, 0]), (0, 3, 0, 2))
    torch.testing.assert_close(hierarchical_context(*wide, valid=valid), hierarchical_context(student, teacher))


def test_cells_average_valid_positions_only():
    # One of four positions is left out; the single cell of 1×1 has the mean 3 of 1, 3 and 5, the squares' mean is 35 / 3.
    difference, valid = torch.tensor([[1.0, 9.0], [3.0, 5.0]]), torch.tensor([[1, 0], [1, 1]])
    found = hierarchical_context(difference[None, None], torch.zeros(1, 1, 2, 2), valid=valid[None])
    assert found.item() == pytest.approx((35 / 3 + 0.5 * 9) / 1.5, rel=1e-6)


def test_the_norm_is_batch_norm_without_what_is_left_out():
    maps, plain = golden.dense.chirp((2, 3, 5, 4), 0.41, 0.6, 1.2), nn.BatchNorm2d(3).double()
    norm = ValidNorm(3).double()
    torch.testing.assert_close(norm(maps), plain(maps))
    wide, valid = nn.functional.pad(maps, (0, 1), value=math.inf), nn.functional.pad(torch.ones(2, 5, 4), (0, 1))
    torch.testing.assert_close(norm(wide, valid), nn.functional.pad(plain(maps), (0, 1)))
    one = norm(torch.full((1, 3, 1, 1), 7.0, dtype=torch.float64))  # where BatchNorm2d refuses
    assert not one.any()
    assert not norm(maps, torch.zeros(2, 5, 4)).any()


def test_the_norm_computes_in_float32():
    large = (1000 * golden.dense.chirp((2, 3, 5, 4), 0.41, 0.6, 1.2)).half()
    torch.testing.assert_close(ValidNorm(3)(large), nn.BatchNorm2d(3)(large.float()))


# In its term.


class Levels(nn.Module):
    """Yields the levels, as parameters."""

    def __init__(self, maps: list[Tensor]) -> None:
        super().__init__()
        self.maps = nn.ParameterList(level.float() for level in maps)
        self.neck = nn.Identity()

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.neck([level * 1 for level in self.maps])


X = torch.zeros(1)


def distil(**settings: object) -> Distiller:
    torch.manual_seed(0)
    student, teacher = levels()
    return Distiller(Levels(student), Levels(teacher), [Review("neck[*]", **settings)], example=X)


def test_the_term_adds_its_levels_and_everything_learns():
    model = distil(width=4, weight=2.0)
    for level in model.terms["review"].fusion.levels:
        golden.dense.fill(level), level.float()
    loss = model(X).loss
    assert loss.item() == pytest.approx(2 * REVIEW[0], rel=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    assert not any("fusion" in key for key in model.student.state_dict())


def test_padding_changes_nothing_in_the_term():
    batch = Batch(padded_size=(72, 56), image_sizes=[(72, 56), (40, 25)])

    def figures(junk: float) -> list[Tensor]:
        model = distil()
        for maps in (model.student.maps, model.teacher.model.maps):
            for level, stride in zip(maps, (8, 16, 32), strict=True):
                level.data[1, :, -(-40 // stride) :], level.data[1, :, :, -(-25 // stride) :] = junk, junk
        loss = model(X, batch=batch).loss
        return [loss.detach(), *torch.autograd.grad(loss, list(model.terms.parameters()))]

    torch.testing.assert_close(figures(0.0), figures(1e4), rtol=0, atol=0)


def test_nothing_valid_is_0_with_a_live_graph():
    model = distil()
    loss = model(X, batch=Batch(padded_size=(72, 56), image_sizes=[(0, 0)] * 2)).loss
    loss.backward()
    assert loss == 0 and all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_mistakes():
    student, teacher = levels()
    with pytest.raises(DistillError, match="must have the same shape"):
        hierarchical_context(student[0], teacher[0])
    with pytest.raises(WiringError, match="fuses several levels, got one"):
        Distiller(Levels(student), Levels(teacher), [Review("neck[0]")], example=X)
    with pytest.raises(WiringError, match="the largest map first; got 3×2, 5×4, 9×7"):
        Distiller(Levels(student[::-1]), Levels(teacher[::-1]), [Review("neck[*]")], example=X)
    with pytest.raises(DistillError, match="Review: width must be a whole number >= 1"):
        Review("neck[*]", width=0)


def test_gradient_of_the_norm():
    maps = golden.dense.chirp((2, 2, 2, 3), 0.41, 0.6, 1.2).requires_grad_()
    norm, valid = ValidNorm(2).double(), torch.tensor([[[1, 1, 0], [1, 0, 1]]] * 2)
    assert torch.autograd.gradcheck(lambda x: norm(x, valid), maps)
    assert not gradient(norm(maps, valid).square().sum(), maps)[:, :, 0, 2].any()


@pytest.mark.parametrize("entry", [1e18, 3e38, math.inf])
def test_what_its_normalisation_cannot_square_is_seen_in_the_loss(entry: float):
    student, teacher = ([level.float() for level in side] for side in levels())
    student[0][0, 0, 0, 0] = entry
    module = fusion().float()
    fused = module(student, [None] * 3)
    value = torch.stack([hierarchical_context(s, t) for s, t in zip(fused, teacher, strict=True)]).sum()
    slopes = torch.autograd.grad(value, [*module.parameters()], allow_unused=True)
    assert not value.isfinite() or all(slope is None or slope.isfinite().all() for slope in slopes)
