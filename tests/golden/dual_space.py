"""Small causal models whose weights follow a formula, their tokens, and the figures of DSKD's authors on them.

songmzhang/DSKD@077337ac989045ccf11a6dd927418e3cf4f40971:code/criterions, DualSpaceKD.compute_dual_space_kd_loss and
DualSpaceKDWithCMA.compute_dual_space_kd_loss_with_cma, with kd_temperature 2, teacher_temperature 1 and the projections
below, divided by the 10 tokens of the student. The authors' inputs are the tokens without the last one and their labels
those without the first, so that every token counts. Their code computes in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from golden.dense import chirp


def fill(module: nn.Module) -> None:
    """Weights by formula, each layer's of its own; norms are near 1."""
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            values = chirp(tuple(parameter.shape), 0.37 + 0.01 * number, 0.2, 0.3)
            parameter.copy_(values + 1 if parameter.ndim == 1 and parameter.shape[0] > 1 else values)


def tokens(other: bool) -> tuple[Tensor, Tensor]:
    """The tokens of two texts to student and teacher, ``(2, 6)``, or, of another tokenizer, ``(2, 8)``."""
    student = torch.tensor([[1, 7, 3, 9, 2, 5], [4, 0, 8, 10, 6, 1]])
    teacher = torch.tensor([[3, 12, 7, 1, 9, 4, 11, 2], [8, 5, 12, 0, 6, 10, 3, 7]])
    return student, teacher if other else student


def projections(names: dict[str, nn.Linear]) -> None:
    """Fill the projections, by the authors' names: t2s, s2t and query."""
    for number, name in enumerate(("t2s", "s2t", "query")):
        if name in names:
            with torch.no_grad():
                linear: Any = names[name]
                linear.weight.copy_(chirp(tuple(linear.weight.shape), 0.53 + 0.02 * number, 0.4, 0.4))
                linear.bias.copy_(chirp(tuple(linear.bias.shape), 0.29, 0.1 * number, 0.1))


# (cross-model attention, divergence in the student's space): value, and sums of squared gradients of the student, of t2s, of
# s2t, and of query.
FIGURES = {
    (False, "forward_kl"): (3.621669292449951, 2.729786056736638, 2.503051712442147, 0.05603133811877311),
    (False, "reverse_kl"): (3.6157405376434326, 4.2161270885184114, 2.503051712442147, 0.05603133811877311),
    (True, "forward_kl"): (
        2.8971471786499023,
        9.531122555967114,
        1.5287515328648487,
        0.1155242128202783,
        0.06848912810909466,
    ),
}
