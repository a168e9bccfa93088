"""Small real detectors whose predictions are no dense grid: two-stage ones on regions of interest, and DETR's kin on queries."""

from __future__ import annotations

import copy
from typing import Any

import mmdet
import numpy as np
from mmcv.ops import RoIAlign
from mmdet.models.dense_heads import rpn_head
from mmdet.structures.mask import BitmapMasks

from support.det import detector

_DELTAS: dict[str, Any] = dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4)
_KEPT: dict[str, Any] = dict(nms_pre=100, max_per_img=40, nms=dict(type="nms", iou_threshold=0.7), min_bbox_size=0)
STAGED = ("Faster R-CNN", "Mask R-CNN", "Cascade R-CNN")
CASCADE_OF_MASKS = "Cascade Mask R-CNN"


def staged(kind: str, *, samples: int = 64, **settings: Any) -> dict[str, Any]:
    """The ``model`` entry of a small two-stage detector of 10 classes for images of 96×96.

    Args:
        kind: one of :data:`STAGED`, or :data:`CASCADE_OF_MASKS`.
        samples: proposals of an image that the RoI head trains on.
        settings: those of :func:`support.det.detector`.
    """
    base = detector(**settings)
    channels = base["neck"]["out_channels"]
    strides = base["bbox_head"]["anchor_generator"]["strides"]
    cascade, masks = kind.startswith("Cascade"), "Mask" in kind
    cross_entropy = dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0)
    rpn = dict(
        type="RPNHead",
        in_channels=channels,
        feat_channels=channels,
        anchor_generator=dict(type="AnchorGenerator", scales=[4], ratios=[0.5, 1.0, 2.0], strides=strides),
        bbox_coder=dict(_DELTAS, target_stds=[1.0] * 4),
        loss_cls=dict(cross_entropy, use_sigmoid=True),
        loss_bbox=dict(type="L1Loss", loss_weight=1.0),
    )
    extractor = dict(
        type="SingleRoIExtractor",
        roi_layer=dict(type="RoIAlign", output_size=4, sampling_ratio=2),
        out_channels=channels,
        featmap_strides=strides,
    )
    boxes = dict(
        type="Shared2FCBBoxHead",
        in_channels=channels,
        fc_out_channels=24,
        roi_feat_size=4,
        num_classes=10,
        bbox_coder=dict(_DELTAS, target_stds=[0.1, 0.1, 0.2, 0.2]),
        reg_class_agnostic=cascade,
        loss_cls=cross_entropy,
        loss_bbox=dict(type="SmoothL1Loss", beta=1.0, loss_weight=1.0),
    )
    rois: dict[str, Any] = dict(type="StandardRoIHead", bbox_roi_extractor=extractor, bbox_head=boxes)
    if cascade:
        rois |= dict(
            type="CascadeRoIHead", num_stages=2, stage_loss_weights=[1, 0.5], bbox_head=[boxes, copy.deepcopy(boxes)]
        )
    if masks:
        mask = dict(
            type="FCNMaskHead",
            num_convs=1,
            in_channels=channels,
            conv_out_channels=channels,
            num_classes=10,
            loss_mask=dict(type="CrossEntropyLoss", use_mask=True, loss_weight=1.0),
        )
        rois |= dict(mask_roi_extractor=extractor, mask_head=[mask, copy.deepcopy(mask)] if cascade else mask)
    rcnn = [_sampled(threshold, samples) for threshold in ((0.3, 0.4) if cascade else (0.3,))]
    return dict(
        type="CascadeRCNN" if cascade else "MaskRCNN" if masks else "FasterRCNN",
        data_preprocessor=dict(base["data_preprocessor"], pad_mask=True) if masks else base["data_preprocessor"],
        backbone=base["backbone"],
        neck=base["neck"],
        rpn_head=rpn,
        roi_head=rois,
        train_cfg=dict(rpn=_sampled(0.4, 1000), rpn_proposal=_KEPT, rcnn=rcnn if cascade else rcnn[0]),
        test_cfg=dict(
            rpn=_KEPT,
            rcnn=dict(score_thr=0.0, nms=dict(type="nms", iou_threshold=0.5), max_per_img=20, mask_thr_binary=0.5),
        ),
    )


