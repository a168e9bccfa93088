"""``taskdistill demo det``: does distilling pay, on data that every machine can make?

Scenes of real handwritten digits, a teacher, a plain student and a distilled student for each recipe: the same training set,
the same schedule, the host's own Runner. Weights of terms were tuned on the validation scenes with other seeds; the table is of
the test scenes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config

from taskdistill.report import Result
from taskdistill_mm.demo import Demo, Trained, run, schedule
from taskdistill_mm.scenes import CLASSES, write_detection_set

SIZE = 96
DATA = dict(seed=0, train=400, val=150, test=400)
ITERATIONS = 2000
BATCH = 16
LR = 1e-2
RECIPES: dict[str, dict[str, Any]] = {
    # Weights tuned on the validation scenes with seeds 100 and 101.
    "combined": dict(recipe="combined"),
    "localization": dict(recipe=dict(type="localization", main=1.0, vlr=1.0, classes=5.0)),
    "imitation": dict(recipe="imitation"),
}
DEFAULT = ("combined",)
EVALUATIONS = 6
SCORES = {"AP": "coco/bbox_mAP", "AP50": "coco/bbox_mAP_50", "AP75": "coco/bbox_mAP_75"}


def detector(width: int, channels: int, convs: int) -> dict[str, Any]:
    """A GFL detector for the scenes: ResNet-18 of ``width`` base channels, FPN and head of ``channels``."""
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
            num_classes=len(CLASSES),
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


TEACHER = ("GFL-R18, width 16", detector(width=16, channels=48, convs=2))
# Neck and head of one width, as in the literature: the student is smaller in its backbone alone.
STUDENT = ("GFL-R18, width 6", detector(width=6, channels=48, convs=2))


def config(
    model: dict[str, Any], data: Path, work_dir: Path, seed: int, iterations: int = ITERATIONS, split: str = "test"
) -> Config:
    """The Runner's config of one training: the same for teacher, plain and distilled students."""

    def loader(part: str, *, train: bool) -> dict[str, Any]:
        pipeline = [
            dict(type="LoadImageFromFile"),
            dict(type="LoadAnnotations", with_bbox=True),
            dict(type="Resize", scale=(SIZE, SIZE), keep_ratio=True),
        ]
        if train:
            pipeline.append(dict(type="RandomShift", prob=0.7, max_shift_px=8))
        meta = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")
        pipeline.append(dict(type="PackDetInputs", meta_keys=meta))
        return dict(
            batch_size=BATCH if train else 25,
            num_workers=0,
            sampler=dict(type="InfiniteSampler" if train else "DefaultSampler", shuffle=train),
            dataset=dict(
                type="CocoDataset",
                data_root=str(data),
                metainfo=dict(classes=CLASSES),
                ann_file=f"annotations/instances_{part}.json",
                data_prefix=dict(img=f"{part}/"),
                filter_cfg=dict(filter_empty_gt=False),
                test_mode=not train,
                pipeline=pipeline,
            ),
        )

    def evaluator(part: str) -> dict[str, Any]:
        return dict(type="CocoMetric", ann_file=f"{data}/annotations/instances_{part}.json", metric="bbox")

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
            **schedule(iterations, LR, EVALUATIONS),
        )
    )


def main(out: str = "runs/demo/det", **settings: Any) -> list[Result]:
    """Trains everything, prints the table and writes the files to ``out``; for the rest see :func:`taskdistill_mm.demo.run`."""
    demo = Demo(
        task="det",
        dataset="digit scenes",
        scope="mmdet",
        kind="DistilledDetector",
        teacher=TEACHER,
        student=STUDENT,
        recipes=RECIPES,
        default=DEFAULT,
        write_data=lambda folder: write_detection_set(folder, size=SIZE, **DATA),
        config=config,
        iterations=ITERATIONS,
        evaluations=EVALUATIONS,
        scores=SCORES,
        size=(SIZE, SIZE),
        picture=("detections.png", draw_detections),
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

    dataset = DATASETS.build(runs[0].runner.cfg.test_dataloader.dataset)
    columns = ["ground truth", *(trained.method for trained in runs)]
    figure, axes = plt.subplots(scenes, len(columns), figsize=(2.2 * len(columns), 2.2 * scenes), squeeze=False)
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
                text = CLASSES[int(label)] + ("" if score is None else f" {score:.2f}")
                axis.text(
                    x1, y1, text, fontsize=5.5, color="white", va="bottom", bbox=dict(facecolor=colour, pad=0.6, lw=0)
                )
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
