"""One small real detector of each family of dense heads, all on the same ResNet-18 and FPN."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from support.det import detector

INSTANCES = "RTMDet-Ins"
"""RTMDet with masks."""
_DELTAS: dict[str, Any] = dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=[0.1, 0.1, 0.2, 0.2])
_ASSIGNED: dict[str, Any] = dict(allowed_border=-1, pos_weight=-1, debug=False)
_FOCAL: dict[str, Any] = dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0)
_QUALITY: dict[str, Any] = dict(type="QualityFocalLoss", use_sigmoid=True, beta=2.0, loss_weight=1.0)


def zoo(kind: str, *, convs: int = 2, head: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    """The ``model`` entry of a small detector of 10 classes for images of 96×96.

    TOOD asks mmengine's message hub for the ``epoch``, which only a Runner writes there.

    Args:
        kind: one of :data:`KINDS`.
        convs: convolutions in each tower of the head.
        head: what to change in the ``bbox_head``.
        settings: those of :func:`support.det.detector`; ``frozen_bn`` gives heads that have batch norms group norms as well.
    """
    if kind in ("GFL", "ATSS"):
        model = detector(kind, convs=convs, **settings)
    else:
        model = detector("ATSS", convs=convs, **settings)
        plain = model["bbox_head"]
        shared = {key: plain[key] for key in ("num_classes", "in_channels", "feat_channels", "stacked_convs")}
        own, assignment = _HEADS[kind](plain["anchor_generator"]["strides"])
        if settings.get("frozen_bn") and kind in ("RTMDet", INSTANCES, "YOLOX"):
            own["norm_cfg"] = plain["norm_cfg"]
        model |= dict(type=kind.partition("-")[0], bbox_head=shared | own, train_cfg=assignment)
    if kind == INSTANCES:
        model["data_preprocessor"] = dict(model["data_preprocessor"], pad_mask=True)
        model["use_syncbn"] = False  # which is for GPUs alone
        model["test_cfg"] = dict(model["test_cfg"], mask_thr_binary=0.5)
    model["bbox_head"] |= head or {}
    return model


def _grid(strides: list[int], **settings: Any) -> dict[str, Any]:
    return dict(type="AnchorGenerator", octave_base_scale=4, strides=strides, **settings)


def _retinanet(strides: list[int]) -> tuple[dict[str, Any], dict[str, Any]]:
    assigner = dict(type="MaxIoUAssigner", pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0, ignore_iof_thr=-1)
    own = dict(
        type="RetinaHead",
        anchor_generator=_grid(strides, ratios=[0.5, 1.0, 2.0], scales_per_octave=3),
        bbox_coder=dict(_DELTAS, target_stds=[1.0] * 4),
        loss_cls=dict(_FOCAL),
        loss_bbox=dict(type="L1Loss", loss_weight=1.0),
    )
    return own, dict(assigner=assigner, sampler=dict(type="PseudoSampler"), **_ASSIGNED)


def _fcos(strides: list[int]) -> tuple[dict[str, Any], dict[str, Any]]:
    edges = [-1, *(stride * 4 for stride in strides[:-1]), 10**8]
    own = dict(
        type="FCOSHead",
        strides=strides,
        regress_ranges=list(pairwise(edges)),
        norm_cfg=dict(type="GN", num_groups=4, requires_grad=True),
        loss_cls=dict(_FOCAL),
        loss_bbox=dict(type="GIoULoss", loss_weight=1.0),
    )
    return own, {}


def _tood(strides: list[int]) -> tuple[dict[str, Any], dict[str, Any]]:
    own = dict(
        type="TOODHead",
        anchor_type="anchor_free",
        num_dcn=0,
        norm_cfg=dict(type="GN", num_groups=4, requires_grad=True),
        anchor_generator=_grid(strides, ratios=[1.0], scales_per_octave=1),
        bbox_coder=dict(_DELTAS),
        initial_loss_cls=dict(_FOCAL, activated=True),
        loss_cls=dict(_QUALITY, activated=True),
        loss_bbox=dict(type="GIoULoss", loss_weight=2.0),
    )
    assignment = dict(
        initial_epoch=4,
        initial_assigner=dict(type="ATSSAssigner", topk=9),
        assigner=dict(type="TaskAlignedAssigner", topk=13),
        alpha=1,
        beta=6,
        **_ASSIGNED,
    )
    return own, assignment


def _rtmdet(strides: list[int]) -> tuple[dict[str, Any], dict[str, Any]]:
    own = dict(
        type="RTMDetSepBNHead",
        anchor_generator=dict(type="MlvlPointGenerator", offset=0, strides=strides),
        bbox_coder=dict(type="DistancePointBBoxCoder"),
        loss_cls=dict(_QUALITY),
        loss_bbox=dict(type="GIoULoss", loss_weight=2.0),
        with_objectness=False,
        exp_on_reg=True,
        norm_cfg=dict(type="BN"),
        act_cfg=dict(type="SiLU", inplace=True),
    )
    return own, dict(assigner=dict(type="DynamicSoftLabelAssigner", topk=13), **_ASSIGNED)


def _rtmdet_ins(strides: list[int]) -> tuple[dict[str, Any], dict[str, Any]]:
    own, assignment = _rtmdet(strides)
    del own["exp_on_reg"]
    own |= dict(
        type="RTMDetInsSepBNHead",
        num_prototypes=4,
        dyconv_channels=4,
        loss_mask=dict(type="DiceLoss", loss_weight=2.0, eps=5e-6, reduction="mean"),
    )
    return own, assignment


def _yolox(strides: list[int]) -> tuple[dict[str, Any], dict[str, Any]]:
    own = dict(type="YOLOXHead", strides=tuple(strides))
    return own, dict(assigner=dict(type="SimOTAAssigner", center_radius=2.5))


_HEADS: dict[str, Callable[[list[int]], tuple[dict[str, Any], dict[str, Any]]]] = {
    "RetinaNet": _retinanet,
    "FCOS": _fcos,
    "TOOD": _tood,
    "RTMDet": _rtmdet,
    INSTANCES: _rtmdet_ins,
    "YOLOX": _yolox,
}
KINDS = ("GFL", "ATSS", *(kind for kind in _HEADS if kind != INSTANCES))
