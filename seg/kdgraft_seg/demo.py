"""``kdgraft demo seg``: does distilling pay, on data that every machine can make, and on a real set of your own?

The scenes of handwritten digits that the detection demo has, here with masks: a teacher, a plain student and a distilled student
for each recipe, the same training set, the same schedule, the host's own Runner. Weights of terms were tuned on the validation
scenes with other seeds; the table is of the test scenes. ``--data DIR`` takes a real set in MMSegmentation's layout.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.config import Config

from kdgraft.errors import DistillError
from kdgraft.report import Result
from kdgraft_mm.demo import Demo, Trained, run, schedule
from kdgraft_mm.scenes import SEGMENTATION_CLASSES, write_segmentation_set

SIZE = 96
DATA = dict(seed=0, train=400, val=150, test=400)
ITERATIONS = 1000
LR = 1e-2
REAL_ITERATIONS = 600
REAL_BATCH = 8
# Scenes of 96 pixels have small masks and few pixels: a small critic and small memories.
_CRITIC = dict(critic=dict(channels=(32, 64, 128), attention=1))
_RELATIONS = dict(nodes=64, anchors=512, contrast=1024, pixels_per_class=500, regions_per_class=200)
RECIPES: dict[str, dict[str, Any]] = {
    "cwd": dict(recipe="cwd"),
    "skd": dict(recipe=dict(type="skd", critic=_CRITIC)),
    # What skd is without its critic, and without its pairs as well.
    "pixel_pair": dict(recipe=dict(type="skd", adversarial=0.0)),
    "pixel": dict(recipe=dict(type="skd", pair=0.0, adversarial=0.0)),
    "ifvd": dict(recipe=dict(type="ifvd", critic=_CRITIC)),
    "cirkd": dict(recipe=dict(type="cirkd", relations=_RELATIONS)),
}
DEFAULT = ("cwd",)
SCORES = {"mIoU": "mIoU", "mAcc": "mAcc"}
EVALUATIONS = 6


def segmentor(width: int, channels: int, classes: int, background: float | None = None) -> dict[str, Any]:
    """Semantic FPN on a ResNet-18 of ``width`` base channels, at stride 4.

    Args:
        width, channels: of the backbone's first stage, and of pyramid and head.
        classes: their number.
        background: the weight of class 0 in the host's own loss, where the others weigh 1; all alike by default.
    """
    norm = dict(type="BN", requires_grad=True)
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
        backbone=dict(
            type="ResNetV1c",
            depth=18,
            base_channels=width,
            stem_channels=width,
            num_stages=4,
            out_indices=(0, 1, 2, 3),
            norm_cfg=norm,
            norm_eval=False,
            style="pytorch",
            contract_dilation=True,
            init_cfg=None,
        ),
        neck=dict(type="FPN", in_channels=[width * 2**i for i in range(4)], out_channels=channels, num_outs=4),
        decode_head=dict(
            type="FPNHead",
            in_channels=[channels] * 4,
            in_index=[0, 1, 2, 3],
            feature_strides=[4, 8, 16, 32],
            channels=channels,
            num_classes=classes,
            dropout_ratio=0.0,
            norm_cfg=norm,
            align_corners=False,
            loss_decode=dict(
                type="CrossEntropyLoss",
                class_weight=None if background is None else [background] + [1.0] * (classes - 1),
            ),
        ),
        train_cfg=dict(),
        test_cfg=dict(mode="whole"),
    )


@dataclass
class Layout:
    """A dataset: its classes, where its files lie, its pictures' size, and the crops (height, width) and batches of training."""

    classes: tuple[str, ...]
    images: str
    masks: str
    suffix: str
    splits: dict[str, str]
    size: tuple[int, int]
    crop: tuple[int, int]
    batch: int
    padding: int = 255


SCENES = Layout(
    SEGMENTATION_CLASSES,
    "images",
    "masks",
    ".png",
    {name: name for name in ("train", "val", "test")},
    (SIZE, SIZE),
    (SIZE, SIZE),
    16,
    padding=0,  # background: upstream mmseg cannot both weigh classes and ignore pixels
)


