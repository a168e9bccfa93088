"""Terms of born-again networks, which ask what of a teacher's predictions helps: its confidence (CWTM), or its dark knowledge (DKPP)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..batch import Batch
from ..distributed import SharedRandom
from ..errors import check_share
from ..losses import Ratio, confidence, confidence_weighted, permuted
from ..pairs import Pairs
from ..registry import RECIPES, TERMS
from .pairs import ScoreTerm
from .predictions import SoftTargets


@TERMS.register
@RECIPES.register("cwtm")
class CWTM(ScoreTerm):
    r"""Labels weighted by the teacher's confidence (CWTM; Furlanello et al. 2018, arXiv 1805.04770, equation 9).

    .. math:: -\sum_i \frac{\max_c p_{t,i,c}}{\sum_j \max_c p_{t,j,c}} \, \log p_{s,i,y_i}

    The sums are over the items with a label in the batch of all processes; with gradient accumulation each part of a batch has sums
    of its own. The term replaces the host's own loss of these classes, which then has the factor ``hard_weight``. The teacher tells
    the student nothing but how much each item counts.

    Args:
        hard_weight: μ in μ·(the host's own loss) + (1 − μ)·(this term), as far as the schedule has activated the term.
        where: see :class:`ScoreTerm`.

    Example:
        >>> out = Distiller(student, teacher, [CWTM()], example=images)(images, targets=labels)
        >>> list(out.losses), out.host_share
        (['distill.cwtm.loss'], 0.0)
    """

    needs = ("classes", "labels")
    in_chunks = False

    def __init__(self, *, hard_weight: float = 0.0, **settings: Any) -> None:
        super().__init__(**settings)
        check_share("CWTM", "hard_weight", hard_weight)
        self.host_share, self.own_share = float(hard_weight), 1 - hard_weight

    def count(self, batch: Batch) -> Tensor | None:
        return None  # the sum of the teacher's confidences

    def ratio(self, pairs: Pairs) -> Ratio:
        total = confidence(pairs.teacher, dim=pairs.dim, weight=pairs.weight).sum().detach()
        return Ratio(self.compare(pairs).sum() * self.own_share, total)

    def compare(self, pairs: Pairs) -> Tensor:
        assert pairs.labels is not None
        return confidence_weighted(
            pairs.student,
            pairs.teacher,
            pairs.labels,
            dim=pairs.dim,
            present=pairs.present,
            weight=pairs.weight,
            reduction="none",
        )


@TERMS.register
@RECIPES.register("dkpp")
class DKPP(SoftTargets):
    """Soft targets whose probabilities are permuted, except the largest (DKPP; Furlanello et al. 2018, arXiv 1805.04770, equation 10).

    The teacher's probabilities of all classes but its first are dealt out anew to these classes, at random for each item and step.
    What remains is how sure the teacher is, without which classes it finds alike. The term replaces the host's own loss of these
    classes, which then has the factor ``hard_weight``. The random numbers are the term's own: a resumed run continues them, and two
    processes draw what one draws for all items.

    Args:
        temperature: T > 0, with the factor T²; 1 in the paper.
        hard_weight: see :class:`SoftTargets`; ``None`` adds the term to the unchanged loss of the host.
        where: see :class:`ScoreTerm`.

    Example:
        >>> out = Distiller(student, teacher, [DKPP()], example=images)(images)
        >>> list(out.losses), out.host_share
        (['distill.dkpp.loss'], 0.0)
    """

    in_chunks = False
    takes_independent = False

    def __init__(self, temperature: float = 1.0, *, hard_weight: float | None = 0.0, **settings: Any) -> None:
        super().__init__(
            temperature, hard_weight=hard_weight, focus=0.0, classes=None, background_weight=None, **settings
        )
        self._random = SharedRandom()

    @property
    def joins(self) -> bool:
        return False  # classes that are joined into one cannot be dealt out

    def ready(self, pairs: Pairs) -> Pairs:
        pairs = super().ready(pairs)
        rows = pairs.teacher.movedim(pairs.dim, -1)
        keys = self._random.of_rows((rows[..., 0].numel(), rows.shape[-1]), rows.device).view(rows.shape)
        teacher = permuted(rows, keys, present=None if pairs.present is None else pairs.present.movedim(pairs.dim, -1))
        return replace(pairs, teacher=teacher.movedim(-1, pairs.dim))

    def hidden_state(self) -> dict[str, Any]:
        return {"random": self._random.state()}

    def load_hidden_state(self, state: Mapping[str, Any]) -> None:
        self._random.load(state["random"])
