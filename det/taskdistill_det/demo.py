"""``taskdistill demo det``: does distilling pay, on data that every machine can make?

Scenes of real handwritten digits, a teacher, a plain student and a distilled student for each recipe: the same training set,
the same schedule, the host's own Runner. Weights of terms were tuned on the validation scenes with other seeds; the table is of
the test scenes.
"""

from __future__ import annotations

import copy
import io
import logging
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import cv2
import numpy as np
from mmengine.analysis import get_model_complexity_info
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from mmengine.runner import Runner

from taskdistill.bench import interleave
from taskdistill.errors import DistillError
from taskdistill.report import Result, gap_closed, markdown, print_rows, summary, write_results
from taskdistill_mm.run import on_device
from taskdistill_mm.scenes import CLASSES, write_detection_set

SIZE = 96
DATA = dict(seed=0, train=1500, val=150, test=400)
ITERATIONS = 1200
BATCH = 16
EVALUATIONS = 6
RECIPES: dict[str, dict[str, Any]] = {
    # Weights tuned on the validation scenes with seed 100.
    "combined": dict(recipe="combined"),
    "localization": dict(recipe=dict(type="localization", main=1.0, vlr=1.0, classes=5.0)),
    "imitation": dict(recipe="imitation"),
}
DEFAULT = ("combined",)
METRICS = {"AP": 3, "AP50": 3, "AP75": 3, "parameters (k)": 0, "MFLOPs": 0, "step (ms)": 0}


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


TEACHER, TEACHER_NAME = detector(width=16, channels=48, convs=2), "GFL-R18, width 16"
STUDENT, STUDENT_NAME = detector(width=8, channels=24, convs=1), "GFL-R18, width 8"


