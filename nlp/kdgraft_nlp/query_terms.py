"""Terms on the boxes of detectors by object queries."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from kdgraft.balance import Weight
from kdgraft.errors import DistillError, WiringError, check_number
from kdgraft.losses import box_regression
from kdgraft.pairs import Pairs
from kdgraft.terms import PairTerm

from .query_reader import QueryBoxes
from .registry import TERMS


@TERMS.register
class MatchedBoxes(PairTerm):
    r"""Boxes of detectors by object queries: L1 and GIoU to the teacher's, at matched queries (DETRDistill, arXiv 2211.10156).

    .. math:: \frac1B \sum_b \sum_q w_{bq} \big(\lambda_b \tfrac14 |b^s_q - b^t_q|_1
              + \lambda_g (1 - \mathrm{GIoU}(b^s_q, b^t_q))\big) \Big/ \sum_q w_{bq}

    over the images b and the matched queries q, where :math:`w` is the teacher's best class score: most queries see background, and
    their boxes mean nothing. The queries are matched by their predictions, or with ``queries="objects"`` by the objects of the
    labels, which weigh alike. The weights w and λ are those of KD-DETR (arXiv 2211.08071), which has no matching.

    Args:
        boxes, overlaps: the weights λ of the two parts, as in DETR's own loss.
        where: ``queries``, see :meth:`kdgraft_nlp.reader.HFReader.numbers`.
    """

    needs: ClassVar[tuple[str, ...]] = ("numbers",)
    pairs_from = "numbers"

    def __init__(self, boxes: float = 5.0, overlaps: float = 2.0, *, weight: Weight = 1.0, **settings: Any) -> None:
        super().__init__(weight=weight, **settings)
        for name, value in (("boxes", boxes), ("overlaps", overlaps)):
            check_number("MatchedBoxes", name, value)
        if not boxes and not overlaps:
            raise DistillError("MatchedBoxes: boxes=0 and overlaps=0 leave nothing to compare; set one of them")
        self.boxes, self.overlaps = boxes, overlaps

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        super().prepare(student, teacher)
        if not isinstance(self.predictions, QueryBoxes):
            raise WiringError(
                f"{self.name} compares boxes, and {type(student).__name__} predicts none; use BoundedRegression for numbers"
            )
        self.predictions.needs_targets = False

    def compare(self, pairs: Pairs) -> Tensor:
        both = pairs.student, pairs.teacher
        return box_regression(*both, boxes=self.boxes, overlaps=self.overlaps, reduction="none")
