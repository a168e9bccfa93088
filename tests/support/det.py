"""Small real detectors and data for the tests: GFL and ATSS on ResNet or PVT, scenes of digits, real Runners."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config, ConfigDict
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from torch import Tensor

import kdgraft_det  # noqa: F401  registers DistilledDetector
from kdgraft_bench.data.scenes import write_detection_set
from support.tensors import distillation, gradients

init_default_scope("mmdet")
CLASSES = tuple("0123456789")
STRIDES = (8, 16, 32)
EVERY_TERM: dict[str, Any] = dict(
    recipe="ld",
    terms=[
        dict(type="FeatureImitation", tap="neck[*]", region="foreground"),
        dict(type="FeatureImitation", tap="backbone.layer3", name="layer3"),
        dict(type="FeatureImitation", tap="bbox_head.cls_convs[0]", name="tower"),
        dict(type="SoftTargets"),
        dict(type="FocalGlobal"),
        dict(type="MaskedGeneration"),
        dict(type="FeatureImitation", tap="neck[0]", region="fine_grained", name="near"),
        dict(type="BoundedRegression", margin=1e6),
        dict(type="CrossHead"),
        dict(type="BCKD"),
    ],
)
"""Settings of a distilled detector with every kind of term."""
TERM_NAMES = (
    *("ld_main", "ld_vlr", "class_main", "feature_imitation", "layer3", "tower", "soft_targets"),
    *("focal_global", "masked_generation", "near", "bounded_regression", "cross_head", "bckd"),
)
_names = count()


def detector(
    kind: str = "GFL",
    *,
    width: int = 4,
    channels: int = 8,
    depth: int = 18,
    convs: int = 1,
    backbone: str = "ResNet",
    classes: int = 10,
    reg_max: int = 8,
    strides: tuple[int, ...] = STRIDES,
    frozen_bn: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """The ``model`` entry of a small detector: ``kind`` GFL or ATSS; ``backbone`` ResNet, PyramidVisionTransformer or SwinTransformer.

    ``frozen_bn`` keeps a ResNet's batch norms in eval mode, so that a batch's images do not see each other.
    """
    head: dict[str, Any] = dict(
        type=f"{kind}Head",
        num_classes=classes,
        in_channels=channels,
        feat_channels=channels,
        stacked_convs=convs,
        norm_cfg=dict(type="GN", num_groups=4, requires_grad=True),
        anchor_generator=dict(
            type="AnchorGenerator", ratios=[1.0], octave_base_scale=4, scales_per_octave=1, strides=list(strides)
        ),
        loss_bbox=dict(type="GIoULoss", loss_weight=2.0),
    )
    if kind == "GFL":
        head |= dict(
            reg_max=reg_max,
            loss_cls=dict(type="QualityFocalLoss", use_sigmoid=True, beta=2.0, loss_weight=1.0),
            loss_dfl=dict(type="DistributionFocalLoss", loss_weight=0.25),
        )
    else:
        head |= dict(
            bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=[0.1, 0.1, 0.2, 0.2]),
            loss_cls=dict(type="FocalLoss", use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
            loss_centerness=dict(type="CrossEntropyLoss", use_sigmoid=True, loss_weight=1.0),
        )
    trunk, widths = _BACKBONES[backbone](width, depth)
    if frozen_bn:
        trunk["norm_eval"] = True
    return dict(
        type=kind,
        data_preprocessor=dict(
            type="DetDataPreprocessor",
            mean=[123.675, 116.28, 103.53],
            std=[58.395, 57.12, 57.375],
            bgr_to_rgb=True,
            pad_size_divisor=32,
        ),
        backbone=trunk,
        neck=dict(
            type="FPN",
            in_channels=widths,
            out_channels=channels,
            start_level=1,
            add_extra_convs="on_output",
            num_outs=len(strides),
        ),
        bbox_head=head,
        train_cfg=dict(assigner=dict(type="ATSSAssigner", topk=9), allowed_border=-1, pos_weight=-1, debug=False),
        test_cfg=dict(
            nms_pre=100, min_bbox_size=0, score_thr=0.0, nms=dict(type="nms", iou_threshold=0.6), max_per_img=20
        ),
        **settings,
    )


def _resnet(width: int, depth: int) -> tuple[dict[str, Any], list[int]]:
    trunk = dict(
        type="ResNet",
        depth=depth,
        base_channels=width,
        stem_channels=width,
        num_stages=4,
        out_indices=(0, 1, 2, 3),
        frozen_stages=-1,
        norm_cfg=dict(type="BN", requires_grad=True),
        norm_eval=False,
        style="pytorch",
    )
    return trunk, [width * 2**i * (4 if depth >= 50 else 1) for i in range(4)]


def _pvt(width: int, depth: int) -> tuple[dict[str, Any], list[int]]:
    trunk = dict(
        type="PyramidVisionTransformer",
        embed_dims=width,
        num_layers=[1, 1, 1, 1],
        num_heads=[1, 2, 4, 8],
        mlp_ratios=[2, 2, 2, 2],
        init_cfg=None,
    )
    return trunk, [width, width * 2, width * 4, width * 8]


def _swin(width: int, depth: int) -> tuple[dict[str, Any], list[int]]:
    trunk = dict(
        type="SwinTransformer",
        embed_dims=width,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 4, 8],
        window_size=4,
        out_indices=(0, 1, 2, 3),
        init_cfg=None,
    )
    return trunk, [width * 2**i for i in range(4)]


_BACKBONES = {"ResNet": _resnet, "PyramidVisionTransformer": _pvt, "SwinTransformer": _swin}


def build(model: dict[str, Any], seed: int = 0) -> Any:
    """Builds and initialises a model under a seed."""
    torch.manual_seed(seed)
    built = MODELS.build(ConfigDict(copy.deepcopy(model)))
    built.init_weights()
    return built


def save_teacher(path: Path, model: dict[str, Any], seed: int = 7, classes: tuple[str, ...] | None = CLASSES) -> str:
    """Writes a checkpoint of a freshly initialised teacher, livelier than its initialisation (which predicts almost nothing)."""
    built = build(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            in_head = name.startswith(("bbox_head", "rpn_head", "roi_head", "panoptic_head"))
            if in_head and name.endswith("weight") and parameter.ndim > 1:
                parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    meta = {"dataset_meta": {"classes": classes}} if classes else {}
    torch.save({"state_dict": built.state_dict(), "meta": meta}, path)
    return str(path)


def saved_teachers(
    folder: Path, entry_of: Callable[[str], dict[str, Any]]
) -> Callable[[str], tuple[dict[str, Any], str]]:
    """A function that returns the ``model`` entry and the checkpoint of a kind's teacher, written once."""

    @cache
    def teacher(kind: str) -> tuple[dict[str, Any], str]:
        entry = entry_of(kind)
        return entry, save_teacher(folder / f"{kind}.pth", entry)

    return teacher


