"""Divergences of class probabilities from the literature on language models: KL of both directions, and mixtures of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import DistillError, check_flag, check_share
from ..losses import generalized_jsd, reverse_kl, skewed_kl, soft_targets
from ..pairs import Pairs
from ..registry import TERMS
from .pairs import TemperedTerm


class _Divergence(TemperedTerm):
    """Base of divergences of the probabilities at the term's temperature."""

    @property
    def joins(self) -> bool:
        return not self.standardize


@TERMS.register
class ForwardKL(_Divergence):
    """KL(teacher ‖ student) without the factor T² (the sequence-level baseline of GKD, arXiv 2306.13649).

    Example:
        >>> same = torch.rand(2, 5)
        >>> ForwardKL().compare(Pairs(same, same))
        tensor([0., 0.])
    """

    def compare(self, pairs: Pairs) -> Tensor:
        items = soft_targets(pairs.student, pairs.teacher, self.temperature, dim=pairs.dim, reduction="none")
        return items / self.temperature**2


@TERMS.register
class ReverseKL(_Divergence):
    """KL(student ‖ teacher), which is mode-seeking (MiniLLM, arXiv 2306.08543).

    Example:
        >>> p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
        >>> ReverseKL().compare(Pairs(p.log(), q.log()))
        tensor([0.1438])
    """

    def compare(self, pairs: Pairs) -> Tensor:
        return reverse_kl(pairs.student, pairs.teacher, self.temperature, dim=pairs.dim, reduction="none")


@TERMS.register
class GeneralizedJSD(_Divergence):
    """Generalised Jensen-Shannon divergence (GKD, arXiv 2306.13649, equation 1).

    Args:
        beta: in [0, 1]: 0 is the forward, 1 the reverse KL.
        temperature: T > 0.
        where: see :class:`ScoreTerm`.

    Example:
        >>> p, q = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> GeneralizedJSD(beta=0.5).compare(Pairs(p.log(), q.log()))
        tensor([0.6931])
    """

    def __init__(self, beta: float = 0.5, *, temperature: float = 1.0, **settings: Any) -> None:
        super().__init__(temperature, **settings)
        check_share("GeneralizedJSD", "beta", beta)
        self.beta = beta

    def compare(self, pairs: Pairs) -> Tensor:
        both, dim = (pairs.student, pairs.teacher), pairs.dim
        return generalized_jsd(*both, self.beta, self.temperature, dim=dim, reduction="none")


@TERMS.register
class SkewedKL(_Divergence):
    """KL against a mixture with a little of the first distribution (DistiLLM, arXiv 2402.03898).

    Args:
        alpha: share of the first distribution in the mixture, in [0, 1).
        reverse: take the student's distribution, rather than the teacher's, as the first one.
        temperature: T > 0.
        where: see :class:`ScoreTerm`.

    Example:
        >>> p, q = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> SkewedKL(alpha=0.5).compare(Pairs(p.log(), q.log()))  # log 2, where the KL is infinite
        tensor([0.6931])
    """

    def __init__(self, alpha: float = 0.1, *, reverse: bool = False, temperature: float = 1.0, **settings: Any) -> None:
        super().__init__(temperature, **settings)
        check_share("SkewedKL", "alpha", alpha)
        if alpha == 1:
            raise DistillError("SkewedKL: alpha must be below 1, where the loss is 0 for any student")
        check_flag("SkewedKL", "reverse", reverse)
        self.alpha, self.reverse = alpha, reverse

    def compare(self, pairs: Pairs) -> Tensor:
        both, dim = (pairs.student, pairs.teacher), pairs.dim
        return skewed_kl(*both, self.alpha, self.temperature, reverse=self.reverse, dim=dim, reduction="none")
