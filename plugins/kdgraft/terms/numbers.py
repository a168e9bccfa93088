"""Terms on regressed numbers, such as boxes: the host's reader pairs the numbers of both models with the true ones."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from ..balance import Weight
from ..errors import DistillError, check_flag, check_number
from ..losses import bounded_regression, mask_regression
from ..losses.reduction import upcast
from ..pairs import Numbers, Pairs
from ..registry import TERMS
from .pairs import PairTerm


@TERMS.register
class BoundedRegression(PairTerm):
    r"""Squared error to the truth where the student is not better than its teacher (Chen et al., NeurIPS 2017, equation 4).

    The loss is the squared distance, summed over the D numbers of an item and averaged over items of all processes:

    * in detection over the positives of the student's own assigner. (The paper and mmdet divide the box losses of RPN and RoI
      heads by *all* sampled boxes, which reduces the effect of ν there by the share of positives.) The teacher predicts at the
      same anchors, at the same proposals (its RoI head runs on those that the student sampled), or at the query of the same
      object. Boxes are compared in the unit that the head regresses: a box coder's deltas (RetinaNet, ATSS, RPN, RoI heads), edges
      in strides (GFL, FCOS, TOOD, RTMDet, YOLOX), or centre and size as fractions of the image (DETR);
    * in Hugging Face models of ``problem_type="regression"`` over samples, in its detectors over the objects, whose boxes are centre
      and size as fractions of the image, and in plain PyTorch over the items of the tapped outputs, with the batch's targets as
      the truth.

    The published weight is for deltas of boxes (VOC, COCO); targets of another range need another weight, as errors are squared.

    Args:
        margin: m >= 0, by which the student has to be better than the teacher to have no loss; unpublished, 0 by default.
        bounded: false compares with the teacher's numbers instead: their squared distance, without bound or truth.
        weight: ν, 0.5 in the paper.
        where: arguments of the host that select the numbers: ``tap`` in plain PyTorch, ``head`` in detection, ``queries`` in
            Hugging Face's detectors.

    Example:
        >>> term = BoundedRegression()
        >>> numbers = [torch.tensor([[value]]) for value in (3.0, 4.5, 4.0, 6.0)]
        >>> term.compare(Pairs(numbers[0], numbers[1], target=numbers[2]))  # (3 − 4)², more than the teacher's (4.5 − 4)²
        tensor([1.])
        >>> term.compare(Pairs(numbers[0], numbers[3], target=numbers[2]))
        tensor([0.])
    """

    needs = ("numbers",)
    pairs_from = "numbers"

    def __init__(self, margin: float = 0.0, *, bounded: bool = True, weight: Weight = 0.5, **settings: Any) -> None:
        super().__init__(weight=weight, **settings)
        check_number("BoundedRegression", "margin", margin)
        check_flag("BoundedRegression", "bounded", bounded)
        if margin and not bounded:
            raise DistillError("BoundedRegression: margin is for the bound; leave it out with bounded=False")
        self.margin, self.bounded = margin, bounded

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        super().prepare(student, teacher)
        assert isinstance(self.predictions, Numbers)
        self.predictions.needs_targets = self.bounded

    def ready(self, pairs: Pairs) -> Pairs:
        if self.bounded and pairs.target is None:
            raise DistillError(
                f"{self.name} needs the true numbers, and the batch has none; add them (targets=… in plain PyTorch, labels in "
                "Hugging Face), or set bounded=False"
            )
        return pairs

    def compare(self, pairs: Pairs) -> Tensor:
        if not self.bounded:
            return (upcast(pairs.student) - upcast(pairs.teacher)).square().sum(-1)
        assert pairs.target is not None
        return bounded_regression(pairs.student, pairs.teacher, pairs.target, margin=self.margin, reduction="none")


class MaskTerm(PairTerm):
    """Base of terms on binary masks ``(K, P)``, logits of P pixels: :func:`~kdgraft.losses.mask_regression` of each.

    A host says which masks are paired; :attr:`Pairs.present` leaves out pixels.

    Args:
        masks, dice: the weights of the two parts; those of Mask2Former by default.

    Example:
        >>> class Masks(MaskTerm):
        ...     pairs_from = "numbers"
        >>> masks = torch.tensor([[30.0, 30.0, -30.0, -30.0]])
        >>> Masks(masks=0.0, dice=1.0).compare(Pairs(masks, -masks))  # 1 − (2 · 0 + 1) / (2 + 2 + 1)
        tensor([0.8000])
    """

    needs: ClassVar[tuple[str, ...]] = ("numbers",)

    def __init__(self, masks: float = 5.0, dice: float = 5.0, *, weight: Weight = 1.0, **settings: Any) -> None:
        super().__init__(weight=weight, **settings)
        term = type(self).__name__
        for name, value in (("masks", masks), ("dice", dice)):
            check_number(term, name, value)
        if not masks and not dice:
            raise DistillError(f"{term}: masks=0 and dice=0 leave nothing to compare; set one of them")
        self.masks, self.dice = masks, dice

    def compare(self, pairs: Pairs) -> Tensor:
        both = pairs.student, pairs.teacher
        return mask_regression(*both, masks=self.masks, dice=self.dice, valid=pairs.present, reduction="none")
