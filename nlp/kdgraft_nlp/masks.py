"""Universal segmentation: models that predict a class and a mask by each object query, MaskFormer and Mask2Former."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kdgraft.adapters import resize_to
from kdgraft.batch import Batch
from kdgraft.losses import mask_costs
from kdgraft.regions.base import valid_positions
from kdgraft.taps import Tap

from .queries import QueryMatching, QueryModel


class MaskModel(QueryModel):
    """Reads the class logits and the masks ``(B, Q, H, W)`` of one model's queries."""

    classes, places = Tap.parse("[class_queries_logits]"), Tap.parse("[masks_queries_logits]")
    what = "masks (B, Q, H, W)"

    def shares_softmax(self, model: nn.Module) -> bool:
        return True

    def costs_of(self, config: Any) -> tuple[float, float, float]:
        """Return the weights of classes, pixels and dice in the model's own matching; Mask2Former's where the config has none."""
        classes, masks, dice = (
            float(getattr(config, f"{name}_weight", known)) for name, known in (("class", 1), ("mask", 5), ("dice", 5))
        )
        return classes, masks, dice

    def fits(self, logits: Tensor, places: Tensor) -> bool:
        """Return whether outputs have the shapes of class logits and masks of queries."""
        expected = self.num_classes + 1
        return logits.shape[-1] == expected and places.ndim == 4 and places.shape[:2] == logits.shape[:2]


class MaskMatching(QueryMatching):
    """The matching of two models' queries by their classes and masks.

    The cost of a pair is the total variation distance of the classes, the divergence of the masks' pixels and 1 − dice, with the
    weights in the student's config. Masks are compared on the teacher's grid, without the padding of images.
    """

    side = MaskModel
    knows_objects = False

    def aligned(self, ours: Tensor, theirs: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        valid = None
        if batch.image_sizes is not None and batch.padded_size is not None:
            inside = valid_positions(batch.image_sizes, batch.padded_size, theirs)
            valid = None if inside is None else inside.flatten(1)[:, None] > 0
        return resize_to(ours, theirs.shape[-2:]).flatten(2), theirs.flatten(2), valid

    def place_costs(self, boxes: Tensor, places: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the divergences of the teacher's masks and 1 − dice, ``(B, Q, R)`` each."""
        divergence, overlap = mask_costs(boxes, places, valid)
        return torch.nan_to_num(divergence), torch.nan_to_num(overlap)
