"""Token relations: similarities between the queries, keys or values of a sequence (MiniLM, MiniLMv2).

Wang et al., "MiniLM", 2020, arXiv 2002.10957, equation 6; Wang et al., "MiniLMv2", 2021, arXiv 2012.15828, equations 5 to 7.
"""

from __future__ import annotations

import math

from torch import Tensor

from ..errors import DistillError
from .reduction import Reduction, reduce_loss, upcast
from .relations import divergence, dot, relations


def token_relations(
    student_vectors: Tensor,
    teacher_vectors: Tensor,
    heads: int,
    *,
    valid: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Token relations: KL of softmax(AAᵀ/√d) over R relation heads, for A the queries, keys or values (MiniLMv2 2021).

    .. math:: \mathrm{KL}\!\left(\mathrm{softmax}\frac{A_t A_t^\top}{\sqrt{d_t}} \,\Big\|\,
              \mathrm{softmax}\frac{A_s A_s^\top}{\sqrt{d_s}}\right)

    The vectors are split into ``heads`` equal parts, so that the numbers of attention heads and the widths of the two models may
    differ.

    Args:
        student_vectors: ``(B, L, D_s)``, with all heads concatenated.
        teacher_vectors: ``(B, L, D_t)``.
        heads: R, which must divide both widths.
        valid: true for the tokens to which a token may be related; broadcasts to ``(B, R, L, L)``; ``None`` for all.
        weight: weights that broadcast to ``(B, R, L)``.
        reduction: over the R·L rows of each sequence.
    """
    both = _parts(student_vectors, heads, "student"), _parts(teacher_vectors, heads, "teacher")
    return reduce_loss(relations(*both, _scaled_dot, divergence, valid=valid), weight, reduction)


def _parts(vectors: Tensor, heads: int, owner: str) -> Tensor:
    """Cut the width into R parts: ``(B, L, D) -> (B, R, L, D/R)``.

    Raises:
        DistillError: R does not divide the width.
    """
    batch, length, width = vectors.shape
    if heads < 1 or width % heads:
        raise DistillError(f"token_relations: {heads} relation heads do not divide the {owner}'s width {width}")
    return upcast(vectors).view(batch, length, heads, width // heads).transpose(1, 2)


def _scaled_dot(parts: Tensor, others: Tensor) -> Tensor:
    return dot(parts, others) / math.sqrt(parts.shape[-1])
