"""Distillation gradients of a detector on its share of four images, alone or as one of several processes under mmengine's DDP.

:func:`gradients_of` is also what the test computes on the whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from mmengine.model import MMDistributedDataParallel

from support import det_masks
from support.det import BOXES, build, detector, distilled, part, raw_batch
from support.det_stages import detr, staged, with_masks
from support.processes import as_rank
from support.tensors import distillation, gradients

TERMS: dict[str, Any] = {
    "features": dict(type="FeatureImitation", tap="neck[*]"),
    "boxes": dict(type="FeatureImitation", tap="neck[*]", region="foreground"),
    "layer": dict(type="FeatureImitation", tap="backbone.layer3"),
    "focal_global": dict(type="FocalGlobal"),
    "generation": dict(type="MaskedGeneration"),
    "near": dict(type="FeatureImitation", tap="neck[*]", region="fine_grained"),
    "ld_main": dict(type="LocalizationDistillation"),
    "ld_vlr": dict(type="LocalizationDistillation", anchors="vlr"),
    "soft": dict(type="SoftTargets"),
    "soft_main": dict(type="SoftTargets", anchors="main", activation="softmax"),
    "cross_head": dict(type="CrossHead"),
    "bckd": dict(type="BCKD"),
    "scored": dict(type="ScoredImitation"),
}
ON_PROPOSALS: dict[str, Any] = {
    "roi_classes": dict(type="SoftTargets"),
    "roi_weighted": dict(type="SoftTargets", background_weight=1.5, hard_weight=0.8, anchors="main"),
    "roi_boxes": dict(type="BoundedRegression", margin=1e6),
    "roi_features": dict(type="FeatureImitation", tap="roi_head.bbox_head:input"),
    "rpn_classes": dict(type="SoftTargets", head="rpn_head"),
    "rpn_boxes": dict(type="BoundedRegression", margin=1e6, head="rpn_head"),
    "cascade_classes": dict(type="SoftTargets"),
    "cascade_boxes": dict(type="BoundedRegression", margin=1e6),
    "query_classes": dict(type="SoftTargets"),
    "query_boxes": dict(type="BoundedRegression", margin=1e6),
    "query_points": dict(type="KDDETR", points=6),
    "masks_rois": dict(type="InstanceMasks"),
    "masks_positions": dict(type="InstanceMasks"),
    "masks_queries": dict(type="InstanceMasks"),
}
"""Terms of detectors without a dense head; with more samples than proposals nothing is drawn at random."""
ON_MASKS = {"masks_rois": "Mask R-CNN", "masks_positions": "RTMDet-Ins", "masks_queries": "Mask2Former"}
"""The detectors of those on masks."""
WITH_A_PEER: dict[str, Any] = {
    "peer_boxes": dict(type="BoundedRegression", margin=1e6, source="peer"),
    "peer_features": dict(type="FeatureImitation", tap="neck[*]", region="foreground", source="peer"),
}
"""Terms between two detectors that both train."""
BATCHES = {
    "unequal": BOXES,  # 1 and 2 objects on the first process, 3 and 1 on the second
    "one sided": (*BOXES[1:3], [], []),  # no object at all on the second process
}


def kind_of(term: str) -> str:
    """The detector that a term of :data:`ON_PROPOSALS` is tested on."""
    if term in ON_MASKS:
        return ON_MASKS[term]
    return {"cascade": "Cascade R-CNN", "query": "DeformableDETR"}.get(term.partition("_")[0], "Faster R-CNN")


def without_dense_head(kind: str, **settings: Any) -> dict[str, Any]:
    """A model of this kind whose RoI head, if it has one, trains on every proposal; teachers' weights lie beside the dense one's."""
    if kind in ("RTMDet-Ins", "Mask2Former"):
        return det_masks.model(kind, **settings)
    return detr(kind, **settings) if kind == "DeformableDETR" else staged(kind, samples=500, **settings)


def gradients_of(teacher: str, term: str, share: slice = slice(None)) -> dict[str, dict[str, Any]]:
    """By batch: the loss on a share of it, and the distillation gradient; under several processes the mean that DDP takes."""
    spec = {**TERMS, **ON_PROPOSALS, **WITH_A_PEER}[term]
    student, other = detector(frozen_bn=True), detector(width=6, channels=12)
    if term in ON_PROPOSALS:
        kind = kind_of(term)
        student, other = without_dense_head(kind, frozen_bn=True), without_dense_head(kind, width=6)
        teacher = f"{teacher}.{kind}"
    entry = distilled(student, other, teacher, terms=[{**spec, "name": "term"}])
    if term in WITH_A_PEER:
        del entry["teacher"]
        entry["teachers"] = dict(peer=dict(type="Peer", config=detector(width=6, channels=12, frozen_bn=True)))
    model = build(entry)
    wrapped = model
    if dist.is_initialized():
        wrapped = MMDistributedDataParallel(
            model, device_ids=None, broadcast_buffers=False, find_unused_parameters=False
        )
    wrapped.train()
    results = {}
    for name, boxes in BATCHES.items():
        model.zero_grad()
        torch.manual_seed(0)  # of terms that draw numbers
        raw = with_masks(raw_batch(boxes)) if term in ON_MASKS else raw_batch(boxes)
        data = model.data_preprocessor(part(raw, share), True)
        found = wrapped(**data, mode="loss")
        total = distillation(found)
        host = {k: sum(v) if isinstance(v, list) else v for k, v in found.items() if not k.startswith("distill.")}
        (total + 0 * sum(host.values())).backward()
        results[name] = {
            "loss": total.detach(),
            "host": {name: value.item() for name, value in host.items()},
            "gradients": gradients(model),
        }
    return results


def all_gradients(rank: int, teacher: str) -> dict[str, dict[str, dict[str, Any]]]:
    """The gradients of every term on every batch, of this process's two images."""
    share = slice(2 * rank, 2 * rank + 2)
    return {term: gradients_of(teacher, term, share) for term in (*TERMS, *ON_PROPOSALS, *WITH_A_PEER)}


if __name__ == "__main__":
    as_rank(all_gradients)
