"""Readers of dense heads, one for each class of heads whose predictions can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from mmdet.models.task_modules.prior_generators import anchor_inside_flags
from mmdet.models.task_modules.samplers import PseudoSampler
from torch import Tensor

from kdgraft.batch import Batch
from kdgraft.losses import upcast
from kdgraft.taps import Recording, Tap

from .assignment import Assignment
from .heads import HEADS, HeadReader, find_reader
from .picking import edges_of, in_order_of_pick, in_rows, joint_logits, pick, row_of, side_of

_FORWARD = ("forward", "forward_single")


@HEADS.register("ATSSHead")
class DenseHead(HeadReader):
    """Reads one kind of dense head.

    The base class reads heads that predict class logits and ``"deltas"`` of anchors, and whose ``get_targets`` returns lists per
    level of (anchors, labels, weights, targets, …), such as ATSS.
    """

    trained: ClassVar[tuple[str, ...]] = (*_FORWARD, "get_targets", "loss_by_feat", "_get_targets_single")
    predicted: ClassVar[tuple[str, ...]] = (*_FORWARD, "predict_by_feat", "_predict_by_feat_single")
    unit: ClassVar[str] = "deltas"
    """Boxes are compared in the box coder's ``"deltas"``, or as edges in ``"strides"``."""
    distributions: ClassVar[bool] = False
    """True where the head predicts edges as distributions over bins."""
    first: ClassVar[int] = 1
    """Index of the labels in the return value of ``get_targets``; weights and targets follow them."""
    losses: ClassVar[tuple[str, ...]] = ("loss_cls",)

    def __init__(self, head: Any, path: str, owner: str) -> None:
        super().__init__(head, path, owner)
        self.generator, self.bbox_coder = head.prior_generator, getattr(head, "bbox_coder", None)
        self.decoded_targets = getattr(head, "reg_decoded_bbox", False)
        self.samples = not isinstance(getattr(head, "sampler", None), (PseudoSampler, type(None)))
        self.sigmoid = getattr(head, "use_sigmoid_cls", True)
        self.num_classes, self.channels = head.num_classes, head.cls_out_channels
        self.bins = int(head.reg_max) + 1 if self.distributions else 0
        self.num_priors = self.generator.num_base_priors[0]
        self.strides = [side_of(stride) for stride in self.generator.strides]
        self.classes = Tap.parse(f"{path}[0][*]")
        self.boxes = Tap.parse(f"{path}[1][*]")
        self.targets = Tap.parse(f"{path}.get_targets()")
        self.flags = Tap.parse(f"{path}.get_anchors()[1]") if hasattr(self.generator, "base_anchors") else None
        self.allowed_border = (getattr(head, "train_cfg", None) or {}).get("allowed_border", -1)

    @property
    def class_taps(self) -> tuple[Tap, ...]:
        """The taps that :meth:`logits` reads."""
        return (self.classes,)

    @property
    def assignment_taps(self) -> tuple[Tap, ...]:
        """The taps that :meth:`assignment` reads."""
        return (self.classes, self.targets) if self.flags is None else (self.classes, self.targets, self.flags)

    def logits(self, recording: Recording, chosen: Tensor) -> Tensor:
        """Return the class logits ``(K, C)`` at the chosen priors."""
        return pick(recording.tensors(self.classes), chosen, self.num_priors)

    def edges(self, picked: Tensor, centres: Tensor, strides: Tensor, trains: bool = False) -> Tensor:
        """Return boxes ``(K, 4)`` in this head's unit, given its outputs at K priors (in training mode if ``trains``)."""
        return picked

    @property
    def reading(self) -> tuple[Any, ...]:
        """The properties of the head that :meth:`regression` depends on: its decoding of edges and its centres."""
        first = self.generator.grid_priors([(1, 1)] * len(self.strides), device="cpu")
        return type(self).edges, self.bins, [level.tolist() for level in first] if self.unit == "strides" else None

    def true_edges(self, targets: Tensor, anchors: Tensor, strides: Tensor) -> Tensor:
        """Return the host's targets ``(K, 4)`` in this head's unit."""
        if self.unit == "strides":
            return targets / strides[:, None]
        return self.bbox_coder.encode(anchors, targets) if self.decoded_targets else targets  # type: ignore[union-attr]

    def regression(self, recording: Recording, chosen: Tensor) -> Tensor:
        """Return boxes ``(K, 4)`` in this head's unit at the chosen priors, decoded from the head's own points in a cell."""
        levels = recording.tensors(self.boxes)
        anchors, strides, counts = self.priors(levels)
        places = in_order_of_pick(chosen, counts)
        centres = (anchors[places, :2] + anchors[places, 2:]) / 2
        picked = pick(levels, chosen, self.num_priors).float()
        return self.edges(picked, centres, strides[places], recording.training)

    def decoded(self, levels: Sequence[Tensor]) -> Tensor:
        """Return all boxes ``(B, N, 4)``, x1, y1, x2, y2 in pixels of the padded input, from the second output; not clipped."""
        anchors, strides, counts = self.priors(levels)
        rows = torch.cat([in_rows(level, n) for level, n in zip(levels, counts, strict=True)], 1)
        places = torch.cat([anchors, strides[:, None]], 1).repeat(len(rows), 1)
        anchors, strides = places[:, :4], places[:, 4]
        found = self.edges(rows.flatten(0, 1), (anchors[:, :2] + anchors[:, 2:]) / 2, strides, self.owner == "student")
        pixels = self.bbox_coder.decode(anchors, found) if self.unit == "deltas" else found * strides[:, None]  # type: ignore[union-attr]
        return pixels.view(*rows.shape[:2], 4)

    def priors(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[int]]:
        """Return the anchors ``(N, 4)``, the strides ``(N,)`` and the number of priors of each level on the grids of these maps."""
        found = self.generator.grid_priors([level.shape[-2:] for level in levels], device=levels[0].device)
        counts = [len(level) for level in found]
        strides = torch.cat([level.new_full((n,), s) for level, n, s in zip(found, counts, self.strides, strict=True)])
        anchors = torch.cat([level if level.shape[1] == 4 else level.repeat(1, 2) for level in found])
        return anchors.float(), strides.float(), counts

    def assigned(self, recording: Recording, images: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the labels ``(B, N)``, the mask of those that count ``(B, N)``, and the targets ``(B, N, 4)``."""
        labels, weights, targets = recording[self.targets][self.first : self.first + 3]
        return row_of(labels, images), row_of(weights, images) > 0, row_of(targets, images, 4)

    def given(self, recording: Recording, anchors: Tensor, batch: Batch) -> Tensor:
        """Return the mask ``(B, N)`` of the anchors that the host gives to its assigner: on image and padding, inside the border."""
        assert self.flags is not None and batch.image_sizes is not None
        flags = recording[self.flags]  # get_targets may have joined the levels in place
        rows = [torch.cat(levels) if isinstance(levels, list) else levels for levels in flags]
        pairs = zip(rows, batch.image_sizes, strict=True)
        return torch.stack([anchor_inside_flags(anchors, row, size, self.allowed_border) for row, size in pairs])

    def assignment(self, recording: Recording, batch: Batch) -> Assignment:
        """Return the assignment of this step, computed once for all terms."""

        def make() -> Assignment:
            assert batch.image_sizes is not None
            outputs = recording.tensors(self.classes)
            anchors, strides, counts = self.priors(outputs)
            labels, assigned, targets = self.assigned(recording, len(outputs[0]))
            given = assigned if self.flags is None else self.given(recording, anchors, batch)
            sizes = anchors.new_tensor(batch.image_sizes).flip(1)[:, None]
            inside = ((anchors[:, :2] + anchors[:, 2:]) / 2 < sizes).all(-1)
            return Assignment(labels, given, assigned, inside, anchors, strides, counts, self.num_classes, targets)

        return batch.once(("assignment", recording.model, self.path), make)


@HEADS.register("RetinaHead")
@HEADS.register("AnchorHead")
class _RetinaNet(DenseHead):
    """RetinaNet: ``get_targets`` returns no anchors."""

    first = 0


@HEADS.register("RPNHead")
class _RPN(_RetinaNet):
    """RPN: like RetinaNet, with a loss of another name."""

    losses = ("loss_rpn_cls",)


@HEADS.register("GFLHead")
class _GFL(DenseHead):
    """GFL: edges are distributions over their distance in strides."""

    unit = "strides"
    distributions = True

    def edges(self, picked: Tensor, centres: Tensor, strides: Tensor, trains: bool = False) -> Tensor:
        bins = torch.arange(self.bins, device=picked.device, dtype=picked.dtype)
        # Autocast computes a matrix product in bfloat16, with errors of up to 0.03 strides.
        distances = (F.softmax(picked.unflatten(1, (4, self.bins)), -1) * bins).sum(-1)
        return edges_of(centres / strides[:, None], distances)


@HEADS.register("RTMDetSepBNHead")
@HEADS.register("RTMDetHead")
class _RTMDet(DenseHead):
    """RTMDet: distances to the four edges, in pixels."""

    unit = "strides"

    def edges(self, picked: Tensor, centres: Tensor, strides: Tensor, trains: bool = False) -> Tensor:
        return edges_of(centres / strides[:, None], picked / strides[:, None])


@HEADS.register("RTMDetInsSepBNHead")
@HEADS.register("RTMDetInsHead")
class RTMDetInsHead(_RTMDet):
    """RTMDet-Ins: for each position the kernels of a small network that draws the mask of its object on the whole image."""

    trained = (*DenseHead.trained, "loss_mask_by_feat", "_mask_predict_by_feat_single", "parse_dynamic_params")
    predicted = (*DenseHead.predicted, "_mask_predict_by_feat_single", "parse_dynamic_params")

    def __init__(self, head: Any, path: str, owner: str) -> None:
        super().__init__(head, path, owner)
        self.kernels, self.prototypes = Tap.parse(f"{path}[2][*]"), Tap.parse(f"{path}[3]")
        self.sampled = Tap.parse(f"{path}.loss_mask_by_feat():inputs[sampling_results_list]")
        self.weights, self.biases = tuple(head.weight_nums), tuple(head.bias_nums)

    @property
    def mask_reading(self) -> tuple[Any, ...]:
        """The properties of the head that :meth:`masks` depends on."""
        return type(self).masks, self.weights, self.biases, self.strides

    def positives(self, recording: Recording) -> list[tuple[Tensor, Tensor]]:
        """Return the positives of each image: their places in the row of all positions, and (x, y, stride, stride)."""
        return [(image.pos_inds, image.pos_priors) for image in recording[self.sampled]]

    def masks(self, recording: Recording, positives: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Return the masks ``(K, H, W)``, logits, of all images' positives, as ``_mask_predict_by_feat_single`` draws them."""
        levels, prototypes = recording.tensors(self.kernels), recording[self.prototypes]
        rows = torch.cat([level.flatten(2).mT for level in levels], 1)
        size = prototypes.shape[-2:]
        grid = self.generator.single_level_grid_priors(size, level_idx=0, device=prototypes.device)
        found = []
        for maps, kernels, (places, priors) in zip(prototypes, rows, positives, strict=True):
            offsets = (priors[:, None, :2] - grid) / (8 * priors[:, None, 2:3])
            entering = torch.cat([offsets.mT, maps.flatten(1).expand(len(places), -1, -1)], 1)
            found.append(self._drawn(upcast(entering), upcast(kernels[places])))
        return torch.cat(found).unflatten(1, size)

    def _drawn(self, values: Tensor, kernels: Tensor) -> Tensor:
        """Run each object's own network ``(K, …)`` on its inputs ``(K, C, P)``; return ``(K, P)``."""
        parts = kernels.split((*self.weights, *self.biases), 1)
        layers = list(zip(parts[: len(self.weights)], parts[len(self.weights) :], strict=True))
        # A product that autocast would round, in sums of large coordinates.
        with torch.autocast(values.device.type, enabled=False):
            for number, (weight, bias) in enumerate(layers):
                values = torch.baddbmm(bias[..., None], weight.unflatten(1, (bias.shape[1], -1)), values)
                values = values.relu() if number < len(layers) - 1 else values
        return values[:, 0]


@HEADS.register("FCOSHead")
class _FCOS(_RTMDet):
    """FCOS: distances in pixels, or in strides while it trains; targets in the same unit, image after image."""

    def __init__(self, head: Any, path: str, owner: str) -> None:
        super().__init__(head, path, owner)
        self.by_stride = head.norm_on_bbox

    @property
    def reading(self) -> tuple[Any, ...]:
        return (*super().reading, self.by_stride)

    def edges(self, picked: Tensor, centres: Tensor, strides: Tensor, trains: bool = False) -> Tensor:
        distances = picked if self.by_stride and trains else picked / strides[:, None]
        return edges_of(centres / strides[:, None], distances)

    def true_edges(self, targets: Tensor, anchors: Tensor, strides: Tensor) -> Tensor:
        distances = targets if self.by_stride else targets / strides[:, None]
        return edges_of(anchors[:, :2] / strides[:, None], distances)

    def assigned(self, recording: Recording, images: int) -> tuple[Tensor, Tensor, Tensor]:
        labels, targets = (row_of(part, images, n) for part, n in zip(recording[self.targets], (None, 4), strict=True))
        return labels, torch.ones_like(labels, dtype=torch.bool), targets


@HEADS.register("TOODHead")
class _TOOD(DenseHead):
    """TOOD: the outputs are probabilities, and boxes in strides."""

    unit = "strides"

    def logits(self, recording: Recording, chosen: Tensor) -> Tensor:
        return super().logits(recording, chosen).float().logit(eps=1e-6)


@HEADS.register("YOLOXHead")
class _YOLOX(DenseHead):
    """YOLOX: a class score is multiplied by the objectness; boxes are the offset of a centre and the logarithm of a size."""

    unit = "strides"
    losses = ("loss_cls", "loss_obj")

    def __init__(self, head: Any, path: str, owner: str) -> None:
        super().__init__(head, path, owner)
        self.objectness = Tap.parse(f"{path}[2][*]")
        self.targets = Tap.parse(f"{path}._get_targets_single()")

    @property
    def class_taps(self) -> tuple[Tap, ...]:
        return (self.classes, self.objectness)

    def logits(self, recording: Recording, chosen: Tensor) -> Tensor:
        objectness = pick(recording.tensors(self.objectness), chosen, 1).float()
        return joint_logits(super().logits(recording, chosen).float(), objectness)

    def edges(self, picked: Tensor, centres: Tensor, strides: Tensor, trains: bool = False) -> Tensor:
        middle, half = picked[:, :2] + centres / strides[:, None], picked[:, 2:].exp() / 2
        return torch.cat([middle - half, middle + half], 1)

    def assigned(self, recording: Recording, images: int) -> tuple[Tensor, Tensor, Tensor]:
        found = recording[self.targets]
        labels, targets = [], []
        for mask, classes, _, boxes, *_ in found if images > 1 else [found]:
            labels.append(torch.full_like(mask, self.num_classes, dtype=torch.long))
            targets.append(boxes.new_zeros(len(mask), 4))
            if len(boxes):
                labels[-1][mask] = classes.argmax(1)
                targets[-1][mask] = boxes
        return torch.stack(labels), torch.ones_like(torch.stack(labels), dtype=torch.bool), torch.stack(targets)


def dense_head(head: Any, path: str, owner: str, term: str) -> DenseHead:
    """Return the reader of a model's dense head; see :func:`kdgraft_det.heads.find_reader`."""
    found: DenseHead = find_reader(head, path, owner, term)
    return found


def reads_proposals(head: DenseHead) -> bool:
    """Return true for a region proposal network, whose only class is "object"."""
    return isinstance(head, _RPN)
