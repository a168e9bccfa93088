"""``make bench-det``: the costs of distilling a detector, compared with the plain step, the teacher's forward and mmdet's LD.

The pair is LD's published one, GFL-R101 teaching GFL-R18, at full width. The weights are random, as costs do not depend on them.
All variants have the same student weights, teacher weights and batch, and are timed in turn in one process.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor

import kdgraft_det  # noqa: F401  registers DistilledDetector
from kdgraft.regions.foreground import foreground_weights
from kdgraft_det.reader import DetReader
from kdgraft_mm.configs import load_config

from ..mmdet_ld import mmdet_ld
from ..timing import peak_memory
from .methods import methods
from .mm import Variants, measure
from .steps import Rows, publish

STUDENT = "mmdet::ld/ld_r18-gflv1-r101_fpn_1x_coco.py"
TEACHER = "mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py"
PAPERS = ("chen2017", "fgfi", "fgd", "mgd", "pkd", "crosskd")
_EXCLUSIVE = (
    "CWTM",
    "DIST",
    "DKD",
    "DKPP",
    "NKD",
    "ForwardKL",
    "ReverseKL",
    "GeneralizedJSD",
    "SkewedKL",
    "AdversarialScores",
)
OWN = {**{name: dict(activation="softmax") for name in _EXCLUSIVE}, "WeightMatching": dict(modules="neck")}
RECIPES: dict[str, dict[str, Any]] = {
    "LD, main region": dict(terms=[dict(type="LocalizationDistillation")]),
    "ld": dict(recipe="ld"),
    "foreground imitation": dict(terms=[dict(type="FeatureImitation", tap="neck[*]", region="foreground")]),
    "soft targets": dict(terms=[dict(type="SoftTargets")]),
    **{name: dict(recipe=name) for name in PAPERS},
    **{
        name: dict(terms=[term])
        for name, term in methods(DetReader, "neck[*]", OWN, without=("SoftTargets", "FocalGlobal")).items()
    },
}
"""Variants to time. Terms on exclusive classes read GFL's scores through a softmax; those with labels count the positives."""
VIT: dict[str, Any] = dict(
    type="transformers",
    model=dict(model_type="dinov3_vit", num_register_tokens=4),
    mean=[0.485, 0.456, 0.406],
    std=[0.229, 0.224, 0.225],
)
"""A DINOv3 ViT-S/16, whose features teach."""
OF_A_VIT: dict[str, dict[str, Any]] = {
    "rtdetrv4": dict(recipe="rtdetrv4"),
    "ultralytics": dict(recipe=dict(type="ultralytics", scored=False)),
}
CROWDED = 4, 500, (800, 1344)
"""Images, boxes of each, and their size, of which the memory of foreground weights is measured on the largest map."""
SIZE = {"cpu": 256, "cuda": 800}
IMAGES = {"cpu": 2, "cuda": 8}


def main(pairs: int = 30, device: str = "cpu", out: str = "runs/costs/det") -> Rows:
    """Measure, print the tables and write them to ``out``; see :func:`kdgraft_bench.costs.mm.measure`."""
    student = load_config(STUDENT).model
    student.backbone.init_cfg = None
    for key in ("teacher_config", "teacher_ckpt"):
        student.pop(key)
    student.type = "GFL"
    student.bbox_head.type = "GFLHead"
    student.bbox_head.pop("loss_ld")

    variants = Variants(
        scope="mmdet",
        models=MODELS,
        kind="DistilledDetector",
        student=student,
        teacher=TEACHER,
        recipes=RECIPES,
        batch=batch,
        size=SIZE,
        images=IMAGES,
        forward=lambda teacher, inputs: teacher.bbox_head(teacher.extract_feat(inputs)),
        references={"mmdet LD": partial(mmdet_ld, student)},
        stored=("ld", "foreground imitation"),
    )
    vit = replace(
        variants,
        teacher=VIT,
        recipes=OF_A_VIT,
        forward=lambda teacher, inputs: teacher(inputs),
        references={},
        stored=("rtdetrv4",),
    )
    tables = {f"a DINOv3 ViT-S/16 teaches, {title}": rows for title, rows in measure(vit, pairs, device).items()}
    return publish({**measure(variants, pairs, device), **tables, **crowded(device)}, device, out)


def crowded(device: str = "cpu") -> dict[str, Rows]:
    """Measure the memory of the foreground weights of crowded images, beside that of the weights themselves."""
    images, count, size = CROWDED
    generator = torch.Generator().manual_seed(0)
    feature = torch.zeros(images, 1, size[0] // 4, size[1] // 4, device=device)
    corners = torch.rand(images, count, 2, generator=generator) * torch.tensor([size[1], size[0]]) * 0.8
    boxes = torch.cat([corners, corners + 8 + 200 * torch.rand(images, count, 2, generator=generator)], -1).to(device)
    held = peak_memory(lambda: foreground_weights(list(boxes), size, feature), device)
    map_size = feature.numel() * 4 / 2**20
    title = f"peak of foreground weights, {images} images with {count} boxes each, on {feature.shape[2]}×{feature.shape[3]} positions"
    return {title: [{"MiB": f"{held / 2**20:.1f}", "the weights themselves": f"{map_size:.1f}"}]}


def batch(size: int, count: int, device: str, boxes: int = 7, classes: int = 80) -> tuple[Tensor, list[Any]]:
    """Return a batch as the data preprocessor returns it: noise with ``boxes`` boxes an image (COCO's average)."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 3, size, size, generator=generator)
    samples = []
    for _ in range(count):
        corner = torch.rand(boxes, 2, generator=generator) * size * 0.6
        extent = (0.05 + 0.35 * torch.rand(boxes, 2, generator=generator)) * size
        found = InstanceData(
            bboxes=torch.cat([corner, corner + extent], 1).to(device),
            labels=torch.randint(classes, (boxes,), generator=generator).to(device),
        )
        shapes = ("img_shape", "ori_shape", "pad_shape", "batch_input_shape")
        sample = DetDataSample(metainfo=dict.fromkeys(shapes, (size, size)))
        sample.gt_instances = found
        sample.ignored_instances = InstanceData(bboxes=found.bboxes[:0], labels=found.labels[:0])
        samples.append(sample)
    return inputs.to(device), samples
