"""Small real segmentors and data for the tests: seven families of MMSegmentation, scenes of digits, real Runners."""

from __future__ import annotations

import copy
from itertools import count
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import MessageHub
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor

import kdgraft_seg  # noqa: F401  registers DistilledSegmentor
from kdgraft_bench.data.scenes import SEGMENTATION_CLASSES, write_segmentation_set
from support.tensors import distillation

CLASSES = SEGMENTATION_CLASSES
FAMILIES = ("FCN", "PSPNet", "DeepLabV3", "DeepLabV3+", "UPerNet", "SegFormer", "BiSeNetV2")
SMALL_CRITIC: dict[str, Any] = dict(channels=(8, 16), attention=1)
EVERY_TERM: dict[str, Any] = dict(
    recipe=dict(type="skd", critic=dict(critic=SMALL_CRITIC)),
    terms=[
        dict(type="ChannelWise", weight=3.0),
        dict(type="ChannelWise", tap="backbone[2]", name="channel_wise_features"),
        dict(type="DIST"),
        dict(type="ClassPrototypes", weight=200.0),
        dict(type="CrossImageRelations", nodes=64, anchors=64, contrast=64, pixels_per_class=32, regions_per_class=16),
        dict(type="FeatureImitation", tap="backbone[3]"),
        dict(type="PearsonImitation", tap="backbone[2]"),
        dict(type="MaskedGeneration"),
    ],
)
"""Settings of a distilled segmentor with every kind of term."""
TERM_NAMES = (
    "soft_targets",
    "pairwise_affinity",
    "adversarial_mask",
    "channel_wise",
    "channel_wise_features",
    "dist",
    "class_prototypes",
    "cross_image_relations",
    "feature_imitation",
    "pearson_imitation",
    "masked_generation",
)
_names = count()


def segmentor(
    family: str = "FCN",
    *,
    width: int = 4,
    classes: int = 11,
    frozen_bn: bool = False,
    dropout: float = 0.1,
    **settings: Any,
) -> dict[str, Any]:
    """The ``model`` entry of a small segmentor of one of :data:`FAMILIES`, at strides 4 to 8.

    ``frozen_bn`` keeps a ResNet's batch norms in eval mode (the heads have none then), so that images do not see each other.
    """
    norm: dict[str, Any] | None = dict(type="BN", requires_grad=True)
    head_norm = None if frozen_bn else norm
    common: dict[str, Any] = dict(
        num_classes=classes, dropout_ratio=dropout, norm_cfg=head_norm, align_corners=False, channels=4 * width
    )
    if family in ("FCN", "PSPNet", "DeepLabV3", "DeepLabV3+"):
        backbone: dict[str, Any] = dict(
            type="ResNetV1c",
            depth=18,
            base_channels=width,
            stem_channels=width,
            num_stages=4,
            out_indices=(0, 1, 2, 3),
            dilations=(1, 1, 2, 4),
            strides=(1, 2, 1, 1),
            norm_cfg=norm,
            norm_eval=frozen_bn,
            style="pytorch",
            contract_dilation=True,
        )
        common |= dict(in_channels=8 * width, in_index=3)
        head = {
            "FCN": dict(type="FCNHead", num_convs=1, concat_input=False),
            "PSPNet": dict(type="PSPHead", pool_scales=(1, 2)),
            "DeepLabV3": dict(type="ASPPHead", dilations=(1, 2)),
            "DeepLabV3+": dict(
                type="DepthwiseSeparableASPPHead", dilations=(1, 2), c1_in_channels=width, c1_channels=width
            ),
        }[family]
        auxiliary: Any = dict(
            type="FCNHead",
            in_channels=4 * width,
            in_index=2,
            channels=width,
            num_convs=1,
            concat_input=False,
            num_classes=classes,
            dropout_ratio=dropout,
            norm_cfg=head_norm,
            align_corners=False,
            loss_decode=dict(type="CrossEntropyLoss", loss_weight=0.4),
        )
    elif family == "UPerNet":
        backbone = dict(
            type="SwinTransformer",
            embed_dims=4 * width,
            depths=[1, 1, 1, 1],
            num_heads=[1, 2, 4, 8],
            window_size=4,
            drop_path_rate=0.0,
        )
        head = dict(
            type="UPerHead", in_channels=[4 * width * 2**i for i in range(4)], in_index=[0, 1, 2, 3], pool_scales=(1, 2)
        )
        auxiliary = None
    elif family == "SegFormer":
        backbone = dict(
            type="MixVisionTransformer",
            embed_dims=2 * width,
            num_layers=[1, 1, 1, 1],
            num_heads=[1, 2, 4, 8],
            drop_path_rate=0.0,
        )
        head = dict(type="SegformerHead", in_channels=[2 * width * n for n in (1, 2, 4, 8)], in_index=[0, 1, 2, 3])
        auxiliary = None
    else:
        backbone = dict(
            type="BiSeNetV2",
            detail_channels=(2 * width, 2 * width, 4 * width),
            semantic_channels=(width, width, 2 * width, 4 * width),
            semantic_expansion_ratio=2,
            bga_channels=4 * width,
            out_indices=(0, 1, 2, 3, 4),
            norm_cfg=norm,
        )
        head = dict(type="FCNHead", in_channels=4 * width, in_index=0, num_convs=1, concat_input=False)
        auxiliary = [
            dict(
                type="FCNHead",
                in_channels=width,
                in_index=1,
                channels=width,
                num_convs=1,
                concat_input=False,
                num_classes=classes,
                dropout_ratio=dropout,
                norm_cfg=norm,
                align_corners=False,
                loss_decode=dict(type="CrossEntropyLoss", loss_weight=0.4),
            )
        ]
    model = dict(
        type="EncoderDecoder",
        data_preprocessor=dict(
            type="SegDataPreProcessor",
            mean=[123.675, 116.28, 103.53],
            std=[58.395, 57.12, 57.375],
            bgr_to_rgb=True,
            pad_val=0,
            seg_pad_val=255,
            size_divisor=32,
            test_cfg=dict(size_divisor=32),
        ),
        backbone=backbone,
        decode_head={**common, **head, "loss_decode": dict(type="CrossEntropyLoss", loss_weight=1.0)},
        train_cfg=dict(),
        test_cfg=dict(mode="whole"),
        **settings,
    )
    return model if auxiliary is None else dict(model, auxiliary_head=auxiliary)


