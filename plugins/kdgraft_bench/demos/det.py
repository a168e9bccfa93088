"""``kdgraft demo det``: the gain of distillation, on data that every machine can make, or on a real set of your own.

A teacher, a plain student and a distilled student for each recipe are trained on scenes of real handwritten digits, with the same
training set, the same schedule and the host's own Runner. The weights of terms were tuned on the validation scenes with other
seeds; the table is of the test scenes. ``--data DIR`` takes a real set in COCO's format.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.image import imread
from matplotlib.patches import Rectangle
from mmdet.apis import inference_detector
from mmdet.registry import DATASETS

import kdgraft_det  # noqa: F401  registers DistilledDetector

from ..comparison import TWO_SPLITS, Outcome, Training, run
from ..data.coco import RealSet
from ..data.scenes import CLASSES, write_detection_set
from ..mmdet_ld import mmdet_ld
from ..pictures import draw_grid
from ..results import Result
from . import queries
from .mm import RunnerComparison, resnet18

SIZE = 96
DATA = dict(seed=0, train=400, val=150, test=400)
ITERATIONS = 2000
BATCH = 16
LR = 1e-2
# Chosen on BCCD's val split with seed 100, with teacher and plain student only: three seeds of all recipes take an hour on two cores.
REAL_SIZE = (320, 240)
REAL_ITERATIONS = 400
REAL_BATCH = 8
REAL_LR = 1e-2
REAL_EVALUATIONS = 2
REAL_ROUNDS = 10
CHANNELS = 48


def padded(size: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) after the data preprocessor's padding."""
    return -(-size[0] // 32) * 32, -(-size[1] // 32) * 32


def recipes(size: tuple[int, int]) -> dict[str, dict[str, Any]]:
    """Return the compared recipes: ``combined`` with weights tuned on the validation scenes, the others with published weights.

    FGD and MGD *sum* over maps, and their weights are for COCO: 256 channels, 800×1216 pixels, strides 8 to 128. They are
    multiplied here by the ratio of the numbers of summands on COCO and on this pyramid. BCKD's sums are divided by the positives, as
    the host's own losses are, and keep the published weights.

    Args:
        size: (height, width) of the padded pictures, for strides 8, 16 and 32.
    """
    ours = sum(size[0] // stride * (size[1] // stride) for stride in (8, 16, 32))
    theirs = 100 * 152 + 50 * 76 + 25 * 38 + 13 * 19 + 7 * 10
    channels, positions = 256 / CHANNELS, theirs / ours
    focal_global = dict(alpha=1e-3 * channels, beta=5e-4 * channels, gamma=5e-4 * positions)
    return {
        **{name: dict(recipe=name) for name in ("combined", "ld", "imitation", "chen2017", "fgfi")},
        "fgd": dict(recipe=dict(type="fgd", **focal_global, lambda_=5e-6 * channels * positions)),
        "mgd": dict(recipe=dict(type="mgd", weight=2e-5 * channels * positions)),
        "pkd": dict(recipe="pkd"),
        "crosskd": dict(recipe="crosskd"),
        "ultralytics": dict(recipe="ultralytics"),
        "rtdetrv4": dict(recipe="rtdetrv4"),
        "bckd": dict(recipe="bckd"),
    }


RECIPES = recipes((SIZE, SIZE)) | {
    # Tuned on the validation scenes with seeds 100 and 101, as combined was.
    "ld": dict(recipe=dict(type="ld", main=1 / 9, vlr=1 / 9, classes=0.5)),
}
REAL_RECIPES = recipes(padded(REAL_SIZE[::-1]))
REFERENCES = {"mmdet_ld": mmdet_ld}
DEFAULT = ("combined",)
EVALUATIONS = 6
ROUNDS = 20
SCORES = {"AP": ("coco/bbox_mAP", 3), "AP50": ("coco/bbox_mAP_50", 3), "AP75": ("coco/bbox_mAP_75", 3)}


def detector(width: int, channels: int, classes: int) -> tuple[str, dict[str, Any]]:
    """Return name and ``model`` entry of a small GFL: ResNet-18 of ``width`` base channels, FPN and head of ``channels``."""
    return f"GFL-R18, width {width}", dict(
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


# (Base channels of the backbone, channels of neck and head). The latter are equal, as in the literature.
TEACHER = (16, CHANNELS)
STUDENT = (6, CHANNELS)
REAL_TEACHER = (16, CHANNELS)
REAL_STUDENT = (4, CHANNELS)


@dataclass(frozen=True, kw_only=True)
class Detection(RunnerComparison):
    """A comparison of detectors on a dataset in COCO's format.

    Attributes:
        scale: (width, height) to which pictures are resized with their aspect ratio.
        augmentation: additional steps of the training pipeline.
    """

    task: str = "det"
    scope: str = "mmdet"
    kind: str = "DistilledDetector"
    scores: Mapping[str, tuple[str, int]] = field(default_factory=lambda: SCORES)
    default: tuple[str, ...] = DEFAULT
    tested_at_once: int = 25
    picture: str = "detections.png"
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

    def draw(self, outcomes: Sequence[Outcome], path: Path, scenes: int = 5, threshold: float = 0.3) -> None:
        """Draw ground truth and every model's detections (score above ``threshold``) on the first test scenes."""
        with redirect_stdout(io.StringIO()):  # pycocotools prints messages about its index
            dataset = DATASETS.build(outcomes[0].run.cfg.test_dataloader.dataset)
        for outcome in outcomes:
            outcome.run.model.cfg = outcome.run.cfg
        draw_detections({one.method: one.run.model for one in outcomes}, dataset, range(scenes), path, threshold)


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


def scenes() -> Detection:
    """Return the comparison on the digit scenes."""
    return Detection(
        dataset="digit scenes",
        teacher=detector(*TEACHER, len(CLASSES)),
        student=detector(*STUDENT, len(CLASSES)),
        recipes=RECIPES,
        iterations=ITERATIONS,
        evaluations=EVALUATIONS,
        rounds=ROUNDS,
        tested="test scenes",
        classes=CLASSES,
        size=padded((SIZE, SIZE)),
        scale=(SIZE, SIZE),
        batch_size=BATCH,
        lr=LR,
        augmentation=(dict(type="RandomShift", prob=0.7, max_shift_px=8),),
    )


def query_scenes() -> Detection:
    """Return the comparison of detectors with queries on the digit scenes, which runs where its recipes are named."""
    dense = scenes()
    return replace(
        dense,
        teacher=queries.with_queries(dense.teacher),
        student=queries.with_queries(dense.student),
        recipes=queries.RECIPES,
        default=(),
        iterations=queries.ITERATIONS,
        batch_size=queries.BATCH,
        lr=queries.LR,
        folder="detr",
    )


def write_data(folder: Path) -> Path:
    """Write the scenes to a folder, unless they are there; return it."""
    return write_detection_set(folder, size=SIZE, **DATA)


def plan_config(data: str | Path) -> dict[str, Any]:
    """Return the Runner's config of the plain student on the scenes, for plans, which set its sizes and its length by options.

    The learning rate's schedule follows ``train_cfg.max_iters``, and every tenth of the training is a checkpoint to resume from.

    Args:
        data: the folder of the scenes.
    """
    training = Training("plain", 0, ITERATIONS, "test", "cpu", Path(data), Path("unused"))
    config = scenes().config(training).to_dict()
    for entry in ("work_dir", "randomness"):
        del config[entry]
    for entry in ("begin", "end", "T_max"):  # by default the whole training; the warm-up is a factor beside it
        del config["param_scheduler"][1][entry]
    every = ITERATIONS // 10
    config["train_cfg"]["val_interval"] = ITERATIONS
    config["default_hooks"]["checkpoint"] = dict(
        type="CheckpointHook", by_epoch=False, interval=every, max_keep_ckpts=1
    )
    return config


def own_set(real: RealSet) -> Detection:
    """Return the comparison on a real set, with small pictures, flips in all directions, and mmdet's own distillation."""
    return Detection(
        dataset=real.root.resolve().name,
        teacher=detector(*REAL_TEACHER, len(real.classes)),
        student=detector(*REAL_STUDENT, len(real.classes)),
        recipes=REAL_RECIPES,
        references=REFERENCES,
        iterations=REAL_ITERATIONS,
        evaluations=REAL_EVALUATIONS,
        rounds=REAL_ROUNDS,
        tested="val split",
        classes=real.classes,
        splits=TWO_SPLITS,
        size=padded(REAL_SIZE[::-1]),
        scale=REAL_SIZE,
        batch_size=REAL_BATCH,
        lr=REAL_LR,
        augmentation=(dict(type="RandomFlip", prob=0.75, direction=["horizontal", "vertical", "diagonal"]),),
    )


def main(out: str = "runs/demo/det", data: str | None = None, **settings: Any) -> list[Result]:
    """Train everything, print the table and write the files to ``out``.

    Args:
        out: the folder of the results.
        data: the folder of a real set (see :class:`kdgraft_bench.data.coco.RealSet`), to use instead of the scenes.
        **settings: see :func:`kdgraft_bench.comparison.run`.
    """
    if data is None:
        return run([scenes(), query_scenes()], write_data, out, **settings)
    real = RealSet.read(Path(data))
    return run([own_set(real)], lambda folder: real.shrunk(folder, REAL_SIZE), out, **settings)
