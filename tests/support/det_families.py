"""Small real detectors whose class outputs have names of their own: PanopticFPN, SOLOv2, YOLOF, SSD, YOLOv3 and CornerNet."""

from __future__ import annotations

from typing import Any

from support.det import detector
from support.det_stages import staged

_DELTAS: dict[str, Any] = dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=[1.0] * 4)
_GROUPS: dict[str, Any] = dict(type="GN", num_groups=4, requires_grad=True)


def panoptic(*, stuff: int = 4, **settings: Any) -> dict[str, Any]:
    """A small PanopticFPN of 10 things and ``stuff``; its semantic head tells ``stuff`` + 1 classes apart."""
    model = staged("Mask R-CNN", **settings)
    return model | dict(
        type="PanopticFPN",
        semantic_head=dict(
            type="PanopticFPNHead",
            num_things_classes=10,
            num_stuff_classes=stuff,
            in_channels=model["neck"]["out_channels"],
            inner_channels=12,
            start_level=0,
            end_level=3,
            norm_cfg=dict(_GROUPS),
        ),
        panoptic_fusion_head=dict(type="HeuristicFusionHead", num_things_classes=10, num_stuff_classes=stuff),
        test_cfg=model["test_cfg"] | dict(panoptic=dict(mask_overlap=0.5, stuff_area_limit=16)),
    )


def solov2(**settings: Any) -> dict[str, Any]:
    """A small SOLOv2 of 10 classes."""
    base = detector(**settings)
    channels = base["neck"]["out_channels"]
    head = dict(
        type="SOLOV2Head",
        num_classes=10,
        in_channels=channels,
        feat_channels=channels,
        stacked_convs=1,
        strides=[8, 8, 16, 32, 32],
        scale_ranges=((1, 24), (12, 48), (24, 96), (48, 192), (96, 2048)),
        pos_scale=0.2,
        num_grids=[8, 6, 5, 4, 3],
        cls_down_index=0,
        norm_cfg=dict(_GROUPS),
        mask_feature_head=dict(
            feat_channels=8, start_level=0, end_level=3, out_channels=16, mask_stride=4, norm_cfg=dict(_GROUPS)
        ),
        loss_mask=dict(type="DiceLoss", use_sigmoid=True, loss_weight=3.0),
        loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
    )
    return dict(
        type="SOLOv2",
        data_preprocessor=dict(base["data_preprocessor"], pad_mask=True),
        backbone=base["backbone"],
        neck=dict(type="FPN", in_channels=base["neck"]["in_channels"], out_channels=channels, num_outs=5),
        mask_head=head,
        test_cfg=dict(nms_pre=100, score_thr=0.0, mask_thr=0.5, filter_thr=0.0, kernel="gaussian", max_per_img=20),
    )


def condinst(kind: str = "CondInst", **settings: Any) -> dict[str, Any]:
    """A small ``CondInst`` or ``BoxInst`` of 10 classes: its masks are those of the boxes' positives."""
    base = detector(**settings)
    channels = base["neck"]["out_channels"]
    training = {} if kind == "CondInst" else dict(topk_masks_per_img=64, pairwise_size=3, pairwise_dilation=2)
    losses = dict(type="DiceLoss", use_sigmoid=True, activate=True, eps=5e-6, loss_weight=1.0)
    return dict(
        type=kind,
        data_preprocessor=dict(base["data_preprocessor"], pad_mask=True),
        backbone=base["backbone"],
        neck=base["neck"],
        bbox_head=dict(
            type=f"{kind}BboxHead",
            num_params=169 if kind == "CondInst" else 593,
            num_classes=10,
            in_channels=channels,
            stacked_convs=1,
            feat_channels=channels,
            strides=[8, 16, 32],
            regress_ranges=((-1, 32), (32, 64), (64, 10**8)),
            norm_cfg=dict(_GROUPS),
            norm_on_bbox=True,
            centerness_on_reg=True,
            center_sampling=True,
            loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
            loss_bbox=dict(type="GIoULoss", loss_weight=1.0),
            loss_centerness=dict(type="CrossEntropyLoss", use_sigmoid=True, loss_weight=1.0),
        ),
        mask_head=dict(
            type=f"{kind}MaskHead",
            num_layers=3,
            feat_channels=8 if kind == "CondInst" else 16,
            size_of_interest=8,
            mask_out_stride=4,
            mask_feature_head=dict(
                in_channels=channels,
                feat_channels=8,
                start_level=0,
                end_level=2,
                out_channels=8 if kind == "CondInst" else 16,
                mask_stride=8,
                num_stacked_convs=1,
                norm_cfg=dict(type="BN", requires_grad=True),
            ),
            loss_mask=losses,
            **(dict(max_masks_to_train=300) if kind == "CondInst" else training),
        ),
        test_cfg=base["test_cfg"] | dict(mask_thr=0.5),
    )


