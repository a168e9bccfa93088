"""Terms on class scores that treat the true class of an item apart from the others: DKD and NKD."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import check_number
from ..losses import decoupled, normalized
from ..pairs import Pairs
from ..registry import RECIPES, TERMS
from .pairs import TemperedTerm


@TERMS.register
@RECIPES.register("dkd")
class DKD(TemperedTerm):
    """Decoupled distillation (DKD): the true class against the rest, and the other classes (Zhao et al. 2022, arXiv 2203.08679).

    Published with weight 1 beside the hard loss of weight 1: β = 8 (CIFAR-100, between 1 and 8 by the pair) with T = 4, and
    β = 0.5 with T = 1 on ImageNet. A mean over items of a sum over classes, the loss depends neither on the batch size nor on the
    number of classes; the authors' code ramps it up over the first 20 epochs (``schedule=dict(type="WarmUp", …)``), as a large β
    disturbs the start.

    Args:
        alpha, beta: factors of the two parts, TCKD and NCKD in the paper.
        temperature: T > 0, with the factor T².
        where: see :class:`ScoreTerm`.

    Example:
        >>> distiller = Distiller(student, teacher, [DKD(beta=2.0)], example=images)
        >>> list(distiller(images, targets=labels).losses)
        ['distill.dkd.loss']
    """

    needs = ("classes", "labels")

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0, **settings: Any) -> None:
        super().__init__(temperature, **settings)
        check_number("DKD", "alpha", alpha)
        check_number("DKD", "beta", beta)
        self.alpha, self.beta = float(alpha), float(beta)

    def compare(self, pairs: Pairs) -> Tensor:
        assert pairs.labels is not None
        return decoupled(
            pairs.student,
            pairs.teacher,
            pairs.labels,
            self.temperature,
            alpha=self.alpha,
            beta=self.beta,
            dim=pairs.dim,
            present=pairs.present,
            reduction="none",
        )


@TERMS.register
@RECIPES.register("nkd")
class NKD(TemperedTerm):
    """Normalized distillation (NKD): the true class, and the normalised other classes (Yang et al. 2023, arXiv 2303.13005).

    Published with weight 1 and γ = 1.5 beside the hard loss of weight 1, with T = 1 on ImageNet. The loss is a mean over items and
    does not depend on the batch size. It is a cross-entropy, which is not 0 where both models agree.

    Args:
        gamma: factor of the part on the other classes.
        temperature: T > 0 of that part, with the factor T²; λ in the paper.
        where: see :class:`ScoreTerm`.

    Example:
        >>> distiller = Distiller(student, teacher, [NKD()], example=images)
        >>> list(distiller(images, targets=labels).losses)
        ['distill.nkd.loss']
    """

    needs = ("classes", "labels")

    def __init__(self, gamma: float = 1.5, temperature: float = 1.0, **settings: Any) -> None:
        super().__init__(temperature, **settings)
        check_number("NKD", "gamma", gamma)
        self.gamma = float(gamma)

    def compare(self, pairs: Pairs) -> Tensor:
        assert pairs.labels is not None
        return normalized(
            pairs.student,
            pairs.teacher,
            pairs.labels,
            self.temperature,
            gamma=self.gamma,
            dim=pairs.dim,
            present=pairs.present,
            reduction="none",
        )