def _sampled(threshold: float, number: int) -> dict[str, Any]:
    """Assigner and sampler; with more samples than there are proposals nothing is drawn at random."""
    assigner = dict(
        type="MaxIoUAssigner",
        pos_iou_thr=threshold,
        neg_iou_thr=threshold,
        min_pos_iou=threshold,
        match_low_quality=True,
        ignore_iof_thr=-1,
    )
    sampler = dict(type="RandomSampler", num=number, pos_fraction=0.5, neg_pos_ub=-1, add_gt_as_proposals=True)
    cfg = dict(assigner=assigner, sampler=sampler, pos_weight=-1, debug=False, mask_size=8)
    return cfg | (dict(allowed_border=-1, sampler=dict(sampler, add_gt_as_proposals=False)) if number == 1000 else {})


def detr(
    kind: str = "DeformableDETR", *, queries: int = 12, two_stages: bool = False, **settings: Any
) -> dict[str, Any]:
    """The ``model`` entry of a small ``DeformableDETR`` or ``DINO`` of 10 classes, or of one of :data:`ONE_MAP`."""
    base = detector(**settings)
    if kind in ONE_MAP:
        return _on_one_map(kind, base, queries)
    dino = kind == "DINO"
    # Upstream's DINO encodes its reference points in 512 numbers, whatever its width is; only 256 fits them. So do both stages
    # of Deformable DETR, and Conditional DETR with its queries.
    width = 256 if two_stages or (dino and mmdet.__version__ == "3.3.0") else 16
    attention = dict(embed_dims=width, num_levels=3, num_heads=2, num_points=2, dropout=0.0, batch_first=True)
    feed = dict(embed_dims=width, feedforward_channels=32, ffn_drop=0.0)
    own = dict(embed_dims=width, num_heads=2, dropout=0.0, batch_first=True)
    head = dict(
        type=f"{kind}Head",
        num_classes=10,
        sync_cls_avg_factor=True,
        embed_dims=width,
        loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=2.0),
        loss_bbox=dict(type="L1Loss", loss_weight=5.0),
        loss_iou=dict(type="GIoULoss", loss_weight=2.0),
    )
    costs = [
        dict(type="FocalLossCost", weight=2.0),
        dict(type="BBoxL1Cost", weight=5.0, box_format="xywh"),
        dict(type="IoUCost", iou_mode="giou", weight=2.0),
    ]
    model = dict(
        type=kind,
        num_queries=queries,
        num_feature_levels=3,
        with_box_refine=dino or two_stages,
        as_two_stage=dino or two_stages,
        data_preprocessor=base["data_preprocessor"],
        backbone=base["backbone"] | dict(out_indices=(1, 2, 3)),
        neck=dict(
            type="ChannelMapper",
            in_channels=base["neck"]["in_channels"][1:],
            kernel_size=1,
            out_channels=width,
            act_cfg=None,
            norm_cfg=dict(type="GN", num_groups=4),
            num_outs=3,
        ),
        encoder=dict(num_layers=1, layer_cfg=dict(self_attn_cfg=attention, ffn_cfg=feed)),
        decoder=dict(
            num_layers=2,
            return_intermediate=True,
            layer_cfg=dict(self_attn_cfg=own, cross_attn_cfg=attention, ffn_cfg=feed),
            post_norm_cfg=None,
        ),
        positional_encoding=dict(num_feats=width // 2, normalize=True, offset=-0.5),
        bbox_head=head,
        train_cfg=dict(assigner=dict(type="HungarianAssigner", match_costs=costs)),
        test_cfg=dict(max_per_img=10),
    )
    if dino:
        model["dn_cfg"] = dict(
            label_noise_scale=0.5, box_noise_scale=1.0, group_cfg=dict(dynamic=True, num_groups=None, num_dn_queries=10)
        )
    return model


ONE_MAP = ("DETR", "ConditionalDETR", "DABDETR")
"""DETRs whose encoder reads one map alone."""


def _on_one_map(kind: str, base: dict[str, Any], queries: int) -> dict[str, Any]:
    plain, width = kind == "DETR", 256 if kind == "ConditionalDETR" else 16
    own: dict[str, Any] = dict(embed_dims=width, num_heads=2, dropout=0.0, batch_first=True)
    feed = dict(embed_dims=width, feedforward_channels=32, ffn_drop=0.0, num_fcs=2)
    conditional = dict(embed_dims=width, num_heads=2, attn_drop=0.0)
    layer = dict(self_attn_cfg=own, cross_attn_cfg=own, ffn_cfg=feed)
    if not plain:
        layer |= dict(
            self_attn_cfg=dict(conditional, cross_attn=False), cross_attn_cfg=dict(conditional, cross_attn=True)
        )
    decoder: dict[str, Any] = dict(num_layers=2, layer_cfg=layer, return_intermediate=True)
    if kind == "DABDETR":
        decoder |= dict(query_dim=4, query_scale_type="cond_elewise", with_modulated_hw_attn=True)
    focal = dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=2.0)
    softmax = dict(type="CrossEntropyLoss", bg_cls_weight=0.1, use_sigmoid=False, loss_weight=1.0, class_weight=1.0)
    costs = [
        dict(type="ClassificationCost", weight=1.0) if plain else dict(type="FocalLossCost", weight=2.0),
        dict(type="BBoxL1Cost", weight=5.0, box_format="xywh"),
        dict(type="IoUCost", iou_mode="giou", weight=2.0),
    ]
    return dict(
        type=kind,
        num_queries=queries,
        data_preprocessor=base["data_preprocessor"],
        backbone=base["backbone"] | dict(out_indices=(3,)),
        neck=dict(
            type="ChannelMapper",
            in_channels=base["neck"]["in_channels"][-1:],
            kernel_size=1,
            out_channels=width,
            act_cfg=None,
            norm_cfg=None,
            num_outs=1,
        ),
        encoder=dict(num_layers=1, layer_cfg=dict(self_attn_cfg=own, ffn_cfg=feed)),
        decoder=decoder,
        positional_encoding=dict(num_feats=width // 2, normalize=True),
        bbox_head=dict(
            type=f"{kind}Head",
            num_classes=10,
            embed_dims=width,
            loss_cls=softmax if plain else focal,
            loss_bbox=dict(type="L1Loss", loss_weight=5.0),
            loss_iou=dict(type="GIoULoss", loss_weight=2.0),
        ),
        train_cfg=dict(assigner=dict(type="HungarianAssigner", match_costs=costs)),
        test_cfg=dict(max_per_img=10),
    )


def in_single_precision(patch: Any) -> None:
    """Have mmcv's kernels for CPUs, which know single precision alone, run in it under autocast."""
    nms, align = rpn_head.batched_nms, RoIAlign.forward
    patch.setattr(rpn_head, "batched_nms", lambda b, s, *rest: nms(b.float(), s.float(), *rest))
    patch.setattr(RoIAlign, "forward", lambda self, x, rois: align(self, x.float(), rois.float()).to(x.dtype))


def with_masks(batch: dict[str, Any]) -> dict[str, Any]:
    """A raw batch whose objects fill their boxes, as masks."""
    for picture, sample in zip(batch["inputs"], batch["data_samples"], strict=True):
        height, width = picture.shape[-2:]
        boxes = sample.gt_instances.bboxes.long().tolist()
        masks = np.zeros((len(boxes), height, width), dtype=np.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
            mask[y1:y2, x1:x2] = 1
        sample.gt_instances.masks = BitmapMasks(masks, height, width)
    return batch
