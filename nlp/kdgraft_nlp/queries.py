"""Models that predict by object queries, DETR and its variants: the queries of two models are matched one to one in each image.

The queries of two models share neither order nor place. Their predictions are therefore matched by the Hungarian algorithm, as DETR
(Carion et al., ECCV 2020, arXiv 2005.12872) matches predictions to objects, and DETRDistill (Chang et al., ICCV 2023, arXiv
2211.10156) those of two models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdgraft.batch import Batch
from kdgraft.classes import reordered
from kdgraft.errors import DistillError, WiringError
from kdgraft.losses import generalized_iou, upcast
from kdgraft.taps import Recording, Tap
from kdgraft.wiring import Wiring

from .predictions import same_classes
from .tasks import task_of

QUERY_TASKS = ("detection", "universal")
"""The tasks whose models predict by object queries."""
Queries = Literal["auto", "all", "objects"]
QUERIES = ("auto", "all", "objects")

_SOFTMAX = ("ForObjectDetection", "ForSegmentation")
"""The losses of transformers, by ``loss_type``, whose classes share a softmax with "no object"; the others score each class alone."""
_COSTS = {"class": 1.0, "bbox": 5.0, "giou": 2.0}
"""DETR's costs, for configs that name none."""


@dataclass
class Matched:
    """The K matched pairs of queries of a batch.

    Attributes:
        classes: the class logits ``(K, C)`` of student and teacher, the teacher's in the student's order of classes.
        places: the boxes ``(K, 4)`` of both: centre and size, as fractions of the image; or the masks ``(K, P)``: logits of pixels.
        queries: the numbers ``(K,)`` of both queries.
        images: the number ``(K,)`` of the image.
        weight: ``(K,)``; ``None`` where all pairs weigh alike.
        labels: the true classes ``(K,)``, of queries that are matched by objects.
        truth: the true boxes ``(K, 4)`` of these.
        present: ``(K, P)``, false for pixels of masks that are padding; ``None`` where all count.
    """

    classes: tuple[Tensor, Tensor]
    places: tuple[Tensor, Tensor]
    queries: tuple[Tensor, Tensor]
    images: Tensor
    weight: Tensor | None = None
    labels: Tensor | None = None
    truth: Tensor | None = None
    present: Tensor | None = None


