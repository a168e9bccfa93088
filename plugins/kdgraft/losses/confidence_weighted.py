"""Confidence-weighted labels (CWTM): the cross-entropy of each item counts as much as the teacher is sure of its own prediction.

Furlanello, Lipton, Tschannen, Itti, Anandkumar, "Born Again Neural Networks", ICML 2018, arXiv 1805.04770, section 3.2, equation 9.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .labelled import Labelled
from .reduction import Reduction, reduce_loss, upcast


def confidence(teacher_logits: Tensor, *, dim: int = -1, weight: Tensor | None = None) -> Tensor:
    """Return the largest probability that the teacher gives to a class of each item, times the item's weight.

    Args:
        teacher_logits: ``(…, C, …)`` with the classes at ``dim``.
        dim: the class dimension.
        weight: item weights that broadcast to the shape without ``dim``; items with weight 0 are left out.

    Returns:
        The confidences, of the shape without ``dim``, in float32 or more.
    """
    return reduce_loss(F.softmax(upcast(teacher_logits), dim).amax(dim), weight, "none")


def confidence_weighted(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    dim: int = -1,
    present: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross-entropy with the labels times the teacher's confidence (CWTM; Furlanello et al. 2018, equation 9).

    .. math:: -\max_c p_{t,c} \, \log p_{s,y}

    The paper divides the sum over a batch by the sum of the :func:`confidence` of its items, not by their number;
    :class:`kdgraft.CWTM` does so over the batch of all processes.

    Args:
        student_logits, teacher_logits: ``(…, C, …)`` with the classes at ``dim``, the same shape.
        labels: the true classes, integers of the shape without ``dim``; items with a label outside 0 … C − 1 are left out.
        dim: the class dimension.
        present: ``(…, C, …)``, true for the classes that an item has; all by default.
        weight: item weights that broadcast to the shape of ``labels``.
        reduction: over items.

    Raises:
        DistillError: the shapes differ.
    """
    items = Labelled("confidence_weighted", student_logits, teacher_logits, labels, dim, present, weight)
    student, teacher = items.both
    return reduce_loss(-items.binary(student)[..., 0] * confidence(teacher), items.weight, reduction)