def config(model: dict[str, Any], data: Path, work_dir: Path, seed: int, iterations: int = ITERATIONS) -> Config:
    """The Runner's config of one training: the same for teacher, plain and distilled students."""

    def loader(split: str, *, train: bool) -> dict[str, Any]:
        pipeline = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True)]
        pipeline.append(dict(type="Resize", scale=(SIZE, SIZE), keep_ratio=True))
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
                ann_file=f"annotations/instances_{split}.json",
                data_prefix=dict(img=f"{split}/"),
                filter_cfg=dict(filter_empty_gt=False),
                test_mode=not train,
                pipeline=pipeline,
            ),
        )

    def evaluator(split: str) -> dict[str, Any]:
        return dict(type="CocoMetric", ann_file=f"{data}/annotations/instances_{split}.json", metric="bbox")

    warm = max(iterations // 10, 1)
    return Config(
        dict(
            default_scope="mmdet",
            model=copy.deepcopy(model),
            work_dir=str(work_dir),
            train_dataloader=loader("train", train=True),
            val_dataloader=loader("val", train=False),
            test_dataloader=loader("test", train=False),
            val_evaluator=evaluator("val"),
            test_evaluator=evaluator("test"),
            train_cfg=dict(
                type="IterBasedTrainLoop", max_iters=iterations, val_interval=max(iterations // EVALUATIONS, 1)
            ),
            val_cfg=dict(type="ValLoop"),
            test_cfg=dict(type="TestLoop"),
            optim_wrapper=dict(
                type="OptimWrapper",
                optimizer=dict(type="AdamW", lr=1e-2, weight_decay=0.05),
                clip_grad=dict(max_norm=10.0),
                paramwise_cfg=dict(norm_decay_mult=0, bias_decay_mult=0),
            ),
            param_scheduler=[
                dict(type="LinearLR", start_factor=0.05, by_epoch=False, begin=0, end=warm),
                dict(
                    type="CosineAnnealingLR",
                    by_epoch=False,
                    begin=warm,
                    end=iterations,
                    T_max=iterations - warm,
                    eta_min_ratio=0.01,
                ),
            ],
            default_hooks=dict(
                logger=dict(type="LoggerHook", interval=max(iterations // 30, 1)),
                checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=iterations, save_optimizer=False),
            ),
            log_processor=dict(by_epoch=False, window_size=max(iterations // 30, 1)),
            log_level="ERROR",
            randomness=dict(seed=seed),
            env_cfg=dict(cudnn_benchmark=False, mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0)),
        )
    )


class _Progress(Hook):
    """One line, rewritten: what trains, how far, the loss, the validation AP."""

    priority = "VERY_LOW"

    def __init__(self, title: str, every: int, terminal: TextIO) -> None:
        self.title, self.every, self.terminal = title, every, terminal
        self.start = time.perf_counter()

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        done = runner.iter + 1
        if done % self.every and done != runner.max_iters:
            return
        seconds = time.perf_counter() - self.start
        left = seconds / done * (runner.max_iters - done)
        loss = runner.message_hub.get_scalar("train/loss").mean(self.every)
        ap = runner.message_hub.log_scalars.get("val/coco/bbox_mAP")
        shown = f"  val AP {ap.current():.3f}" if ap is not None else ""
        print(
            f"\r{self.title:<28} {done:>5}/{runner.max_iters}  loss {loss:6.3f}{shown}  {seconds:4.0f} s, {left:4.0f} s left ",
            end="\n" if done == runner.max_iters else "",
            file=self.terminal,
            flush=True,
        )


@dataclass
class Trained:
    """A trained model and what there is to say of it."""

    method: str
    seed: int
    runner: Runner
    checkpoint: Path
    metrics: dict[str, float]
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)


def train(
    method: str,
    model: dict[str, Any],
    data: Path,
    work_dir: Path,
    seed: int,
    iterations: int = ITERATIONS,
    split: str = "test",
) -> Trained:
    """Trains one model through the host's Runner and evaluates it on ``split``."""
    cfg = config(model, data, work_dir, seed, iterations)
    if split != "test":
        cfg.test_dataloader, cfg.test_evaluator = cfg.val_dataloader, cfg.val_evaluator
    progress = _Progress(f"{method} (seed {seed})", max(iterations // 60, 1), sys.stdout)
    # The COCO tools print a page at every evaluation.
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runner = Runner.from_cfg(cfg)
        runner.register_hook(progress)
        _quiet(runner.logger)
        runner.train()
        tested = runner.test()
    scalars = runner.message_hub.log_scalars
    student = runner.model
    complexity = get_model_complexity_info(_plain(student), (3, SIZE, SIZE), show_table=False, show_arch=False)
    # The metric is silent when a model detects nothing at all, as an untrained one does.
    metrics = {
        "AP": tested.get("coco/bbox_mAP", 0.0),
        "AP50": tested.get("coco/bbox_mAP_50", 0.0),
        "AP75": tested.get("coco/bbox_mAP_75", 0.0),
        "parameters (k)": sum(p.numel() for p in _plain(student).parameters()) / 1e3,
        "MFLOPs": complexity["flops"] / 1e6,
    }
    curves = {}
    for key in scalars:
        if "loss" in key:
            values = scalars[key].data[0]
            window = max(len(values) // 60, 1)
            curves[key.removeprefix("train/")] = [
                (i + window, float(values[i : i + window].mean())) for i in range(0, len(values) - window + 1, window)
            ]
    if "val/coco/bbox_mAP" in scalars:
        values = scalars["val/coco/bbox_mAP"].data[0]
        interval = max(iterations // EVALUATIONS, 1)
        curves["val AP"] = [((i + 1) * interval, float(value)) for i, value in enumerate(values)]
    return Trained(method, seed, runner, work_dir / f"iter_{iterations}.pth", metrics, curves)


def time_steps(runs: Sequence[Trained], rounds: int = 20) -> dict[str, float]:
    """Milliseconds of a training step (forward, loss, backward) of each method, timed in turn on one batch: medians."""
    batch = next(iter(runs[0].runner.train_dataloader))

    def step(model: Any) -> Callable[[], None]:
        model.train()

        def run() -> None:
            loss, _ = model.parse_losses(model(**model.data_preprocessor(batch, True), mode="loss"))
            loss.backward()
            model.zero_grad()

        return run

    device = next(runs[0].runner.model.parameters()).device.type
    seconds = interleave({run.method: step(run.runner.model) for run in runs}, rounds, device=device)
    return {method: float(np.median(values)) * 1e3 for method, values in seconds.items()}


def _plain(model: Any) -> Any:
    """A student without its distiller, to count parameters and FLOPs."""
    distiller = model._modules.get("distiller")
    if distiller is None:
        return model
    plain = copy.copy(model)
    plain._modules = {name: child for name, child in model._modules.items() if name != "distiller"}
    return plain


def _quiet(logger: MMLogger) -> None:
    for handler in logger.handlers:
        handler.setLevel(logging.ERROR)


def distilled(teacher: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The student's model with a distiller entry."""
    student = copy.deepcopy(STUDENT)
    kind = student.pop("type")
    return dict(
        student,
        type="DistilledDetector",
        student=kind,
        teacher=dict(config=copy.deepcopy(TEACHER), checkpoint=str(teacher)),
        **copy.deepcopy(settings),
    )


def choose(recipes: str) -> list[str]:
    """Names from ``"default"``, ``"all"``, ``"none"`` or a list with commas between."""
    if recipes in ("all", "none"):
        return list(RECIPES) if recipes == "all" else []
    names = list(DEFAULT) if recipes == "default" else [name.strip() for name in recipes.split(",") if name.strip()]
    unknown = [name for name in names if name not in RECIPES]
    if unknown or not names:
        raise DistillError(f"the demo has no recipe {', '.join(map(repr, unknown))}; known: {', '.join(RECIPES)}")
    return names


def main(
    seeds: int = 1,
    recipes: str = "default",
    out: str = "runs/demo/det",
    device: str = "cpu",
    iterations: int = ITERATIONS,
) -> list[Result]:
    """Trains everything, prints the table and writes ``results.csv``, ``detections.png`` and ``curves.png`` to ``out``.

    Args:
        seeds: how many seeds, from 0.
        recipes: ``"default"``, ``"all"``, ``"none"``, or names with commas between.
        out: where results go.
        device: ``"cpu"`` keeps a machine's GPUs out of it.
        iterations: of every training; the default is what the README's table was made with.
    """
    names = choose(recipes)
    cv2.setNumThreads(0)
    DefaultScope.get_instance("taskdistill_demo", scope_name="mmdet")
    folder = Path(out)
    data = write_detection_set(folder / "data", size=SIZE, **DATA)
    started = time.perf_counter()
    results: list[Result] = []
    with on_device(device):
        for seed in range(seeds):
            work = folder / f"seed{seed}"
            teacher = train("teacher", TEACHER, data, work / "teacher", seed, iterations)
            mine = [teacher, train("plain", STUDENT, data, work / "plain", seed, iterations)]
            for name in names:
                mine.append(
                    train(name, distilled(teacher.checkpoint, RECIPES[name]), data, work / name, seed, iterations)
                )
            if seed == 0:
                draw_detections(mine, folder / "detections.png")
                draw_curves(mine, folder / "curves.png")
            steps = time_steps(mine)
            for run in mine:
                run.metrics["step (ms)"] = steps[run.method]
                model = TEACHER_NAME if run.method == "teacher" else STUDENT_NAME
                results += [
                    Result("det", "digit scenes", model, run.method, seed, metric, value)
                    for metric, value in run.metrics.items()
                ]
            # Written after every seed: an interrupted run keeps what it has.
            write_results(results, folder / "results.csv")
    rows = summary(results, METRICS)
    print_rows(rows, title=f"\ntest scenes, {seeds} seed{'s' if seeds > 1 else ''}")
    (folder / "table.md").write_text(markdown(rows) + "\n")
    for name in names:
        print(f"{name} closes {gap_closed(results, 'AP', name):.0%} of the gap from plain student to teacher")
    print(f"results, pictures and checkpoints in {folder} ({time.perf_counter() - started:.0f} s)")
    return results


def draw_detections(runs: Sequence[Trained], path: Path, scenes: int = 5) -> None:
    """Ground truth and every model's detections (score above 0.3), a row a test scene."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle
    from mmdet.apis import inference_detector
    from mmdet.registry import DATASETS

    dataset = DATASETS.build(runs[0].runner.cfg.test_dataloader.dataset)
    columns = ["ground truth", *(run.method for run in runs)]
    figure, axes = plt.subplots(scenes, len(columns), figsize=(2.2 * len(columns), 2.2 * scenes), squeeze=False)
    for row in range(scenes):
        info = dataset.get_data_info(row)
        image = plt.imread(info["img_path"])
        found = [[(i["bbox"], i["bbox_label"], None) for i in info["instances"]]]
        for run in runs:
            run.runner.model.cfg = run.runner.cfg
            predicted = inference_detector(run.runner.model, info["img_path"]).pred_instances.cpu().numpy()
            kept = predicted[predicted.scores > 0.3]
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


def draw_curves(runs: Sequence[Trained], path: Path) -> None:
    """The host's loss and the validation AP of every model, and the distillation terms."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8))
    for run in runs:
        host = [key for key in run.curves if key.startswith("loss_")]
        steps = [step for step, _ in run.curves[host[0]]]
        total = np.sum([[value for _, value in run.curves[key]] for key in host], axis=0)
        left.plot(steps, total, label=run.method)
        if "val AP" in run.curves:
            middle.plot(*zip(*run.curves["val AP"], strict=True), marker=".", label=run.method)
        for key, points in run.curves.items():
            if key.startswith("distill."):
                label = f"{run.method}: {key.removeprefix('distill.').removesuffix('.loss')}"
                right.plot(*zip(*points, strict=True), label=label)
    left.set(title="host's training loss", xlabel="iteration", yscale="log")
    middle.set(title="AP on validation scenes", xlabel="iteration")
    right.set(title="distillation terms (weighted)", xlabel="iteration", yscale="log")
    for axis in (left, middle, right):
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
