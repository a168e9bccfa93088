"""``kdgraft demo det``: does distilling pay, on data that every machine can make, and on a real set of your own?

Scenes of real handwritten digits, a teacher, a plain student and a distilled student for each recipe: the same training set,
the same schedule, the host's own Runner. Weights of terms were tuned on the validation scenes with other seeds; the table is of
the test scenes. ``--data DIR`` takes a real set in COCO's format.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mmengine.config import Config

from kdgraft.report import Result
from kdgraft_mm.demo import Demo, Trained, run, schedule
from kdgraft_mm.scenes import CLASSES, write_detection_set

from .peers import mmdet_ld
from .real import RealSet

SIZE = 96
DATA = dict(seed=0, train=400, val=150, test=400)
ITERATIONS = 2000
BATCH = 16
LR = 1e-2
# Chosen on BCCD's val with seed 100, by teacher and plain student alone, so that three seeds of every recipe take an hour on two cores.
REAL_SIZE = (320, 240)
REAL_ITERATIONS = 400
REAL_BATCH = 8
REAL_LR = 1e-2
REAL_EVALUATIONS = 2
REAL_ROUNDS = 10
CHANNELS = 48


def padded(size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) as the data preprocessor pads them."""
    return -(-size[0] // 32) * 32, -(-size[1] // 32) * 32


def recipes(size: tuple[int, int]) -> dict[str, dict[str, Any]]:
    """The recipes that are compared: ``combined`` with weights tuned on the validation scenes, the others with the papers'.

    FGD and MGD *sum* over maps, and their weights are for COCO: 256 channels, 800×1216 pixels, strides 8 to 128. Here they are
    multiplied by how many times more numbers such a sum has there than on this pyramid.

    Args:
        size: (height, width) of the padded pictures, seen at strides 8, 16 and 32.
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
    }


RECIPES = recipes((SIZE, SIZE)) | {
    # Tuned on the validation scenes with seeds 100 and 101, as combined was.
    "ld": dict(recipe=dict(type="ld", main=1 / 9, vlr=1 / 9, classes=0.5)),
}
REAL_RECIPES = recipes(padded(REAL_SIZE[::-1]))
PEERS = {"mmdet_ld": mmdet_ld}
DEFAULT = ("combined",)
EVALUATIONS = 6
ROUNDS = 20
SCORES = {"AP": "coco/bbox_mAP", "AP50": "coco/bbox_mAP_50", "AP75": "coco/bbox_mAP_75"}


def detector(width: int, channels: int, convs: int, classes: int = len(CLASSES)) -> dict[str, Any]:
    """A small GFL detector: ResNet-18 of ``width`` base channels, FPN and head of ``channels``."""
    return dict(
        type="GFL",
        data_preprocessor=dict(
            type="DetDataPreprocessor", mean=[123.675] * 3, std=[58.395] * 3, bgr_to_rgb=True, pad_size_divisor=32
        ),
        backbone=dict(
            type="ResNet",
            depth=18,
            base_channels=width,
            stem_channels=width,
            num_stages=4,
            out_indices=(0, 1, 2, 3),
            frozen_stages=-1,
            norm_cfg=dict(type="BN", requires_grad=True),
            norm_eval=False,
            style="pytorch",
            init_cfg=None,
        ),
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
            stacked_convs=convs,
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


# Base channels of the backbone, channels of neck and head: the latter alike, as in the literature.
TEACHER = (16, CHANNELS)
STUDENT = (6, CHANNELS)
REAL_TEACHER = (16, CHANNELS)
REAL_STUDENT = (4, CHANNELS)


@dataclass(frozen=True)
class Layout:
    """A dataset: its classes, its splits' names, its pictures' (width, height), and batches and augmentation of training."""

    classes: tuple[str, ...]
    splits: dict[str, str]
    size: tuple[int, int]
    batch: int
    augmentation: tuple[dict[str, Any], ...]
    lr: float = LR
    evaluations: int = EVALUATIONS


SCENES = Layout(
    CLASSES,
    {name: name for name in ("train", "val", "test")},
    (SIZE, SIZE),
    BATCH,
    (dict(type="RandomShift", prob=0.7, max_shift_px=8),),
)


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

    def loader(part: str, *, train: bool) -> dict[str, Any]:
        folder = layout.splits[part]
        pipeline: list[dict[str, Any]] = [
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations", with_bbox=True),
            dict(type="Resize", scale=layout.size, keep_ratio=True),
            *(layout.augmentation if train else ()),
        ]
        meta = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
        pipeline.append(dict(type="PackDetInputs", meta_keys=meta))
        return dict(
            batch_size=layout.batch if train else 25,
            num_workers=0,
            sampler=dict(type="InfiniteSampler" if train else "DefaultSampler", shuffle=train),
            dataset=dict(
                type="CocoDataset",
                data_root=str(data),
                metainfo=dict(classes=layout.classes),
                ann_file=f"annotations/instances_{folder}.json",
                data_prefix=dict(img=f"{folder}/"),
                filter_cfg=dict(filter_empty_gt=False),
                test_mode=not train,
                pipeline=pipeline,
            ),
        )

    def evaluator(part: str) -> dict[str, Any]:
        path = f"{data}/annotations/instances_{layout.splits[part]}.json"
        return dict(type="CocoMetric", ann_file=path, metric="bbox")

    return Config(
        dict(
            default_scope="mmdet",
            model=copy.deepcopy(model),
            work_dir=str(work_dir),
            train_dataloader=loader("train", train=True),
            val_dataloader=loader("val", train=False),
            test_dataloader=loader(split, train=False),
            val_evaluator=evaluator("val"),
            test_evaluator=evaluator(split),
            randomness=dict(seed=seed),
            **schedule(iterations, layout.lr, layout.evaluations),
        )
    )


def real_layout(real: RealSet) -> Layout:
    """A real set: small pictures, flips in every direction."""
    flips = dict(type="RandomFlip", prob=0.75, direction=["horizontal", "vertical", "diagonal"])
    # There is no third split: tables are of val, and no weight of a term may be tuned on them.
    splits = {"train": "train", "val": "val", "test": "val"}
    return Layout(real.classes, splits, REAL_SIZE, REAL_BATCH, (flips,), REAL_LR, REAL_EVALUATIONS)


def main(out: str = "runs/demo/det", data: str | None = None, **settings: Any) -> list[Result]:
    """Trains everything, prints the table and writes the files to ``out``; for the rest see :func:`kdgraft_mm.demo.run`.

    Args:
        out: where results go.
        data: a real set's folder (see :class:`kdgraft_det.real.RealSet`) instead of the scenes.
    """
    real = None if data is None else RealSet.read(Path(data))
    layout = SCENES if real is None else real_layout(real)

    def write_data(folder: Path) -> Path:
        return write_detection_set(folder, size=SIZE, **DATA) if real is None else real.shrunk(folder, layout.size)

    def sized(width: int, channels: int) -> tuple[str, dict[str, Any]]:
        return f"GFL-R18, width {width}", detector(width, channels, convs=2, classes=len(layout.classes))

    demo = Demo(
        task="det",
        dataset="digit scenes" if real is None else real.root.resolve().name,
        scope="mmdet",
        kind="DistilledDetector",
        teacher=sized(*(TEACHER if real is None else REAL_TEACHER)),
        student=sized(*(STUDENT if real is None else REAL_STUDENT)),
        recipes=RECIPES if real is None else REAL_RECIPES,
        default=DEFAULT,
        write_data=write_data,
        config=partial(config, layout),
        iterations=ITERATIONS if real is None else REAL_ITERATIONS,
        evaluations=layout.evaluations,
        scores=SCORES,
        size=padded(layout.size[::-1]),
        picture=("detections.png", draw_detections),
        tested="test scenes" if real is None else "val split",
        peers={} if real is None else PEERS,
        rounds=ROUNDS if real is None else REAL_ROUNDS,
    )
    return run(demo, out=out, **settings)


def draw_detections(runs: Sequence[Trained], path: Path, scenes: int = 5, threshold: float = 0.3) -> None:
    """Ground truth and every model's detections (score above ``threshold``), a row a test scene."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle
    from mmdet.apis import inference_detector
    from mmdet.registry import DATASETS

    with redirect_stdout(io.StringIO()):  # pycocotools tells of its index
        dataset = DATASETS.build(runs[0].runner.cfg.test_dataloader.dataset)
    columns = ["ground truth", *(trained.method for trained in runs)]
    height, width = plt.imread(dataset.get_data_info(0)["img_path"]).shape[:2]
    shape = (2.2 * len(columns), (2.2 * height / width + 0.1) * scenes)
    figure, axes = plt.subplots(scenes, len(columns), figsize=shape, squeeze=False)
    for row in range(scenes):
        info = dataset.get_data_info(row)
        image = plt.imread(info["img_path"])
        found = [[(i["bbox"], i["bbox_label"], None) for i in info["instances"]]]
        for trained in runs:
            trained.runner.model.cfg = trained.runner.cfg
            predicted = inference_detector(trained.runner.model, info["img_path"]).pred_instances.cpu().numpy()
            kept = predicted[predicted.scores > threshold]
            found.append(list(zip(kept.bboxes, kept.labels, kept.scores, strict=True)))
        for column, boxes in enumerate(found):
            axis = axes[row][column]
            axis.imshow(image)
            axis.set_axis_off()
            if row == 0:
                axis.set_title(columns[column], fontsize=9)
            for (x1, y1, x2, y2), label, score in boxes:
                colour = plt.cm.tab10(int(label))
                axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=colour, linewidth=1.2))
                text = dataset.metainfo["classes"][int(label)] + ("" if score is None else f" {score:.2f}")
                label_box = dict(facecolor=colour, pad=0.6, lw=0)
                axis.text(x1, y1, text, fontsize=5.5, color="white", va="bottom", bbox=label_box, clip_on=True)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