def save_plain(path: Path, model: Any, classes: Sequence[str] | None = CLASSES) -> str:
    """Writes a model's weights as a checkpoint that names its classes."""
    torch.save(
        {"state_dict": model.state_dict(), "meta": {"dataset_meta": {"classes": classes}} if classes else {}}, path
    )
    return str(path)


def distilled(
    student: dict[str, Any], teacher: dict[str, Any] | None, checkpoint: str, **settings: Any
) -> dict[str, Any]:
    """The ``model`` entry of a distilled detector: the student's own, with its type moved to ``student``."""
    model = copy.deepcopy(student)
    kind = model.pop("type")
    learning = dict(teacher=dict(config=teacher, checkpoint=checkpoint), **settings)
    return dict(model, type="DistilledDetector", student=kind, **copy.deepcopy(learning))


def scenes(root: Path) -> str:
    """A tiny set of digit scenes."""
    return str(write_detection_set(root, seed=5, train=16, val=4, test=4, size=96))


def runner_config(
    model: dict[str, Any], data: str, work_dir: Path, *, iters: int = 4, batch_size: int = 4, **settings: Any
) -> Config:
    """A Runner's config: batches from the scenes, SGD, deterministic, iteration-based."""

    def loader(split: str, batch: int) -> dict[str, Any]:
        return dict(
            batch_size=batch,
            num_workers=0,
            sampler=dict(type="DefaultSampler", shuffle=False),
            dataset=dict(
                type="CocoDataset",
                data_root=data,
                metainfo=dict(classes=CLASSES),
                ann_file=f"annotations/instances_{split}.json",
                data_prefix=dict(img=f"{split}/"),
                pipeline=[
                    dict(type="LoadImageFromFile"),
                    dict(type="LoadAnnotations", with_bbox=True),
                    dict(type="Resize", scale=(96, 96), keep_ratio=True),
                    dict(
                        type="PackDetInputs",
                        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
                    ),
                ],
            ),
        )

    evaluator = [dict(type="CocoMetric", ann_file=f"{data}/annotations/instances_{s}.json") for s in ("val", "test")]
    for entry in evaluator:
        entry["metric"] = "bbox"
        entry["classwise"] = False
    config: dict[str, Any] = dict(
        default_scope="mmdet",
        custom_imports=dict(imports=["kdgraft_det"]),
        model=copy.deepcopy(model),
        work_dir=str(work_dir),
        train_dataloader=loader("train", batch_size),
        val_dataloader=loader("val", 2),
        test_dataloader=loader("test", 2),
        val_evaluator=evaluator[0],
        test_evaluator=evaluator[1],
        train_cfg=dict(type="IterBasedTrainLoop", max_iters=iters, val_interval=iters + 1),
        val_cfg=dict(type="ValLoop"),
        test_cfg=dict(type="TestLoop"),
        optim_wrapper=dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=0.01, momentum=0.9)),
        default_hooks=dict(
            logger=dict(type="LoggerHook", interval=1),
            checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=2),
        ),
        log_processor=dict(by_epoch=False),
        log_level="WARNING",
        # mmengine names message hubs after this and the second: two Runners of one second must not share one.
        experiment_name=f"run{next(_names)}",
        randomness=dict(seed=3, deterministic=True),
        env_cfg=dict(cudnn_benchmark=False),
    )
    config.update(copy.deepcopy(settings))
    return Config(config)


