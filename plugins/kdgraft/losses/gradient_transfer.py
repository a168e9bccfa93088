"""Attention transfer by gradients: the loss of both models responds alike to changes of the input.

Zagoruyko, Komodakis, "Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks via Attention
Transfer", ICLR 2017, arXiv 1612.03928, equation 4.
"""

from __future__ import annotations

from torch import Tensor

from .reduction import Reduction, reduce_loss, same_shape, upcast


def gradient_transfer(
    student: Tensor, teacher: Tensor, *, valid: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""Attention transfer by gradients: half the squared distance of the gradients by the input (2017, equation 4).

    .. math:: \tfrac12 \left\| \frac{\partial L_s}{\partial x} - \frac{\partial L_t}{\partial x} \right\|_2^2

    Args:
        student, teacher: the gradients of both models' own losses by the images, ``(B, C, H, W)``.
        valid: ``(B, H, W)``, > 0 for the pixels to include; all by default.
        reduction: over images (those without a valid pixel are excluded); ``"none"`` gives ``(B,)``.

    Raises:
        DistillError: the shapes differ.
    """
    same_shape(student, teacher, "gradient_transfer")
    s, t = upcast(student), upcast(teacher)
    if valid is not None:
        outside = ~(valid > 0)[:, None]
        s, t = s.masked_fill(outside, 0), t.masked_fill(outside, 0)
    items = (s - t).square().flatten(1).sum(1) / 2
    return reduce_loss(items, None if valid is None else (valid > 0).flatten(1).any(1).to(items.dtype), reduction)
