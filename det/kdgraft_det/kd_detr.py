"""KD-DETR: the decoders of two DETR-type detectors are given the same queries, and their predictions compared one to one.

Wang et al., "KD-DETR: Knowledge Distillation for Detection Transformer with Consistent Distillation Points Sampling", CVPR 2024,
arXiv 2211.08071.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdgraft.balance import Weight
from kdgraft.batch import Batch
from kdgraft.classes import reordered
from kdgraft.distributed import SharedRandom
from kdgraft.errors import DistillError, WiringError, check_number
from kdgraft.losses import Ratio, generalized_iou, soft_targets, upcast
from kdgraft.losses.soft_targets import check_temperature
from kdgraft.taps import Recording, Tap
from kdgraft.terms import Term
from kdgraft.wiring import Wiring

from .heads import find_reader, same_number_of_classes
from .points import Given, points_of, same_points
from .queries import QueryHead
from .registry import RECIPES, TERMS

_DECODER = Tap.parse("forward_decoder():inputs")
_CLASSES, _BOXES = Tap.parse("bbox_head[0]"), Tap.parse("bbox_head[1]")


class Predictions(NamedTuple):
    """Class logits ``(…, B, N, C)`` and boxes ``(…, B, N, 4)``: centre and size as fractions of the image."""

    classes: Tensor
    boxes: Tensor


@RECIPES.register("kddetr")
@TERMS.register
class KDDETR(Term):
    r"""Predictions of two decoders on the same queries (KD-DETR; Wang et al., CVPR 2024, arXiv 2211.08071).

    The queries of two DETRs share neither order nor place. Here both decoders are given the same ones, on the memory that their
    encoders have computed for this step anyway: ``points`` random ones, drawn anew in each step and the same for all images
    and processes (general sampling), and the teacher's own (specific sampling), on which its predictions are there already. Every
    layer of the student's decoder imitates the teacher's last one, query by query:

    .. math:: \sum_q w_q \big(\lambda_c T^2\,\mathrm{KL}(p^t_q \,\|\, p^s_q) + \lambda_b \tfrac14 |b^s_q - b^t_q|_1
              + \lambda_g (1 - \mathrm{GIoU}(b^s_q, b^t_q))\big) \Big/ \sum_q w_q

    summed over the two samplings, where :math:`w_q` is the teacher's best class score (of the foreground): most queries see
    background. p is a softmax of all logits of a query, at temperature T, also where the classes are sigmoids. The sums run over
    the batch and all processes, so that the loss grows with neither.

    The weights are the authors' for DAB-DETR on COCO. Their code sums the KL over the queries of a GPU and averages it over
    classes; with 91 classes the two agree where the scores of a GPU's queries add up to 91, as those of about five images do.

    DETR, Conditional DETR and Deformable DETR learn embeddings as queries, which need detectors of one kind and one width. The
    queries of DAB-DETR, of Deformable DETR in two stages and of DINO are boxes and can be given to each other's decoders; what
    DINO learns beside the boxes is each model's own.

    Args:
        points: the number of random queries; 0 leaves out general sampling.
        specific: add the teacher's own queries.
        temperature: T > 0 of the classes.
        classes, boxes, overlaps: the three weights λ.
    """

    needs = ("classes", "numbers")
    compares_classes = True
    runs_teacher = True

    def __init__(
        self,
        points: int = 300,
        *,
        specific: bool = True,
        temperature: float = 10.0,
        classes: float = 1.0,
        boxes: float = 5.0,
        overlaps: float = 2.0,
        weight: Weight = 1.0,
        **settings: Any,
    ) -> None:
        super().__init__(weight=weight, **settings)
        check_number("KDDETR", "points", points, whole=True)
        check_temperature(temperature)
        for name, value in (("classes", classes), ("boxes", boxes), ("overlaps", overlaps)):
            check_number("KDDETR", name, value)
        if not points and not specific:
            raise DistillError("KDDETR: points=0 and specific=False leave no queries; set one of them")
        self.points, self.specific, self.temperature = int(points), specific, temperature
        self.factors = classes, boxes, overlaps
        self._random = SharedRandom()

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        """Find how both detectors take queries, and refuse those that cannot share them."""
        models: dict[str, Any] = {"student": student, "teacher": teacher}
        self._ours, self._theirs = (points_of(model, owner, self.name) for owner, model in models.items())
        same_points(self._ours, self._theirs, self.name)
        heads = [self._head(model, owner) for owner, model in models.items()]
        same_number_of_classes(heads[0].num_classes, heads[1].num_classes, self.name)
        if heads[0].sigmoid != heads[1].sigmoid:
            kinds = ["sigmoid" if head.sigmoid else "softmax" for head in heads]
            raise WiringError(
                f"{self.name}: the student's classes are {kinds[0]} ones, the teacher's {kinds[1]}; give both heads the same loss_cls"
            )
        self._sigmoid, self._classes = heads[0].sigmoid, heads[0].num_classes
        self.student_taps = (_DECODER,)
        self.teacher_taps = (_DECODER, _CLASSES, _BOXES) if self.specific else (_DECODER,)

    def _head(self, model: Any, owner: str) -> QueryHead:
        found = find_reader(model.bbox_head, "bbox_head", owner, self.name)
        if type(found) is not QueryHead:
            raise WiringError(
                f"{self.name}: the {owner}'s {found.kind} is read by {type(found).__name__}, and this term reads heads that return the "
                "class logits and the boxes of all layers; use SoftTargets and BoundedRegression"
            )
        return found

    def wire(self, wiring: Wiring) -> None:
        """Keep the teacher's source, whose precision its second pass has, and list the samplings for ``kdgraft check``."""
        self.holder = wiring.holder
        samplings = ("general", self.points), ("specific", self._theirs.queries if self.specific else 0)
        for name, count in samplings:
            if count:
                shape = f"{count} {self._theirs.space}"
                self.rows.append(self.row(shape, shape, taps=(_DECODER, _DECODER), region=name))

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        """Return the three losses of each sampling, each divided by the sum of the teacher's best scores."""
        ours, theirs = student[_DECODER], teacher[_DECODER]
        ratios = []
        if self.points:
            drawn = torch.randn(self.points, self._theirs.width, generator=self._random.of_all_ranks())
            points = drawn.to(ours["memory"].device).expand(len(ours["memory"]), -1, -1)
            with torch.no_grad(), self._context(points.device.type):
                said = _decode(teacher.root, theirs, self._theirs.enter(teacher.root, points))
            ratios.append(self._compare(student, points, self._wanted(said, teacher)))
        if self.specific:
            matching = (layers[..., -self._theirs.queries :, :] for layers in (teacher[_CLASSES], teacher[_BOXES]))
            ratios.append(
                self._compare(student, self._theirs.own(theirs), self._wanted(Predictions(*matching), teacher))
            )
        numerators, denominators = zip(*ratios, strict=True)
        return Ratio(torch.cat(numerators), torch.cat(denominators))

    def _context(self, device: str) -> AbstractContextManager[Any]:
        return nullcontext() if self.holder is None else self.holder.context(device)

    def _wanted(self, said: Predictions, teacher: Recording) -> Predictions:
        """Return what the teacher's last layer says, in the student's order of classes."""
        classes, boxes = (layers[-1].detach() for layers in said)
        return Predictions(reordered(classes.flatten(0, 1), teacher.class_order).view_as(classes), boxes)

    def _compare(self, student: Recording, points: Tensor, wanted: Predictions) -> Ratio:
        found = _decode(student.root, student[_DECODER], self._ours.enter(student.root, points))
        scores = upcast(wanted.classes)
        scores = scores.sigmoid() if self._sigmoid else scores.softmax(-1)[..., : self._classes]
        weight = scores.amax(-1)
        parts = torch.stack(compared(found, wanted, weight, self.temperature))
        factors = parts.new_tensor(self.factors)
        return Ratio(parts * factors, weight.sum().expand(3))

    def hidden_state(self) -> dict[str, Any]:
        return {"random": self._random.state()}

    def load_hidden_state(self, state: Mapping[str, Any]) -> None:
        self._random.load(state["random"])


def compared(
    found: Predictions, wanted: Predictions, weight: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums over layers, images and queries of the class divergence, of the L1 (a mean over 4) and of 1 - GIoU.

    Args:
        found: of the student, ``(layers, B, N, …)``.
        wanted: of the teacher, ``(B, N, …)``.
        weight: of the queries, ``(B, N)``.
        temperature: T > 0 of the classes.
    """
    logits, boxes = (upcast(part) for part in found)
    targets, places = (upcast(part).expand_as(own) for part, own in zip(wanted, (logits, boxes), strict=True))
    weight = weight.to(logits).expand(logits.shape[:-1])
    classes = soft_targets(logits, targets, temperature, weight=weight, reduction="none")
    distances = (boxes - places).abs().mean(-1)
    overlaps = 1 - generalized_iou(boxes, places)
    return classes.sum(), (distances * weight).sum(), (overlaps * weight).sum()


def _decode(model: Any, given: Given, queries: Mapping[str, Any]) -> Predictions:
    """Run a decoder and its head on other queries than those that a recorded pass had, on the same memory."""
    return Predictions(*model.bbox_head(**model.forward_decoder(**{**given, **queries})))