def enter_host() -> None:
    """A scope and a message hub of mmseg's own, as a new Runner makes them: an earlier one's may know other classes."""
    name = f"seg_support_{next(_names)}"
    DefaultScope.get_instance(name, scope_name="mmseg")
    MessageHub.get_instance(name)


def build(model: dict[str, Any], seed: int = 0) -> Any:
    """Builds a model and initialises it from a seed, as a Runner would."""
    enter_host()
    torch.manual_seed(seed)
    built = MODELS.build(ConfigDict(copy.deepcopy(model)))
    built.init_weights()
    return built


def save_teacher(
    path: Path, model: dict[str, Any] | None = None, seed: int = 1, classes: Any = CLASSES
) -> dict[str, Any]:
    """Writes a teacher's checkpoint with random weights; returns the ``teacher`` entry of a config."""
    model = model if model is not None else segmentor("PSPNet", width=8)
    built = build(model, seed)
    meta = {} if classes is None else {"dataset_meta": {"classes": classes}}
    torch.save({"state_dict": built.state_dict(), "meta": meta}, path)
    return dict(config=copy.deepcopy(model), checkpoint=str(path))


def distilled(student: dict[str, Any], teacher: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """The ``model`` entry of a distilled student."""
    student = copy.deepcopy(student)
    kind = student.pop("type")
    return dict(
        student, type="DistilledSegmentor", student=kind, teacher=copy.deepcopy(teacher), **copy.deepcopy(settings)
    )


def batch(
    images: int = 2,
    size: int = 64,
    seed: int = 0,
    *,
    classes: int = 11,
    content: tuple[int, int] | None = None,
    ignored: float = 0.1,
) -> tuple[Tensor, list[SegDataSample]]:
    """A preprocessed batch: noise, with labels in blocks of 8 pixels; ``content`` (height, width) is what is not padding."""
    generator = torch.Generator().manual_seed(seed)
    height, width = content or (size, size)
    inputs = torch.zeros(images, 3, size, size)
    inputs[:, :, :height, :width] = torch.randn(images, 3, height, width, generator=generator)
    blocks = torch.randint(classes, (images, 1, size // 8, size // 8), generator=generator)
    blocks[torch.rand(blocks.shape, generator=generator) < ignored] = 255
    labels = blocks.repeat_interleave(8, 2).repeat_interleave(8, 3)
    labels[:, :, height:] = 255
    labels[:, :, :, width:] = 255
    samples = []
    for label in labels:
        meta = dict(img_shape=(height, width), ori_shape=(height, width), pad_shape=(size, size))
        sample = SegDataSample(metainfo=meta)
        sample.gt_sem_seg = PixelData(data=label)
        samples.append(sample)
    return inputs, samples


def losses_of(model: Any, inputs: Tensor, samples: list[SegDataSample], *, seed: int = 0) -> dict[str, Tensor]:
    """One training forward on a batch, dropout drawn from a seed."""
    torch.manual_seed(seed)
    model.train()
    return model.loss(inputs.clone(), samples)


def total(losses: dict[str, Any]) -> Tensor:
    """What the host minimises: every entry that is called a loss."""
    return torch.stack([value for name, value in losses.items() if "loss" in name]).sum()


def played(
    model: Any, student: Tensor, teacher: Tensor, samples: list[SegDataSample], *, tap: str = "logits"
) -> tuple[dict[str, Any], Tensor]:
    """One step of a distilled model whose decode heads yield what a test chose; the losses and the distillation's gradient.

    Args:
        student, teacher: class scores ``(B, C, H, W)``, or with ``tap="features"`` what the classifiers are given.
    """
    student = student.clone().requires_grad_()
    heads = (model.decode_head, model.distiller.teacher.model.decode_head)
    for head, maps in zip(heads, (student, teacher), strict=True):
        head.forward = (
            (lambda inputs, maps=maps: maps) if tap == "logits" else (lambda inputs, h=head, m=maps: h.cls_seg(m))
        )
    try:
        height, width = samples[0].gt_sem_seg.data.shape[-2:]
        losses = losses_of(model, torch.zeros(len(samples), 3, height, width), samples)
    finally:
        for head in heads:
            del head.forward
    (gradient,) = torch.autograd.grad(distillation(losses), student)
    return losses, gradient


def scenes(root: Path, train: int = 12, val: int = 4) -> Path:
    """A small set of scenes."""
    return write_segmentation_set(root, seed=0, train=train, val=val, test=4)


def config(model: dict[str, Any], data: Path, work_dir: Path, iterations: int = 4, **overrides: Any) -> Config:
    """The Runner's config of a short, deterministic training."""

    def loader(split: str, batch_size: int) -> dict[str, Any]:
        return dict(
            batch_size=batch_size,
            num_workers=0,
            sampler=dict(type="InfiniteSampler" if split == "train" else "DefaultSampler", shuffle=False),
            dataset=dict(
                type="BaseSegDataset",
                data_root=str(data),
                data_prefix=dict(img_path=f"images/{split}", seg_map_path=f"masks/{split}"),
                img_suffix=".png",
                seg_map_suffix=".png",
                metainfo=dict(classes=CLASSES),
                reduce_zero_label=False,
                pipeline=[
                    dict(type="LoadImageFromFile"),
                    dict(type="LoadAnnotations"),
                    dict(type="PackSegInputs"),
                ],
            ),
        )

    return Config(
        dict(
            default_scope="mmseg",
            model=copy.deepcopy(model),
            work_dir=str(work_dir),
            experiment_name=f"seg_test_{next(_names)}",
            train_dataloader=loader("train", 2),
            val_dataloader=loader("val", 1),
            test_dataloader=loader("val", 1),
            val_evaluator=dict(type="IoUMetric", iou_metrics=["mIoU"]),
            test_evaluator=dict(type="IoUMetric", iou_metrics=["mIoU"]),
            train_cfg=dict(type="IterBasedTrainLoop", max_iters=iterations, val_interval=iterations),
            val_cfg=dict(type="ValLoop"),
            test_cfg=dict(type="TestLoop"),
            optim_wrapper=dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-3)),
            default_hooks=dict(
                checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=max(iterations // 2, 1))
            ),
            log_level="ERROR",
            randomness=dict(seed=0, deterministic=True),
            env_cfg=dict(cudnn_benchmark=False, mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0)),
            **overrides,
        )
    )
