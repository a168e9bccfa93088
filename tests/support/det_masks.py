"""Small real detectors that predict masks of objects, one of each way: proposals, positions, queries."""

from __future__ import annotations

from typing import Any

from support.det import detector, raw_batch
from support.det_stages import CASCADE_OF_MASKS, staged, with_masks
from support.det_zoo import INSTANCES, zoo

BY_QUERIES = ("Mask2Former", "MaskFormer")
WITH_MASKS = ("Mask R-CNN", CASCADE_OF_MASKS, INSTANCES, *BY_QUERIES)
_GROUPS: dict[str, Any] = dict(type="GN", num_groups=4)
_SIDE = 16
"""The width of the decoders."""


def model(kind: str, **settings: Any) -> dict[str, Any]:
    """The ``model`` entry of one of :data:`WITH_MASKS`, of 10 classes for images of 96×96."""
    if kind in BY_QUERIES:
        return by_queries(kind, **settings)
    return zoo(kind, **settings) if kind == INSTANCES else staged(kind, **settings)


def batch(boxes: Any = None, **settings: Any) -> dict[str, Any]:
    """A raw batch whose objects fill their boxes."""
    return with_masks(raw_batch(**settings) if boxes is None else raw_batch(boxes, **settings))


def by_queries(kind: str, *, queries: int = 6, stuff: int = 0, **settings: Any) -> dict[str, Any]:
    """The ``model`` entry of a small ``Mask2Former`` or ``MaskFormer`` of 10 things.

    Args:
        kind: one of :data:`BY_QUERIES`.
        queries: the number of object queries.
        stuff: the number of classes of regions without instances.
        settings: those of :func:`support.det.detector`.
    """
    base = detector(**settings)
    finer = kind == "Mask2Former"
    classes = 10 + stuff
    attention: dict[str, Any] = dict(embed_dims=_SIDE, num_heads=2, dropout=0.0, batch_first=True)
    feed = dict(embed_dims=_SIDE, feedforward_channels=32, num_fcs=2, ffn_drop=0.0)
    layer = dict(self_attn_cfg=attention, cross_attn_cfg=attention, ffn_cfg=feed)
    positions = dict(num_feats=_SIDE // 2, normalize=True)
    head = dict(
        type=f"{kind}Head",
        in_channels=base["neck"]["in_channels"],
        feat_channels=_SIDE,
        out_channels=_SIDE,
        num_things_classes=10,
        num_stuff_classes=stuff,
        num_queries=queries,
        pixel_decoder=dict(type="PixelDecoder", norm_cfg=_GROUPS, act_cfg=dict(type="ReLU")),
        positional_encoding=positions,
        transformer_decoder=dict(num_layers=2, layer_cfg=layer, return_intermediate=True),
        loss_cls=dict(
            type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0, class_weight=[1.0] * classes + [0.1]
        ),
        loss_mask=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=20.0),
        loss_dice=dict(
            type="DiceLoss",
            use_sigmoid=True,
            activate=True,
            naive_dice=True,
            reduction="mean",
            eps=1.0,
            loss_weight=1.0,
        ),
    )
    pixels = dict(type="FocalLossCost", weight=20.0, binary_input=True)
    if finer:
        deformable = dict(attention, num_levels=3, num_points=2)
        head |= dict(
            strides=[4, 8, 16, 32],
            num_transformer_feat_level=3,
            pixel_decoder=dict(
                type="MSDeformAttnPixelDecoder",
                num_outs=3,
                norm_cfg=_GROUPS,
                act_cfg=dict(type="ReLU"),
                encoder=dict(num_layers=1, layer_cfg=dict(self_attn_cfg=deformable, ffn_cfg=feed)),
                positional_encoding=positions,
            ),
            loss_mask=dict(type="CrossEntropyLoss", use_sigmoid=True, reduction="mean", loss_weight=5.0),
        )
        pixels = dict(type="CrossEntropyLossCost", weight=5.0, use_sigmoid=True)
    costs = [
        dict(type="ClassificationCost", weight=2.0 if finer else 1.0),
        pixels,
        dict(type="DiceCost", weight=5.0 if finer else 1.0, pred_act=True, eps=1.0),
    ]
    return dict(
        type=kind,
        data_preprocessor=dict(base["data_preprocessor"], pad_mask=True),
        backbone=base["backbone"],
        panoptic_head=head,
        panoptic_fusion_head=dict(
            type="MaskFormerFusionHead", num_things_classes=10, num_stuff_classes=stuff, loss_panoptic=None
        ),
        train_cfg=dict(
            num_points=64,
            oversample_ratio=3.0,
            importance_sample_ratio=0.75,
            assigner=dict(type="HungarianAssigner", match_costs=costs),
            sampler=dict(type="MaskPseudoSampler"),
        ),
        test_cfg=dict(panoptic_on=False, semantic_on=False, instance_on=True, max_per_image=20),
    )
