"""Terms on the boxes and masks of models that predict by object queries."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from kdgraft.balance import Weight
from kdgraft.errors import DistillError, WiringError, check_number
from kdgraft.losses import box_regression
from kdgraft.pairs import Pairs
from kdgraft.terms import MaskTerm, PairTerm

from .masks import MaskMatching
from .query_reader import QueryPlaces
from .registry import TERMS


class MatchedPlaces(PairTerm):
    """Base of terms on the boxes or masks of matched queries."""

    needs: ClassVar[tuple[str, ...]] = ("numbers",)
    pairs_from = "numbers"
    of_masks: ClassVar[bool] = False

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        super().prepare(student, teacher)
        found = self.predictions
        if not isinstance(found, QueryPlaces) or isinstance(found.matching, MaskMatching) != self.of_masks:
            what = "masks" if self.of_masks else "boxes"
            raise WiringError(
                f"{self.name} compares {what}, and {type(student).__name__} predicts none by queries; use MatchedBoxes for detectors, "
                "MatchedMasks for universal segmentation, or BoundedRegression for numbers"
            )
        found.needs_targets, found.takes_masks = False, self.of_masks


@TERMS.register
class MatchedBoxes(MatchedPlaces):
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

    def __init__(self, boxes: float = 5.0, overlaps: float = 2.0, *, weight: Weight = 1.0, **settings: Any) -> None:
        super().__init__(weight=weight, **settings)
        for name, value in (("boxes", boxes), ("overlaps", overlaps)):
            check_number("MatchedBoxes", name, value)
        if not boxes and not overlaps:
            raise DistillError("MatchedBoxes: boxes=0 and overlaps=0 leave nothing to compare; set one of them")
        self.boxes, self.overlaps = boxes, overlaps

    def compare(self, pairs: Pairs) -> Tensor:
        both = pairs.student, pairs.teacher
        return box_regression(*both, boxes=self.boxes, overlaps=self.overlaps, reduction="none")


@TERMS.register
class MatchedMasks(MaskTerm, MatchedPlaces):
    r"""Masks of universal segmentation (MaskFormer, Mask2Former): pixels and dice of the teacher's mask, at matched queries.

    The masks are compared on the teacher's grid, without the padding of images, by :func:`kdgraft.losses.mask_regression`. The
    queries are matched by their classes and masks; as in :class:`MatchedBoxes` the weight of each is the teacher's best class score,
    and the loss is the mean over the images of the weighted mean over their queries.

    Args:
        masks, dice: the weights λ of the two parts; those of Mask2Former by default.
        where: ``queries``, which leaves no choice here.
    """

    of_masks = True