def real_layout(root: Path) -> Layout:
    """A set in MMSegmentation's layout: ``img_dir/{train,val}``, ``ann_dir/{train,val}`` (255 is ignored) and ``classes.json``.

    Raises:
        DistillError: something of it is not there.
    """
    for part in ("classes.json", "img_dir/train", "img_dir/val", "ann_dir/train", "ann_dir/val"):
        if not (root / part).exists():
            raise DistillError(
                f"--data {root}: no {part}; a set has img_dir/{{train,val}}, ann_dir/{{train,val}} and classes.json"
            )
    try:
        classes = [str(name) for name in json.loads((root / "classes.json").read_text())["classes"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DistillError(f'--data {root}: classes.json must hold {{"classes": [names]}} ({error})') from None
    pictures = sorted((root / "img_dir/train").iterdir())
    if not pictures:
        raise DistillError(f"--data {root}: img_dir/train is empty")
    picture = cv2.imread(str(pictures[0]))
    if picture is None:
        raise DistillError(f"--data {root}: cannot read {pictures[0]}")
    size = (picture.shape[0], picture.shape[1])
    crop = (max(int(size[0] * 0.8) // 32 * 32, 32), max(int(size[1] * 0.8) // 32 * 32, 32))
    # There is no third split: tables are of val, and nothing may be tuned on them.
    splits = {"train": "train", "val": "val", "test": "val"}
    return Layout(tuple(classes), "img_dir", "ann_dir", pictures[0].suffix, splits, size, crop, REAL_BATCH)


def config(
    layout: Layout,
    model: dict[str, Any],
    data: Path,
    work_dir: Path,
    seed: int,
    iterations: int = ITERATIONS,
    split: str = "test",
) -> Config:
    """The Runner's config of one training: the same for teacher, plain and distilled students."""

    # What a picture lacks of the crop, the data preprocessor pads.
    augmentation: list[dict[str, Any]] = [
        dict(type="RandomResize", scale=layout.size[::-1], ratio_range=(0.8, 1.25), keep_ratio=True),
        dict(type="RandomCrop", crop_size=layout.crop),
    ]
    model = copy.deepcopy(model)
    model["data_preprocessor"].update(size=layout.crop, size_divisor=None, seg_pad_val=layout.padding)

    def loader(part: str, *, train: bool) -> dict[str, Any]:
        folder = layout.splits[part]
        return dict(
            batch_size=layout.batch if train else 1,
            num_workers=0,
            sampler=dict(type="InfiniteSampler" if train else "DefaultSampler", shuffle=train),
            dataset=dict(
                type="BaseSegDataset",
                data_root=str(data),
                data_prefix=dict(img_path=f"{layout.images}/{folder}", seg_map_path=f"{layout.masks}/{folder}"),
                img_suffix=layout.suffix,
                seg_map_suffix=".png",
                metainfo=dict(classes=layout.classes),
                reduce_zero_label=False,
                test_mode=not train,
                pipeline=[
                    dict(type="LoadImageFromFile"),
                    dict(type="LoadAnnotations"),
                    *(augmentation if train else []),
                    dict(type="PackSegInputs"),
                ],
            ),
        )

    evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
    return Config(
        dict(
            default_scope="mmseg",
            model=model,
            work_dir=str(work_dir),
            train_dataloader=loader("train", train=True),
            val_dataloader=loader("val", train=False),
            test_dataloader=loader(split, train=False),
            val_evaluator=evaluator,
            test_evaluator=evaluator,
            # What the host's inference reads.
            test_pipeline=[dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSegInputs")],
            randomness=dict(seed=seed),
            **schedule(iterations, LR, EVALUATIONS),
        )
    )


def _write_scenes(folder: Path) -> Path:
    return write_segmentation_set(folder, size=SIZE, **DATA)


def main(out: str = "runs/demo/seg", data: str | None = None, **settings: Any) -> list[Result]:
    """Trains everything, prints the table and writes the files to ``out``; for the rest see :func:`kdgraft_mm.demo.run`.

    Args:
        out: where results go.
        data: a real set's folder (see :func:`real_layout`) instead of the scenes.
    """
    layout = SCENES if data is None else real_layout(Path(data))
    classes = len(layout.classes)
    background = 0.3 if data is None else None  # nine tenths of a scene's pixels
    demo = Demo(
        task="seg",
        dataset="digit scenes" if data is None else Path(data).name,
        scope="mmseg",
        kind="DistilledSegmentor",
        teacher=("FPN-R18, width 16", segmentor(16, 48, classes, background)),
        student=("FPN-R18, width 8", segmentor(8, 24, classes, background)),
        recipes=RECIPES,
        default=DEFAULT,
        write_data=_write_scenes if data is None else lambda _: Path(str(data)),
        config=partial(config, layout),
        iterations=ITERATIONS if data is None else REAL_ITERATIONS,
        evaluations=EVALUATIONS,
        scores=SCORES,
        size=layout.size,
        picture=("masks.png", draw_masks),
        tested="test scenes" if data is None else "val split",
    )
    return run(demo, out=out, **settings)


def draw_masks(runs: Sequence[Trained], path: Path, scenes: int = 5) -> None:
    """Image, ground truth and every model's mask, a row a test picture; ignored pixels are grey."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from mmseg.apis import inference_model
    from mmseg.registry import DATASETS

    dataset = DATASETS.build(runs[0].runner.cfg.test_dataloader.dataset)
    classes = len(dataset.metainfo["classes"])
    palette = np.concatenate([[[30, 30, 30]], np.array(plt.cm.tab20(np.arange(max(classes - 1, 1)) % 20))[:, :3] * 255])
    colours = np.full((256, 3), 128, np.uint8)
    colours[:classes] = palette[:classes].astype(np.uint8)
    columns = ["image", "ground truth", *(trained.method for trained in runs)]
    height, width = plt.imread(dataset.get_data_info(0)["img_path"]).shape[:2]
    shape = (2.2 * len(columns), (2.2 * height / width + 0.15) * scenes)
    figure, axes = plt.subplots(scenes, len(columns), figsize=shape, squeeze=False)
    for row, index in enumerate(np.linspace(0, len(dataset) - 1, scenes).astype(int)):
        info = dataset.get_data_info(int(index))
        # As the host reads it: masks may be of any PNG mode.
        labels = dataset[int(index)]["data_samples"].gt_sem_seg.data[0].numpy().astype(np.uint8)
        pictures = [plt.imread(info["img_path"]), colours[labels]]
        for trained in runs:
            trained.runner.model.cfg = trained.runner.cfg
            predicted = inference_model(trained.runner.model, info["img_path"]).pred_sem_seg.data
            pictures.append(colours[predicted[0].cpu().numpy()])
        for column, picture in enumerate(pictures):
            axis = axes[row][column]
            axis.imshow(picture, interpolation="nearest")
            axis.set_axis_off()
            if row == 0:
                axis.set_title(columns[column], fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
