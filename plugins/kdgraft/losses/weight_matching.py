"""Weight matching: the student's weights stay near the teacher's, or near a linear map of them.

With the teacher as the start of the student's training this is L2-SP: Li, Grandvalet, Davoine, "Explicit Inductive Bias for Transfer
Learning with Convolutional Networks", ICML 2018, arXiv 1802.01483, equation 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import DistillError
from .reduction import same_shape, upcast


def weight_matching(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    r"""Weight matching: squared distance of the student's weights to the teacher's (Li et al. 2018, equation 2).

    .. math:: \sum_k \|w^s_k - w^t_k\|_2^2

    The paper has the factor α/2, which the term's weight includes. Like weight decay, the loss is a sum over all weights.

    Args:
        student: the student's tensors of weights, of any shapes.
        teacher: the teacher's tensors, after a map where their shapes differed.

    Returns:
        A scalar.

    Raises:
        DistillError: there is nothing to compare, or the shapes differ.
    """
    if not student or len(student) != len(teacher):
        raise DistillError(
            f"weight_matching: compare at least one tensor, and as many of each, got {len(student)} and {len(teacher)}"
        )
    for ours, theirs in zip(student, teacher, strict=True):
        same_shape(ours, theirs, "weight_matching")
    parts = [(upcast(s) - upcast(t)).square().sum() for s, t in zip(student, teacher, strict=True)]
    return torch.stack(parts).sum()
