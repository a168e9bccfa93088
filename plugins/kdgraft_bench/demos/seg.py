"""``kdgraft demo seg``: the gain of distillation, on data that every machine can make, or on a real set of your own.

A teacher, a plain student and a distilled student for each recipe are trained on the detection demo's scenes, here with masks, with
the same training set, the same schedule and the host's own Runner. The weights of terms were tuned on the validation scenes with
other seeds; the table is of the test scenes. ``--data DIR`` takes a real set in MMSegmentation's layout.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.image import imread
from mmengine.config import Config
from mmseg.apis import inference_model
from mmseg.registry import DATASETS

import kdgraft_seg  # noqa: F401  registers DistilledSegmentor
from kdgraft.errors import DistillError

from ..comparison import TWO_SPLITS, Outcome, Training, run
from ..data import check_layout
from ..data.scenes import SEGMENTATION_CLASSES, write_segmentation_set
from ..pictures import draw_grid
from ..results import Result
from .mm import RunnerComparison, resnet18

SIZE = 96
DATA = dict(seed=0, train=400, val=150, test=400)
ITERATIONS = 1000
BATCH = 16
LR = 1e-2
BACKGROUND = 0.3
"""The weight of the scenes' background, nine tenths of their pixels, in the host's own loss."""
REAL_ITERATIONS = 600
REAL_BATCH = 8
# Scenes of 96 pixels have small masks and few pixels, for which a small critic and small memories suffice.
_CRITIC = dict(critic=dict(channels=(32, 64, 128), attention=1))
_RELATIONS = dict(nodes=64, anchors=512, contrast=1024, pixels_per_class=500, regions_per_class=200)
RECIPES: dict[str, dict[str, Any]] = {
    "cwd": dict(recipe="cwd"),
    "skd": dict(recipe=dict(type="skd", critic=_CRITIC)),
    # skd without its critic, and without its pair-wise term as well.
    "pixel_pair": dict(recipe=dict(type="skd", adversarial=0.0)),
    "pixel": dict(recipe=dict(type="skd", pair=0.0, adversarial=0.0)),
    "ifvd": dict(recipe=dict(type="ifvd", critic=_CRITIC)),
    "cirkd": dict(recipe=dict(type="cirkd", relations=_RELATIONS)),
}
DEFAULT = ("cwd",)
SCORES = {"mIoU": ("mIoU", 3), "mAcc": ("mAcc", 3)}
EVALUATIONS = 6
ROUNDS = 20


def segmentor(width: int, channels: int, classes: int, background: float | None = None) -> tuple[str, dict[str, Any]]:
    """Return name and ``model`` entry of a Semantic FPN on a ResNet-18, which predicts at stride 4.

    Args:
        width: the number of channels of the backbone's first stage.
        channels: the number of channels of pyramid and head.
        classes: the number of classes.
        background: the weight of class 0 in the host's own loss, where the other classes have weight 1; by default 1 too.
    """
    return f"FPN-R18, width {width}", dict(
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
class Segmentation(RunnerComparison):
    """A comparison of segmentors.

    Attributes:
        pictures, masks: the folders of the dataset's pictures and masks, each with a folder for each split.
        suffix: the suffix of the pictures; masks are PNGs.
        crop: (height, width) of the crops in training.
        padding: the class of the padding of a picture that is smaller than the crop.
    """

    task: str = "seg"
    scope: str = "mmseg"
    kind: str = "DistilledSegmentor"
    scores: Mapping[str, tuple[str, int]] = field(default_factory=lambda: SCORES)
    recipes: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: RECIPES)
    default: tuple[str, ...] = DEFAULT
    tested_at_once: int = 1
    picture: str = "masks.png"
    pictures: str
    masks: str
    suffix: str
    crop: tuple[int, int]
    padding: int = 255

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

    def config(self, training: Training) -> Config:
        """Return the Runner's config, with the crop of training and the pipeline of the host's inference."""
        config = super().config(training)
        config.model.data_preprocessor.update(size=self.crop, size_divisor=None, seg_pad_val=self.padding)
        config.test_pipeline = config.test_dataloader.dataset.pipeline
        return config

    def draw(self, outcomes: Sequence[Outcome], path: Path, scenes: int = 5) -> None:
        """Draw image, ground truth and every model's mask on test pictures from the first to the last."""
        dataset = DATASETS.build(outcomes[0].run.cfg.test_dataloader.dataset)
        for outcome in outcomes:
            outcome.run.model.cfg = outcome.run.cfg
        places = np.linspace(0, len(dataset) - 1, scenes).astype(int).tolist()
        draw_masks({one.method: one.run.model for one in outcomes}, dataset, places, path)


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


def scenes() -> Segmentation:
    """Return the comparison on the digit scenes."""
    return Segmentation(
        dataset="digit scenes",
        teacher=segmentor(16, 48, len(SEGMENTATION_CLASSES), BACKGROUND),
        student=segmentor(8, 24, len(SEGMENTATION_CLASSES), BACKGROUND),
        iterations=ITERATIONS,
        evaluations=EVALUATIONS,
        rounds=ROUNDS,
        tested="test scenes",
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


def own_set(root: Path) -> Segmentation:
    """Return the comparison on a real set in MMSegmentation's layout.

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
    return Segmentation(
        dataset=root.name,
        teacher=segmentor(16, 48, len(classes)),
        student=segmentor(8, 24, len(classes)),
        iterations=REAL_ITERATIONS,
        evaluations=EVALUATIONS,
        rounds=ROUNDS,
        tested="val split",
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


def main(out: str = "runs/demo/seg", data: str | None = None, **settings: Any) -> list[Result]:
    """Train everything, print the table and write the files to ``out``.

    Args:
        out: the folder of the results.
        data: the folder of a real set (see :func:`own_set`), to use instead of the scenes.
        **settings: see :func:`kdgraft_bench.comparison.run`.
    """
    if data is None:
        return run([scenes()], lambda folder: write_segmentation_set(folder, size=SIZE, **DATA), out, **settings)
    root = Path(data)
    return run([own_set(root)], lambda _: root, out, **settings)
