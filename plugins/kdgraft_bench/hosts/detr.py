"""Small detectors whose predictions are queries, for the recipes that a dense head cannot take."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import mmdet

# Upstream's DINO embeds reference points in 512 numbers, whatever its width is: only 256 fits them.
EMBEDDINGS = 256 if mmdet.__version__ == "3.3.0" else 64
LEVELS = 3
QUERIES = 30


def with_queries(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``model`` entry of a small DINO on the backbone of a dense detector, for the same pictures and classes.

    Args:
        entry: the ``model`` entry of the dense detector.
    """
    backbone = entry["backbone"] | dict(out_indices=(1, 2, 3))
    attention = dict(embed_dims=EMBEDDINGS, num_heads=4, dropout=0.0, batch_first=True)
    deformable = dict(attention, num_levels=LEVELS, num_points=4)
    feed = dict(embed_dims=EMBEDDINGS, feedforward_channels=2 * EMBEDDINGS, ffn_drop=0.0)
    costs = [
        dict(type="FocalLossCost", weight=2.0),
        dict(type="BBoxL1Cost", weight=5.0, box_format="xywh"),
        dict(type="IoUCost", iou_mode="giou", weight=2.0),
    ]
    return dict(
        type="DINO",
        num_queries=QUERIES,
        num_feature_levels=LEVELS,
        with_box_refine=True,
        as_two_stage=True,
        data_preprocessor=copy.deepcopy(entry["data_preprocessor"]),
        backbone=copy.deepcopy(backbone),
        neck=dict(
            type="ChannelMapper",
            in_channels=entry["neck"]["in_channels"][1:],
            kernel_size=1,
            out_channels=EMBEDDINGS,
            act_cfg=None,
            norm_cfg=dict(type="GN", num_groups=8),
            num_outs=LEVELS,
        ),
        encoder=dict(num_layers=2, layer_cfg=dict(self_attn_cfg=deformable, ffn_cfg=feed)),
        decoder=dict(
            num_layers=2,
            return_intermediate=True,
            layer_cfg=dict(self_attn_cfg=attention, cross_attn_cfg=deformable, ffn_cfg=feed),
            post_norm_cfg=None,
        ),
        positional_encoding=dict(num_feats=EMBEDDINGS // 2, normalize=True, offset=0.0, temperature=20),
        bbox_head=dict(
            type="DINOHead",
            num_classes=entry["bbox_head"]["num_classes"],
            sync_cls_avg_factor=True,
            embed_dims=EMBEDDINGS,
            loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
            loss_bbox=dict(type="L1Loss", loss_weight=5.0),
            loss_iou=dict(type="GIoULoss", loss_weight=2.0),
        ),
        dn_cfg=dict(
            label_noise_scale=0.5, box_noise_scale=1.0, group_cfg=dict(dynamic=True, num_groups=None, num_dn_queries=20)
        ),
        train_cfg=dict(assigner=dict(type="HungarianAssigner", match_costs=costs)),
        test_cfg=dict(max_per_img=QUERIES),
    )
