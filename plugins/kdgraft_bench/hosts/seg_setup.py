"""Small segmentors, their data and their schedules: scenes of digits with masks, or a real set of the user's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.image import imread
from mmengine.config import Config
from mmseg.apis import inference_model

from kdgraft.errors import DistillError

from ..data import check_layout
from ..data.scenes import SEGMENTATION_CLASSES
from ..pictures import draw_grid
from .mm_setup import TWO_SPLITS, RunnerSetup, resnet18

SIZE = 96
DATA = dict(seed=0, train=400, val=150, test=400)
ITERATIONS = 1000
BATCH = 16
LR = 1e-2
BACKGROUND = 0.3
"""The weight of the scenes' background, nine tenths of their pixels, in the host's own loss."""
REAL_ITERATIONS = 600
REAL_BATCH = 8


def segmentor(width: int, channels: int, classes: int, background: float | None = None) -> dict[str, Any]:
    """Return the ``model`` entry of a Semantic FPN on a ResNet-18, which predicts at stride 4.

    Args:
        width: the number of channels of the backbone's first stage.
        channels: the number of channels of pyramid and head.
        classes: the number of classes.
        background: the weight of class 0 in the host's own loss, where the other classes have weight 1; by default 1 too.
    """
    return dict(
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
        backbone=resnet18("ResNetV1c", width, contract_dilation=True),
        neck=dict(type="FPN", in_channels=[width * 2**i for i in range(4)], out_channels=channels, num_outs=4),
        decode_head=dict(
            type="FPNHead",
            in_channels=[channels] * 4,
            in_index=[0, 1, 2, 3],
            feature_strides=[4, 8, 16, 32],
            channels=channels,
            num_classes=classes,
            dropout_ratio=0.0,
            norm_cfg=dict(type="BN", requires_grad=True),
            align_corners=False,
            loss_decode=dict(
                type="CrossEntropyLoss",
                class_weight=None if background is None else [background] + [1.0] * (classes - 1),
            ),
        ),
        train_cfg=dict(),
        test_cfg=dict(mode="whole"),
    )


@dataclass(frozen=True, kw_only=True)
class SegmentationSetup(RunnerSetup):
    """Training and tests of segmentors on a data set.

    Attributes:
        pictures, masks: the folders of the data set's pictures and masks, each with a folder for each split.
        size: (height, width) of the pictures.
        suffix: the suffix of the pictures; masks are PNGs.
        crop: (height, width) of the crops in training.
        padding: the class of the padding of a picture that is smaller than the crop.
    """

    scope: ClassVar[str] = "mmseg"
    tested_at_once: int = 1
    pictures: str
    masks: str
    size: tuple[int, int]
    suffix: str
    crop: tuple[int, int]
    padding: int = 255

    def prepared(self, model: dict[str, Any]) -> dict[str, Any]:
        """Return a model whose data preprocessor pads to the crop of training."""
        padding = dict(size=self.crop, size_divisor=None, seg_pad_val=self.padding)
        return {**model, "data_preprocessor": {**model["data_preprocessor"], **padding}}

    def images(self, data: Path, part: str, *, train: bool) -> dict[str, Any]:
        """Return the ``BaseSegDataset`` of a split. The data preprocessor pads pictures that are smaller than the crop."""
        augmentation: list[dict[str, Any]] = [
            dict(type="RandomResize", scale=self.size[::-1], ratio_range=(0.8, 1.25), keep_ratio=True),
            dict(type="RandomCrop", crop_size=self.crop),
        ]
        return dict(
            type="BaseSegDataset",
            data_root=str(data),
            data_prefix=dict(img_path=f"{self.pictures}/{part}", seg_map_path=f"{self.masks}/{part}"),
            img_suffix=self.suffix,
            seg_map_suffix=".png",
            metainfo=dict(classes=self.classes),
            reduce_zero_label=False,
            test_mode=not train,
            pipeline=[
                dict(type="LoadImageFromFile"),
                dict(type="LoadAnnotations"),
                *(augmentation if train else ()),
                dict(type="PackSegInputs"),
            ],
        )

    def evaluator(self, data: Path, part: str) -> dict[str, Any]:
        return dict(type="IoUMetric", iou_metrics=["mIoU"])

    def config(self, model: dict[str, Any], data: Path, steps: int, split: str = "test") -> Config:
        """Return the Runner's config, with the pipeline of the host's inference."""
        config = super().config(model, data, steps, split)
        config.test_pipeline = config.test_dataloader.dataset.pipeline
        return config


def draw_masks(models: Mapping[str, Any], dataset: Any, samples: Sequence[int], path: Path) -> None:
    """Draw image, ground truth and every model's mask, with a row for each picture; ignored pixels are grey.

    Args:
        models: the models by their titles, with the configs that the host's inference reads.
        dataset: the tested set.
        samples: the places of the pictures.
        path: the file.
    """
    classes = len(dataset.metainfo["classes"])
    palette: Any = colormaps["tab20"](np.arange(max(classes - 1, 1)) % 20)
    colours = np.full((256, 3), 128, np.uint8)
    colours[:classes] = np.concatenate([[[30, 30, 30]], palette[:, :3] * 255])[:classes].astype(np.uint8)
    rows = []
    for index in samples:
        file = dataset.get_data_info(index)["img_path"]
        # The host reads the mask, which may have any PNG mode.
        labels = dataset[index]["data_samples"].gt_sem_seg.data[0].numpy().astype(np.uint8)
        rows.append([imread(file), colours[labels]])
        for model in models.values():
            rows[-1].append(colours[inference_model(model, file).pred_sem_seg.data[0].cpu().numpy()])
    height, width = rows[0][0].shape[:2]

    def draw(axis: Axes, picture: Any) -> None:
        axis.imshow(picture, interpolation="nearest")

    draw_grid(["image", "ground truth", *models], rows, draw, height / width, path)


def scenes() -> SegmentationSetup:
    """Return the setup of the digit scenes."""
    return SegmentationSetup(
        iterations=ITERATIONS,
        classes=SEGMENTATION_CLASSES,
        size=(SIZE, SIZE),
        crop=(SIZE, SIZE),
        batch_size=BATCH,
        lr=LR,
        pictures="images",
        masks="masks",
        suffix=".png",
        padding=0,  # background, as upstream mmseg cannot both weight classes and ignore pixels
    )


def own_set(root: Path) -> SegmentationSetup:
    """Return the setup of a real set in MMSegmentation's layout.

    Args:
        root: a folder with ``img_dir/{train,val}``, ``ann_dir/{train,val}`` (255 is ignored) and ``classes.json``.

    Raises:
        DistillError: a part of the set is missing or cannot be read.
    """
    parts = ("classes.json", "img_dir/train", "img_dir/val", "ann_dir/train", "ann_dir/val")
    check_layout(root, parts, "img_dir/{train,val}, ann_dir/{train,val} and classes.json")
    try:
        classes = tuple(str(name) for name in json.loads((root / "classes.json").read_text())["classes"])
    except (ValueError, KeyError, TypeError) as error:
        raise DistillError(f'--data {root}: classes.json must hold {{"classes": [names]}} ({error})') from None
    pictures = sorted((root / "img_dir/train").iterdir())
    if not pictures:
        raise DistillError(f"--data {root}: img_dir/train is empty")
    picture = cv2.imread(str(pictures[0]))
    if picture is None:
        raise DistillError(f"--data {root}: cannot read {pictures[0]}")
    height, width = picture.shape[:2]
    return SegmentationSetup(
        iterations=REAL_ITERATIONS,
        classes=classes,
        splits=TWO_SPLITS,
        size=(height, width),
        crop=(max(int(height * 0.8) // 32 * 32, 32), max(int(width * 0.8) // 32 * 32, 32)),
        batch_size=REAL_BATCH,
        lr=LR,
        pictures="img_dir",
        masks="ann_dir",
        suffix=pictures[0].suffix,
    )
