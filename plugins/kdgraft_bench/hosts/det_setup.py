"""Small detectors, their data and their schedules: scenes of digits, or a real set of the user's.

The schedule of real sets was chosen on BCCD's val split with seed 100, with teacher and plain student only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.image import imread
from matplotlib.patches import Rectangle
from mmdet.apis import inference_detector

from kdgraft.errors import DistillError

from ..data.coco import RealSet
from ..data.scenes import CLASSES, write_detection_set
from ..pictures import draw_grid
from .mm_setup import TWO_SPLITS, RunnerSetup, resnet18

SIZE = 96
MOST = 3000
"""The training scenes that are written."""
DATA = dict(seed=0, train=MOST, val=150, test=400)
SCENES = 400
"""The training scenes of a model that says no other number; a larger number of scenes contains a smaller one."""
ITERATIONS = 1500
BATCH = 8
LR = 1e-2
REAL_SIZE = (320, 240)
REAL_ITERATIONS = 400
REAL_BATCH = 8
CHANNELS = 48


def detector(width: int, channels: int, classes: int) -> dict[str, Any]:
    """Return the ``model`` entry of a small GFL: ResNet-18 of ``width`` base channels, FPN and head of ``channels``."""
    return dict(
        type="GFL",
        data_preprocessor=dict(
            type="DetDataPreprocessor", mean=[123.675] * 3, std=[58.395] * 3, bgr_to_rgb=True, pad_size_divisor=32
        ),
        backbone=resnet18("ResNet", width, frozen_stages=-1),
        neck=dict(
            type="FPN",
            in_channels=[width, 2 * width, 4 * width, 8 * width],
            out_channels=channels,
            start_level=1,
            num_outs=3,
            norm_cfg=dict(type="BN"),
        ),
        bbox_head=dict(
            type="GFLHead",
            num_classes=classes,
            in_channels=channels,
            feat_channels=channels,
            stacked_convs=2,
            norm_cfg=dict(type="GN", num_groups=8, requires_grad=True),
            anchor_generator=dict(
                type="AnchorGenerator", ratios=[1.0], octave_base_scale=4, scales_per_octave=1, strides=[8, 16, 32]
            ),
            loss_cls=dict(type="QualityFocalLoss", use_sigmoid=True, beta=2.0, loss_weight=1.0),
            loss_dfl=dict(type="DistributionFocalLoss", loss_weight=0.25),
            reg_max=8,
            loss_bbox=dict(type="GIoULoss", loss_weight=2.0),
        ),
        train_cfg=dict(assigner=dict(type="ATSSAssigner", topk=9), allowed_border=-1, pos_weight=-1, debug=False),
        test_cfg=dict(
            nms_pre=300, min_bbox_size=0, score_thr=0.05, nms=dict(type="nms", iou_threshold=0.6), max_per_img=50
        ),
    )


@dataclass(frozen=True, kw_only=True)
class DetectionSetup(RunnerSetup):
    """Training and tests of detectors on a data set in COCO's format.

    Attributes:
        scale: (width, height) to which pictures are resized with their aspect ratio.
        augmentation: additional steps of the training pipeline.
        count: the pictures of the training set, its first ones; ``None`` for all.
    """

    scope: ClassVar[str] = "mmdet"
    count: int | None = None
    tested_at_once: int = 25
    scale: tuple[int, int]
    augmentation: tuple[dict[str, Any], ...]

    def images(self, data: Path, part: str, *, train: bool) -> dict[str, Any]:
        """Return the ``CocoDataset`` of a split."""
        meta = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
        return dict(
            type="CocoDataset",
            data_root=str(data),
            metainfo=dict(classes=self.classes),
            ann_file=f"annotations/instances_{part}.json",
            data_prefix=dict(img=f"{part}/"),
            filter_cfg=dict(filter_empty_gt=False),
            indices=self.count if train else None,
            test_mode=not train,
            pipeline=[
                dict(type="LoadImageFromFile"),
                dict(type="LoadAnnotations", with_bbox=True),
                dict(type="Resize", scale=self.scale, keep_ratio=True),
                *(self.augmentation if train else ()),
                dict(type="PackDetInputs", meta_keys=meta),
            ],
        )

    def evaluator(self, data: Path, part: str) -> dict[str, Any]:
        return dict(type="CocoMetric", ann_file=f"{data}/annotations/instances_{part}.json", metric="bbox")


def draw_detections(
    models: Mapping[str, Any], dataset: Any, samples: Sequence[int], path: Path, threshold: float = 0.3
) -> None:
    """Draw ground truth and every model's detections, with a row for each picture.

    Args:
        models: the models by their titles, with the configs that the host's inference reads.
        dataset: the tested set.
        samples: the places of the pictures.
        path: the file.
        threshold: the score above which detections are drawn.
    """
    rows = []
    for row in samples:
        info = dataset.get_data_info(row)
        image = imread(info["img_path"])
        found = [[(i["bbox"], i["bbox_label"], None) for i in info["instances"]]]
        for model in models.values():
            predicted = inference_detector(model, info["img_path"]).pred_instances.cpu().numpy()
            kept = predicted[predicted.scores > threshold]
            found.append(list(zip(kept.bboxes, kept.labels, kept.scores, strict=True)))
        rows.append([(image, boxes) for boxes in found])

    def draw(axis: Axes, cell: tuple[Any, list[Any]]) -> None:
        axis.imshow(cell[0])
        for (x1, y1, x2, y2), label, score in cell[1]:
            colour = colormaps["tab10"](int(label))
            axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=colour, linewidth=1.2))
            text = dataset.metainfo["classes"][int(label)] + ("" if score is None else f" {score:.2f}")
            box = dict(facecolor=colour, pad=0.6, lw=0)
            axis.text(x1, y1, text, fontsize=5.5, color="white", va="bottom", bbox=box, clip_on=True)

    height, width = rows[0][0][0].shape[:2]
    draw_grid(["ground truth", *models], rows, draw, height / width, path)


def scenes(count: int = SCENES) -> DetectionSetup:
    """Return the setup of the digit scenes, of which so many train.

    Raises:
        DistillError: there are not so many.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MOST:
        raise DistillError(f"scenes must be a whole number from 1 to {MOST}, got {count!r}")
    return DetectionSetup(
        count=count,
        iterations=ITERATIONS,
        classes=CLASSES,
        scale=(SIZE, SIZE),
        batch_size=BATCH,
        lr=LR,
        augmentation=(dict(type="RandomShift", prob=0.7, max_shift_px=8),),
    )