class QueryModel:
    """Reads the class logits and boxes of one model's own queries, those that it also has in inference."""

    classes, places = Tap.parse("[logits]"), Tap.parse("[pred_boxes]")
    what = "boxes (B, Q, 4)"

    def __init__(self, model: nn.Module, owner: str, term: str) -> None:
        config: Any = model.config
        self.term, self.owner, self.kind = term, owner, type(model).__name__
        self.softmax = self.shares_softmax(model)
        self.num_classes = int(config.num_labels)
        self.costs = self.costs_of(config)
        # In training RT-DETR puts denoising queries before its own, and LW-DETR further groups of queries behind.
        self.first = bool(getattr(config, "group_detr", 0))
        self.queries = 0

    def shares_softmax(self, model: nn.Module) -> bool:
        """Return whether the classes and "no object" share a softmax."""
        return getattr(model, "loss_type", None) in _SOFTMAX

    def costs_of(self, config: Any) -> tuple[float, float, float]:
        """Return the weights of classes, L1 distances and overlaps in the model's own matching."""
        classes, boxes, overlaps = (float(_setting(config, f"{name}_cost", known)) for name, known in _COSTS.items())
        return classes, boxes, overlaps

    def fits(self, logits: Tensor, places: Tensor) -> bool:
        """Return whether outputs have the shapes of class logits and boxes of queries."""
        expected = self.num_classes + self.softmax
        return logits.ndim == 3 and logits.shape[-1] == expected and places.shape == (*logits.shape[:2], 4)

    @property
    def taps(self) -> list[Tap]:
        """The taps that :meth:`read` reads."""
        return [self.classes, self.places]

    def settle(self, recording: Recording) -> Tensor:
        """Read the number of queries from the dry run, and return its class logits.

        Raises:
            WiringError: the outputs are not those of a detector by queries.
        """
        logits, places = recording[self.classes], recording[self.places]
        if not self.fits(logits, places):
            raise WiringError(
                f"{self.term}: the {self.owner}'s {self.kind} gives {self.classes} {tuple(logits.shape)} and {self.places} "
                f"{tuple(places.shape)}, which are not the classes (B, Q, {self.num_classes + self.softmax}) and {self.what} of queries; use "
                "FeatureImitation"
            )
        self.queries = logits.shape[1]
        return logits

    def read(self, recording: Recording) -> tuple[Tensor, Tensor]:
        """Return class logits ``(B, Q, C)`` in the student's order of classes, and boxes ``(B, Q, 4)``."""
        logits, places = (self.own(recording[tap]) for tap in self.taps)
        return reordered(logits, recording.class_order), places

    def own(self, values: Tensor) -> Tensor:
        """Return the values ``(B, Q, …)`` of the queries that the model also has in inference."""
        return values[:, : self.queries] if self.first else values[:, -self.queries :]

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probabilities of the classes, and of "no object" behind them where it is one of the classes."""
        return logits.softmax(-1) if self.softmax else logits.sigmoid()


class QueryMatching:
    """The matching of two models' queries, by their predictions or by the objects.

    The cost of a pair is that of the student's own loss, with the weights in its config: the total variation distance of the
    classes (1 − p for a teacher that is certain of a class, as in DETR; the sum over classes that are scored each alone), the L1
    distance of the boxes and 1 − GIoU. Equal predictions cost nothing.

    Args:
        student, teacher: the models.
        term: the name of the term, for messages.

    Raises:
        WiringError: the models are not both detectors by queries, with the same kind of classes.
    """

    side: ClassVar[type[QueryModel]] = QueryModel
    knows_objects: ClassVar[bool] = True
    """True where queries can be matched by the objects of the labels."""

    def __init__(self, student: nn.Module, teacher: nn.Module, term: str) -> None:
        self.term = term
        tasks = [task_of(model) for model in (student, teacher)]
        if tasks[0] != tasks[1]:
            raise WiringError(
                f"{term} compares predictions, and the models have different tasks: {tasks[0]} (student, {type(student).__name__}) and "
                f"{tasks[1]} (teacher, {type(teacher).__name__}); give both the same"
            )
        self.student, self.teacher = self.side(student, "student", term), self.side(teacher, "teacher", term)
        kinds = ["a softmax with 'no object'" if one.softmax else "a sigmoid for each class" for one in self.sides]
        if kinds[0] != kinds[1]:
            raise WiringError(
                f"{term}: the classes of the student's {self.student.kind} are {kinds[0]}, those of the teacher's {self.teacher.kind} "
                f"{kinds[1]}, which cannot be compared; use FeatureImitation, or two detectors of one kind"
            )
        _require_scipy(term)

    @property
    def sides(self) -> tuple[QueryModel, QueryModel]:
        """Student and teacher."""
        return self.student, self.teacher

    @property
    def taps(self) -> tuple[Sequence[Tap], Sequence[Tap]]:
        """The taps of both models."""
        return self.student.taps, self.teacher.taps

    def settle(self, wiring: Wiring) -> tuple[Tensor, Tensor]:
        """Check both models in the dry run, and return their class logits.

        Raises:
            WiringError: the predictions cannot be compared.
        """
        found = self.student.settle(wiring.student_recording), self.teacher.settle(wiring.teacher_recording)
        same_classes(self.term, self.student.num_classes, self.teacher.num_classes)
        return found

    def by_predictions(self, student: Recording, teacher: Recording, batch: Batch) -> Matched:
        """Match the queries by their predictions, each weighted by the teacher's best class score.

        The weights of an image add up to 1, so that the number of images is the divisor of a batch. A student of fewer queries
        than its teacher learns from the teacher's most certain ones.
        """
        return batch.once(
            ("queries", student.model, teacher.model), lambda: self._by_predictions(student, teacher, batch)
        )

    def by_objects(self, student: Recording, teacher: Recording, batch: Batch) -> Matched:
        """Match each model's queries to the objects, and return both queries of each object.

        Raises:
            DistillError: the batch has no labels.
        """
        return batch.once(
            ("queries of objects", student.model, teacher.model), lambda: self._by_objects(student, teacher, batch)
        )

    def objects(self, batch: Batch) -> Tensor | None:
        """Return the number of objects; ``None`` where an image has more of them than there are queries."""
        counts = [len(classes) for classes, _ in self._labels(batch)]
        most = min(self.student.queries, self.teacher.queries)
        return None if max(counts, default=0) > most else torch.tensor(float(sum(counts)))

    def _by_predictions(self, student: Recording, teacher: Recording, batch: Batch) -> Matched:
        (ours, our_places), (theirs, their_places) = self.student.read(student), self.teacher.read(teacher)
        our_places, their_places, valid = self.aligned(our_places, their_places, batch)
        with torch.no_grad(), torch.autocast(ours.device.type, enabled=False):
            scores = [one.probabilities(upcast(x)) for one, x in zip(self.sides, (ours, theirs), strict=True)]
            weight = scores[1][..., : self.teacher.num_classes].amax(-1)
            costs = self.pair_costs(scores[0], upcast(our_places), scores[1], upcast(their_places), valid)
            # The teacher's certain queries choose first, as they count most in the losses.
            images, first, second = assigned(list(costs * weight[:, None]), ours.device)
            weight = weight[images, second]
            sums = weight.new_zeros(len(ours)).index_add(0, images, weight)
            weight = weight / sums.clamp(min=torch.finfo(weight.dtype).tiny)[images]
        return Matched(
            (ours[images, first], theirs[images, second]),
            (our_places[images, first], their_places[images, second]),
            (first, second),
            images,
            weight,
            present=None if valid is None else valid[images, 0],
        )

    def aligned(self, ours: Tensor, theirs: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the places of both models' queries as they are compared, and the pixels ``(B, 1, P)`` of masks that count."""
        return ours, theirs, None

    def _by_objects(self, student: Recording, teacher: Recording, batch: Batch) -> Matched:
        outputs = self.student.read(student), self.teacher.read(teacher)
        truths = self._labels(batch)
        device = outputs[0][0].device
        found = []
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            for one, (logits, places) in zip(self.sides, outputs, strict=True):
                scores, boxes = one.probabilities(upcast(logits)), upcast(places)
                costs = []
                for image, (classes, truth) in enumerate(truths):
                    certain = F.one_hot(classes, scores.shape[-1]).to(scores)
                    costs.append(self.pair_costs(scores[image], boxes[image], certain, truth.to(boxes)))
                found.append(_by_object(costs, device))
        both = (found[0] >= 0) & (found[1] >= 0)  # with more objects than queries, some objects have none
        counts = torch.tensor([len(classes) for classes, _ in truths], device=device)
        images = torch.arange(len(truths), device=device).repeat_interleave(counts)[both]
        queries = found[0][both], found[1][both]
        (ours, our_places), (theirs, their_places) = outputs
        return Matched(
            (ours[images, queries[0]], theirs[images, queries[1]]),
            (our_places[images, queries[0]], their_places[images, queries[1]]),
            queries,
            images,
            labels=torch.cat([classes for classes, _ in truths])[both],
            truth=torch.cat([truth for _, truth in truths])[both].to(our_places),
        )

    def pair_costs(
        self, scores: Tensor, boxes: Tensor, others: Tensor, places: Tensor, valid: Tensor | None = None
    ) -> Tensor:
        """Return the costs ``(…, Q, R)`` of pairs of Q predictions with R others, by probabilities and places."""
        classes = torch.cdist(scores, others, p=1) * (0.5 if self.student.softmax else 1)
        parts = classes, *self.place_costs(boxes, places, valid)
        weighted = [weight * part for weight, part in zip(self.student.costs, parts, strict=True)]
        return torch.stack(weighted).sum(0)

    def place_costs(self, boxes: Tensor, places: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the L1 distances and 1 − GIoU, ``(…, Q, R)`` each."""
        overlaps = 1 - generalized_iou(boxes.unsqueeze(-2), places.unsqueeze(-3))
        return torch.cdist(boxes, places, p=1), overlaps

    def _labels(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """Return the classes ``(n,)`` and boxes ``(n, 4)`` of each image."""
        labels = batch.labels
        if not isinstance(labels, (list, tuple)) or not all("class_labels" in one and "boxes" in one for one in labels):
            raise DistillError(
                f"{self.term} needs the objects of each image; add labels to the batch, [{{class_labels, boxes}}, …], or set queries='all'"
            )
        return [(one["class_labels"].long(), one["boxes"].reshape(-1, 4)) for one in labels]


def adds_queries(model: Any) -> bool:
    """Return whether a model has further queries in training: denoising ones (RT-DETR), or groups of queries (LW-DETR)."""
    return any(
        int(getattr(model.config, name, 0) or 0) > least for name, least in (("num_denoising", 0), ("group_detr", 1))
    )


def check_queries(term: str, queries: Any, model: nn.Module) -> None:
    """Raise a :class:`DistillError` for a choice of queries that is none, or for a model without queries."""
    if queries not in QUERIES:
        raise DistillError(f"{term}: queries must be one of {', '.join(QUERIES)}, got {queries!r}")
    if queries != "auto" and task_of(model) not in QUERY_TASKS:
        raise WiringError(
            f"{term}: queries={queries!r} is for detectors, and {type(model).__name__} is none; leave it out"
        )


def refuse_queries(term: str, tap: Tap, tensors: Sequence[Tensor]) -> None:
    """Raise a :class:`WiringError` for states ``(B, Q, C)`` of a decoder, whose positions are queries, but not for its pixel decoder."""
    parts = tap.path.split(".")
    if "decoder" in parts and "pixel_level_module" not in parts and any(tensor.ndim == 3 for tensor in tensors):
        raise WiringError(
            f"{term}: the positions of tap '{tap}' are object queries, in an order of each model's own; use HiddenStates(stack='decoder'), "
            "which matches them, where the model has that stack"
        )


def _setting(config: Any, name: str, default: float) -> Any:
    found = getattr(config, name, None)
    return getattr(config, f"matcher_{name}", default) if found is None else found


def assigned(costs: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the image, the row and the column of each assigned pair, ``(K,)`` each, by the costs of each image."""
    from scipy.optimize import linear_sum_assignment

    found = []
    for image, cost in enumerate(costs):
        # Non-finite values would make scipy end the run here. They cause the engine to drop the term later.
        rows, columns = linear_sum_assignment(torch.nan_to_num(cost, nan=0.0, posinf=1e9, neginf=-1e9).cpu().numpy())
        found.append(torch.stack([torch.full((len(rows),), image), torch.tensor(rows), torch.tensor(columns)]))
    images, rows, columns = torch.cat(found, 1).to(device).unbind() if found else torch.zeros(3, 0).long().unbind()
    return images, rows, columns


def _by_object(costs: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the query of each object of all images, −1 for an object without one, by the costs ``(queries, objects)``."""
    images, rows, columns = assigned(costs, device)
    counts = torch.tensor([cost.shape[1] for cost in costs], device=device)
    start = counts.cumsum(0) - counts
    found = torch.full((int(counts.sum()),), -1, device=device)
    found[start[images] + columns] = rows
    return found


def _require_scipy(term: str) -> None:
    try:
        import scipy.optimize  # noqa: F401
    except ImportError:
        raise DistillError(
            f"{term} matches queries with scipy, as the detector's own loss does, and it is not installed; pip install scipy"
        ) from None
