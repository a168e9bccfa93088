"""Cross-image relations: in the batch and to a memory."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import golden.dense
from kdgraft import DistillError
from kdgraft.losses import memory_relations, pixel_relations, soft_targets
from support.tensors import gradient

# Of 2×20 pixels; both images have both kinds.
VALID = (torch.arange(40) % 3 != 1).reshape(2, 20)


def pixels() -> tuple[Tensor, Tensor]:
    """``(2, 20, 3)`` and ``(2, 20, 6)``."""
    student, teacher = (x.flatten(2).transpose(1, 2).contiguous() for x in golden.dense.features())
    return student, teacher


def direct(student: Tensor, teacher: Tensor, others: tuple[Tensor, Tensor], valid: Tensor, inside: Tensor) -> Tensor:
    """The mean over pairs of images and valid pixels at temperature 0.1, pixel by pixel."""
    items = []
    for i, j, pixel in np.ndindex(len(student), len(others[0]), student.shape[1]):
        if valid[i, pixel]:
            cosines = [
                torch.cosine_similarity(mine[i, pixel][None], their[j, inside[j]], dim=1)
                for mine, their in ((student, others[0]), (teacher, others[1]))
            ]
            p, q = ((x / 0.1).softmax(0) for x in reversed(cosines))
            items.append((p * (p / q).log()).sum())
    return torch.stack(items).mean()


# --- in the batch


@pytest.mark.parametrize("temperature", golden.dense.PIXEL_RELATIONS)
def test_authors_figures(temperature: float):
    student, teacher = pixels()
    value = pixel_relations(student.requires_grad_(), teacher, temperature)
    slope = gradient(value, student)
    figures = [value.item(), slope[0, 0, 0].item(), slope.square().sum().item()]
    np.testing.assert_allclose(figures, golden.dense.PIXEL_RELATIONS[temperature], rtol=1e-9)


def test_two_pixels_by_hand():
    # Student's cosines are 1 and 0: at τ = 1 the softmax is e / (e + 1) = 0.731059 and 0.268941. Teacher's are 1 and 1: ½, ½.
    # KL = ½ ln(½ / 0.731059) + ½ ln(½ / 0.268941) = 0.120115, for both pixels, without a factor T².
    student, teacher = torch.tensor([[[2.0, 0.0], [0.0, 5.0]]]), torch.tensor([[[1.0], [3.0]]])
    items = pixel_relations(student, teacher, 1.0, reduction="none")
    assert items.tolist() == [[[pytest.approx(0.120115, abs=1e-6)] * 2]]
    # At τ = ½ the softmax is e² / (e² + 1) = 0.880797 and 0.119203: ½ ln(½ / 0.880797) + ½ ln(½ / 0.119203) = 0.433781
    assert pixel_relations(student, teacher, 0.5).item() == pytest.approx(0.433781, abs=1e-6)


def test_two_images_by_hand():
    # One pixel of one image to two of another: as above.
    student, teacher = torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[1.0]]])
    others = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[[1.0], [1.0]]]), None
    items = pixel_relations(student, teacher, 1.0, others=others, reduction="none")
    assert items.shape == (1, 1, 1)
    assert items.item() == pytest.approx(0.120115, abs=1e-6)


def test_pixel_by_pixel():
    student, teacher = pixels()
    everywhere = torch.ones_like(VALID)
    torch.testing.assert_close(
        pixel_relations(student, teacher), direct(student, teacher, (student, teacher), everywhere, everywhere)
    )
    torch.testing.assert_close(
        pixel_relations(student, teacher, valid=VALID), direct(student, teacher, (student, teacher), VALID, VALID)
    )


@pytest.mark.parametrize(("valid", "inside"), [(None, None), (VALID, None), (None, VALID), (VALID, ~VALID)])
def test_other_images(valid: Tensor | None, inside: Tensor | None):
    student, teacher = pixels()
    others = golden.dense.chirp((2, 20, 3), 0.19, 0.3, 1.0), golden.dense.chirp((2, 20, 6), 0.23, 0.3, 1.0)
    everywhere = torch.ones_like(VALID)
    expected = direct(
        student,
        teacher,
        others,
        everywhere if valid is None else valid,
        everywhere if inside is None else inside,
    )
    value = pixel_relations(student, teacher, valid=valid, others=(*others, inside))
    torch.testing.assert_close(value, expected)


def test_the_batch_itself_is_the_default():
    student, teacher = pixels()
    value = pixel_relations(student, teacher, valid=VALID, others=(student, teacher, VALID))
    torch.testing.assert_close(value, pixel_relations(student, teacher, valid=VALID))


def test_pixels_may_scale_and_each_model_may_rotate():
    student, teacher = pixels()
    expected = pixel_relations(student, teacher)
    scale = 1.5 + golden.dense.wave((2, 20, 1), 1.3, 0.2, 1.0)
    rotation = torch.linalg.qr(golden.dense.chirp((6, 6), 0.31, 0.2, 1.0)).Q
    torch.testing.assert_close(pixel_relations(scale * student, teacher @ rotation), expected)
    value = pixel_relations(teacher, teacher @ rotation)
    torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-13)


@pytest.mark.parametrize("junk", [0.0, math.nan])
def test_what_stands_at_invalid_pixels_of_other_images_does_not_matter(junk: float):
    student, teacher = pixels()
    expected = pixel_relations(student, teacher, others=(student, teacher, VALID))
    other_student, other_teacher = (x.masked_fill(~VALID[..., None], junk) for x in (student, teacher))
    other_student.requires_grad_()
    value = pixel_relations(student, teacher, others=(other_student, other_teacher, VALID))
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    slope = gradient(value, other_student)
    assert slope.isfinite().all()
    assert slope.any()
    assert not slope[~VALID].any()


def test_an_image_without_a_valid_pixel_does_not_count():
    student, teacher = pixels()
    valid = VALID.clone()
    valid[1] = False
    expected = pixel_relations(student[:1], teacher[:1], valid=VALID[:1])
    torch.testing.assert_close(pixel_relations(student, teacher, valid=valid), expected)
    # Nor as one of the others.
    others = pixel_relations(student, teacher, others=(student, teacher, valid))
    expected = pixel_relations(student, teacher, others=(student[:1], teacher[:1], valid[:1]))
    torch.testing.assert_close(others, expected)


def test_a_single_pixel_and_constant_features_cost_nothing():
    student, teacher = pixels()
    only = torch.zeros(2, 20)
    only[:, 7] = 1
    for s, t, valid in (
        (student[:, :1], teacher[:, :1], None),
        (student, teacher, only),
        (torch.full_like(student, 2.0), torch.full_like(teacher, -3.0), None),
    ):
        leaf = s.clone().requires_grad_()
        value = pixel_relations(leaf, t, valid=valid)
        assert value.item() == pytest.approx(0, abs=1e-14)
        torch.testing.assert_close(gradient(value, leaf), torch.zeros_like(leaf), rtol=0, atol=1e-14)


def test_gradient_of_other_images():
    student, teacher = (x[:, :4].contiguous().requires_grad_() for x in pixels())
    own = golden.dense.chirp((1, 3, 3), 0.19, 0.3, 1.0), golden.dense.chirp((1, 3, 6), 0.23, 0.3, 1.0)
    loss = lambda s, t: pixel_relations(*own, 0.5, others=(s, t, VALID[:, :4]))  # noqa: E731
    assert torch.autograd.gradcheck(loss, (student, teacher))


@pytest.mark.parametrize("shape", [(2, 19, 6), (1, 20, 6)])
def test_pixels_must_be_the_same(shape: tuple[int, ...]):
    with pytest.raises(DistillError, match=r"student \(2, 20, 3\) and teacher \(.*\) must have the same pixels"):
        pixel_relations(pixels()[0], torch.ones(shape))


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, True])
def test_temperatures_must_be_positive(temperature: float):
    student, teacher, memory = golden.dense.embeddings()
    with pytest.raises(DistillError, match="temperature must be > 0"):
        pixel_relations(*pixels(), temperature)
    with pytest.raises(DistillError, match="temperature must be > 0"):
        memory_relations(student, teacher, memory, contrast_temperature=temperature)
    with pytest.raises(DistillError, match="temperature must be > 0"):
        memory_relations(student, teacher, memory, temperature=temperature)


# --- to a memory


@pytest.mark.parametrize("temperature", golden.dense.MEMORY_RELATIONS)
def test_authors_figures_of_the_memory(temperature: float):
    student, teacher, memory = golden.dense.embeddings()
    value = memory_relations(student.requires_grad_(), teacher, memory, temperature=temperature)
    slope = gradient(value, student)
    figures = [value.item(), slope[0, 0].item(), slope.square().sum().item()]
    np.testing.assert_allclose(figures, golden.dense.MEMORY_RELATIONS[temperature], rtol=1e-9)


def test_memory_by_hand():
    # Student's cosines to both memories are √½: ½ and ½. Teacher's are 1 and 0, at τ = 1: 0.731059 and 0.268941.
    # KL = 0.731059 ln(0.731059 / ½) + 0.268941 ln(0.268941 / ½) = 0.110944
    student, teacher = torch.tensor([[3.0, 3.0]]), torch.tensor([[2.0, 0.0]])
    memory = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    value = memory_relations(student, teacher, memory, contrast_temperature=1.0)
    assert value.item() == pytest.approx(0.110944, abs=1e-6)
    # τ = ½ and T = 2 make the same softmax, times T² = 4.
    value = memory_relations(student, teacher, memory, contrast_temperature=0.5, temperature=2.0)
    assert value.item() == pytest.approx(4 * 0.110944, abs=4e-6)


def test_memory_is_a_soft_target_over_cosines():
    student, teacher, memory = golden.dense.embeddings()
    s, t = (torch.cosine_similarity(x[:, None], memory[None], dim=2) / 0.2 for x in (student, teacher))
    for reduction in ("none", "sum", "mean"):
        value = memory_relations(
            student, teacher, memory, contrast_temperature=0.2, temperature=3.0, reduction=reduction
        )
        torch.testing.assert_close(value, soft_targets(s, t, 3.0, reduction=reduction))


def test_memory_does_not_see_lengths_nor_its_order():
    student, teacher, memory = golden.dense.embeddings()
    expected = memory_relations(student, teacher, memory)
    scale = 1.5 + golden.dense.wave((9, 1), 1.3, 0.2, 1.0)
    value = memory_relations(scale[:7] * student, 3 * teacher, (scale * memory).flip(0))
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize(("count", "size"), [(7, 0), (0, 9), (0, 0)])
def test_without_memory_or_pixels_it_is_0_with_a_live_graph(count: int, size: int):
    student, teacher, memory = golden.dense.embeddings()
    student = student[:count].clone().requires_grad_()
    value = memory_relations(student, teacher[:count], memory[:size])
    assert value.item() == 0
    assert torch.equal(gradient(value, student), torch.zeros_like(student))
    assert memory_relations(student, teacher[:count], memory[:size], reduction="none").tolist() == [0] * count


def test_one_memory_and_a_constant_one_cost_nothing():
    student, teacher, memory = golden.dense.embeddings()
    for own in (memory[:1], memory[:1].expand(5, 6)):
        value = memory_relations(student.requires_grad_(), teacher, own)
        assert value.item() == pytest.approx(0, abs=1e-14)
        torch.testing.assert_close(gradient(value, student), torch.zeros_like(student), rtol=0, atol=1e-13)


def test_memory_gradient():
    student, teacher, memory = golden.dense.embeddings()
    inputs = [x.requires_grad_() for x in (student[:3].clone(), teacher[:3].clone(), memory[:4].clone())]
    for reduction in ("mean", "none"):
        loss = lambda *x, r=reduction: memory_relations(*x, contrast_temperature=0.5, reduction=r)  # noqa: E731
        assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize(("teacher", "memory"), [((7, 5), (9, 6)), ((6, 6), (9, 6)), ((7, 6), (9, 5))])
def test_widths_must_be_equal(teacher: tuple[int, ...], memory: tuple[int, ...]):
    with pytest.raises(DistillError, match=r"memory_relations: student \(7, 6\), teacher .* must have the same width"):
        memory_relations(torch.ones(7, 6), torch.ones(teacher), torch.ones(memory))
