"""Object detection in recipe files: images and boxes in COCO's format, their batches, and the average precision of an evaluation."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from kdgraft.errors import DistillError, nearest

from .coco import classes_in, read_coco
from .recipe_data import Metrics, RecipeData
from .tasks import accepted
from .trainer import DistillTrainer

MOST = 300
"""The detections of an image that an evaluation considers, as RT-DETR's does; COCO takes the best 100 of each class."""
NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
"""COCO's figures, in the order in which pycocotools has them."""


class DetectionData(RecipeData):
    """Images with boxes; a row of the encoded sets is an image, which is read when it is needed."""

    columns: None

    @staticmethod
    def sets_of(told: Mapping[str, Any]) -> dict[str, Dataset]:
        given = told.get("images")
        folders = dict(given) if isinstance(given, Mapping) else dict.fromkeys(("train", "eval"), given)
        return {
            split: read_coco(str(told[split]), folders.get(split)) for split in ("train", "eval") if told.get(split)
        }

    def find(self, sets: Mapping[str, Dataset]) -> None:
        self.own = {split: classes_in(split, found) for split, found in sets.items()}
        self.truth: Dataset | None = None

    def read_classes(self, sets: Mapping[str, Dataset]) -> None:
        told = self.told.get("classes")
        self.names = self.own["train"] if told is None else [str(name) for name in told]
        for split, found in sets.items():
            strange = [name for name in self.own[split] if name not in self.names]
            if strange:
                raise DistillError(
                    f"the {split} set has the class {strange[0]!r}{nearest(strange[0], self.names)}, which "
                    f"{'data.classes lacks' if told is not None else 'the training set lacks'}"
                )
            if not any(found["classes"]):
                raise DistillError(f"the {split} set has no boxes")

    def encode(self, split: str, found: Dataset, tokenizer: Any) -> Dataset:
        """Return a set whose rows have a number, and classes in the order of the training set."""
        assert self.names is not None
        places = [self.names.index(name) for name in self.own[split]]
        rows = [[places[one] for one in classes] for classes in found["classes"]]
        encoded = found.remove_columns("classes").add_column("classes", rows).add_column("number", range(len(found)))
        if split == "eval":
            self.truth = encoded
        return encoded

    def collator(self, tokenizer: Any, student: Any) -> Callable[..., Any]:
        return ImageCollator(tokenizer, masks="pixel_mask" in accepted(student))

    def metrics(self) -> Metrics | None:
        def computed(found: Any) -> dict[str, float]:
            assert self.truth is not None and self.names is not None
            detections, numbers = found.predictions, found.label_ids
            order = np.argsort(numbers)
            if numbers[order].tolist() != list(range(len(self.truth))):
                raise DistillError(f"there are detections of {len(numbers)} images, and the set has {len(self.truth)}")
            return average_precision(self.truth, detections[order], self.names)

        return computed


class ImageCollator:
    """Makes a batch of rows of :class:`DetectionData`: opens the images, and has the processor resize, normalise and pad them.

    Args:
        processor: transformers' image processor of a detector.
        masks: give the model the mask of the pixels that are no padding.
    """

    def __init__(self, processor: Any, *, masks: bool) -> None:
        self.processor, self.masks = processor, masks

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return ``pixel_values``, ``labels`` and, where the model takes it, ``pixel_mask``.

        Raises:
            DistillError: an image cannot be read, or has another size than its set says.
        """
        images = [opened(row) for row in rows]
        made = self.processor(images=images, annotations=[_annotated(row) for row in rows], return_tensors="pt")
        pixels, mask = made["pixel_values"], made.get("pixel_mask")
        labels = []
        for place, (row, label) in enumerate(zip(rows, made["labels"], strict=True)):
            inside = torch.ones(2)
            if mask is not None:
                inside = torch.stack([mask[place].amax(1 - side).float().mean() for side in (0, 1)])
            labels.append({**label, "number": torch.tensor(row["number"]), "inside": inside})
        batch = {"pixel_values": pixels, "labels": labels}
        return {**batch, "pixel_mask": mask} if self.masks and mask is not None else batch


def opened(row: Mapping[str, Any]) -> Any:
    """Return the image of a row, in RGB."""
    from PIL import Image

    try:
        with Image.open(row["image"]) as image:
            found = image.convert("RGB")
    except OSError as error:
        raise DistillError(f"cannot read the image {row['image']}: {error}") from None
    if found.size != (row["width"], row["height"]):
        size, told = (f"{width}×{height}" for width, height in (found.size, (row["width"], row["height"])))
        raise DistillError(
            f"{row['image']} has {size} pixels, and its set says {told}, to which its boxes belong; correct the json file"
        )
    return found


def _annotated(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return an image's objects as the processors of transformers take them."""
    objects = zip(row["boxes"], row["classes"], row["crowd"], row["area"], strict=True)
    return {
        "image_id": row["number"],
        "annotations": [
            {"bbox": box, "category_id": kind, "iscrowd": crowd, "area": area} for box, kind, crowd, area in objects
        ],
    }