BOXES = (
    [[8.0, 10.0, 44.0, 50.0]],
    [[20.0, 4.0, 90.0, 88.0], [50.0, 50.0, 80.0, 76.0]],
    [[30.0, 30.0, 62.0, 70.0], [2.0, 60.0, 30.0, 94.0], [60.0, 5.0, 92.0, 40.0]],
    [[12.0, 20.0, 60.0, 64.0]],
)
"""Boxes of four images of 96×96: 1, 2, 3 and 1 objects."""


def raw_batch(
    boxes: Sequence[Sequence[Sequence[float]]] = BOXES,
    sizes: Sequence[tuple[int, int]] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """What a data loader yields: uint8 images and their data samples; box i of an image has label i."""
    generator = torch.Generator().manual_seed(seed)
    inputs, data_samples = [], []
    for place, found in enumerate(boxes):
        height, width = sizes[place] if sizes is not None else (96, 96)
        inputs.append(torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator))
        meta = dict(img_id=place, img_shape=(height, width), ori_shape=(height, width), scale_factor=(1.0, 1.0))
        sample = DetDataSample(metainfo=meta)
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor(found, dtype=torch.float32).reshape(-1, 4), labels=torch.arange(len(found))
        )
        data_samples.append(sample)
    return dict(inputs=inputs, data_samples=data_samples)


def predictions(model: Any, batch: dict[str, Any]) -> list[Tensor]:
    """What a model predicts: per image ``(n, 6)`` of boxes, scores and labels."""
    model.eval()
    with torch.no_grad():
        data = model.data_preprocessor(copy.deepcopy(batch), False)
        found = [sample.pred_instances for sample in model(**data, mode="predict")]
    return [torch.cat([f.bboxes, f.scores[:, None], f.labels[:, None].float()], 1) for f in found]


def part(batch: dict[str, Any], images: slice) -> dict[str, Any]:
    """Some images of a raw batch."""
    return {key: values[images] for key, values in batch.items()}


def losses(model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    """One forward pass in training mode: every loss as one scalar, as the host sums it."""
    model.train()
    data = model.data_preprocessor(copy.deepcopy(batch), True)
    found = model(**data, mode="loss")
    return {key: sum(v.mean() for v in value) if isinstance(value, list) else value for key, value in found.items()}


def distillation_gradients(model: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
    """The gradient of the distillation losses alone, 0 for parameters that they do not reach."""
    model.zero_grad()
    found = losses(model, batch)
    (
        distillation(found) + 0 * sum(v for k, v in found.items() if "loss" in k and not k.startswith("distill."))
    ).backward()
    return gradients(model)


def momentum(runner: Runner) -> dict[str, Tensor]:
    """SGD's momentum by parameter name: what all gradients so far add up to."""
    state = runner.optim_wrapper.optimizer.state
    return {name: state[p]["momentum_buffer"] for name, p in runner.model.named_parameters() if p in state}


class Given:
    """A recording of the student that answers with what it was given."""

    model = "student"

    class_order = None
    scale = 1.0
    training = False

    def __init__(self, values: dict[Any, Any], model: str = "student") -> None:
        self.values, self.model = values, model

    def __getitem__(self, tap: Any) -> Any:
        return self.values[tap]

    def tensors(self, tap: Any) -> list[Tensor]:
        """The tensors of a tap."""
        return self.values[tap]