def own_set(real: RealSet) -> DetectionSetup:
    """Return the setup of a real set: small pictures, and flips in all directions."""
    return DetectionSetup(
        iterations=REAL_ITERATIONS,
        evaluations=2,
        classes=real.classes,
        splits=TWO_SPLITS,
        scale=REAL_SIZE,
        batch_size=REAL_BATCH,
        lr=LR,
        augmentation=(dict(type="RandomFlip", prob=0.75, direction=["horizontal", "vertical", "diagonal"]),),
    )


def with_schedule_of_queries(setup: DetectionSetup) -> DetectionSetup:
    """Return a setup for detectors whose predictions are queries."""
    return replace(setup, iterations=1000, batch_size=8, lr=1e-3)


def write_data(folder: Path) -> Path:
    """Write the scenes to a folder, unless they are there; return it."""
    return write_detection_set(folder, size=SIZE, **DATA)


def plan_config(data: str | Path) -> dict[str, Any]:
    """Return the Runner's config of the plain student on the scenes, for plans, which set its sizes and its length by options.

    The learning rate's schedule follows ``train_cfg.max_iters``.

    Args:
        data: the folder of the scenes.
    """
    config = scenes().config(detector(6, CHANNELS, len(CLASSES)), Path(data), ITERATIONS).to_dict()
    for entry in ("begin", "end", "T_max"):  # by default the whole training; the warm-up is a factor beside it
        del config["param_scheduler"][1][entry]
    config["train_cfg"]["val_interval"] = ITERATIONS
    return config