class DetectionTrainer(DistillTrainer):
    """The trainer of detectors, whose evaluation keeps the detections alone, and not all states of a model."""

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        """Return the loss, the detections ``(B, K, 6)`` and the numbers ``(B,)`` of the images."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach().mean(), None, None
        labels = inputs["labels"]
        inside = torch.stack([label["inside"] for label in labels])
        found = detections(outputs["logits"], outputs["pred_boxes"], inside, self.model.config.num_labels)
        return loss.detach().mean(), found, torch.stack([label["number"] for label in labels])


def detections(logits: Tensor, boxes: Tensor, inside: Tensor, classes: int) -> Tensor:
    """Return the detections of a batch: class, score, and x1, y1, x2, y2 as fractions of the image, ``(B, K, 6)``.

    Args:
        logits: ``(B, Q, C)``; with one class more than ``classes``, the last is "no object", in one softmax with the others.
        boxes: ``(B, Q, 4)``: centre and size as fractions of the padded image.
        inside: ``(B, 2)``: the share of its height and width that is the image.
        classes: the number of classes.
    """
    logits, boxes = logits.float(), boxes.float()
    if logits.shape[-1] > classes:
        scores, kinds = logits.softmax(-1)[..., :classes].max(-1)
        scores, queries = scores.topk(min(MOST, scores.shape[1]), 1)
        kinds = kinds.gather(1, queries)
    else:
        flat = logits.sigmoid().flatten(1)
        scores, places = flat.topk(min(MOST, flat.shape[1]), 1)
        queries, kinds = places // classes, places % classes
    found = boxes.gather(1, queries[..., None].expand(-1, -1, 4))
    corners = torch.cat([found[..., :2] - found[..., 2:] / 2, found[..., :2] + found[..., 2:] / 2], -1)
    corners = (corners / inside.flip(1).repeat(1, 2)[:, None]).clamp(0, 1)
    return torch.cat([kinds[..., None].to(scores), scores[..., None], corners], -1)


def average_precision(truth: Dataset, found: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Return COCO's average precisions, as shares of 1; sizes that no object has are left out.

    Args:
        truth: the set, in the order of ``found``.
        found: ``(N, K, 6)``, see :func:`detections`.
        names: the classes.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise DistillError(
            f"evaluating detections needs pycocotools ({error}); pip install 'kdgraft[vision]'"
        ) from None
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    said: list[dict[str, Any]] = []
    columns = truth.with_format(None).remove_columns("image")
    for number, (row, rows) in enumerate(zip(columns, found, strict=True)):
        images.append({"id": number, "width": row["width"], "height": row["height"]})
        for box, kind, crowd, area in zip(row["boxes"], row["classes"], row["crowd"], row["area"], strict=True):
            about = {"id": len(objects) + 1, "image_id": number, "category_id": kind, "iscrowd": crowd, "area": area}
            objects.append({**about, "bbox": list(box)})
        corners = rows[:, 2:] * np.array([row["width"], row["height"]] * 2)
        boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
        for (kind, score), box in zip(rows[:, :2].tolist(), boxes.tolist(), strict=True):
            said.append({"image_id": number, "category_id": int(kind), "score": score, "bbox": box})
    with redirect_stdout(io.StringIO()):  # pycocotools prints tables
        ours = COCO()
        categories = [{"id": number, "name": name} for number, name in enumerate(names)]
        ours.dataset = {"info": {}, "images": images, "annotations": objects, "categories": categories}
        ours.createIndex()
        judged = COCOeval(ours, ours.loadRes(said), "bbox")
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    return {name: float(value) for name, value in zip(NAMES, judged.stats, strict=False) if value >= 0}