def single_stage(head: dict[str, Any], train_cfg: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """A detector of one stage with this ``bbox_head``."""
    base = detector(**settings)
    return base | dict(type="SingleStageDetector", bbox_head=head, train_cfg=train_cfg)


def yolof(*, classes: int = 10, **settings: Any) -> dict[str, Any]:
    """A small YOLOF, five anchors a position of one level."""
    base = detector(**settings)
    channels = base["neck"]["out_channels"]
    return base | dict(
        type="YOLOF",
        backbone=base["backbone"] | dict(out_indices=(3,)),
        neck=dict(
            type="DilatedEncoder",
            in_channels=base["neck"]["in_channels"][-1],
            out_channels=channels,
            block_mid_channels=4,
            num_residual_blocks=1,
            block_dilations=[2],
        ),
        bbox_head=dict(
            type="YOLOFHead",
            num_classes=classes,
            in_channels=channels,
            reg_decoded_bbox=True,
            num_cls_convs=1,
            num_reg_convs=1,
            anchor_generator=dict(type="AnchorGenerator", ratios=[1.0], scales=[0.5, 1, 2, 3, 4], strides=[32]),
            bbox_coder=dict(_DELTAS, add_ctr_clamp=True, ctr_clamp=32),
            loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
            loss_bbox=dict(type="GIoULoss", loss_weight=1.0),
        ),
        train_cfg=dict(
            assigner=dict(type="UniformAssigner", pos_ignore_thr=0.15, neg_ignore_thr=0.7),
            allowed_border=-1,
            pos_weight=-1,
            debug=False,
        ),
    )


def ssd(*, classes: int = 10, **settings: Any) -> dict[str, Any]:
    """A small SSD head on three levels, four and six anchors a position."""
    channels = settings.get("channels", 8)
    head = dict(
        type="SSDHead",
        in_channels=(channels,) * 3,
        num_classes=classes,
        anchor_generator=dict(
            type="SSDAnchorGenerator",
            scale_major=False,
            input_size=96,
            min_sizes=[16, 32, 64],
            max_sizes=[32, 64, 96],
            strides=[8, 16, 32],
            ratios=[[2], [2, 3], [2]],
        ),
        bbox_coder=dict(_DELTAS, target_stds=[0.1, 0.1, 0.2, 0.2]),
    )
    assigner = dict(type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.0, ignore_iof_thr=-1)
    training = dict(
        assigner=assigner | dict(gt_max_assign_all=False),
        sampler=dict(type="PseudoSampler"),
        smoothl1_beta=1.0,
        allowed_border=-1,
        pos_weight=-1,
        neg_pos_ratio=3,
        debug=False,
    )
    return single_stage(head, training, **settings)


def yolov3(*, classes: int = 10, **settings: Any) -> dict[str, Any]:
    """A small YOLOv3 head, three anchors a position."""
    channels = settings.get("channels", 8)
    head = dict(
        type="YOLOV3Head",
        num_classes=classes,
        in_channels=[channels] * 3,
        out_channels=[12] * 3,
        norm_cfg=dict(_GROUPS),
        anchor_generator=dict(
            type="YOLOAnchorGenerator",
            base_sizes=[[(40, 40), (60, 40), (40, 60)], [(20, 20), (30, 20), (20, 30)], [(8, 8), (12, 8), (8, 12)]],
            strides=[32, 16, 8],
        ),
        bbox_coder=dict(type="YOLOBBoxCoder"),
        featmap_strides=[32, 16, 8],
    )
    assigner = dict(type="GridAssigner", pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0)
    return single_stage(head, dict(assigner=assigner), **settings)


def cornernet(**settings: Any) -> dict[str, Any]:
    """A small CornerNet of 10 classes, with heat maps of top left and of bottom right corners."""
    base = detector(**settings)
    channels = base["neck"]["out_channels"]
    return dict(
        type="CornerNet",
        data_preprocessor=base["data_preprocessor"],
        backbone=base["backbone"],
        neck=dict(type="FPN", in_channels=base["neck"]["in_channels"], out_channels=channels, end_level=1, num_outs=2),
        bbox_head=dict(
            type="CornerHead", num_classes=10, in_channels=channels, num_feat_levels=2, corner_emb_channels=1
        ),
    )
