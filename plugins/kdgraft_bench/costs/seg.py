"""``make bench-seg``: the costs of distilling a segmentor, compared with the plain step and the teacher's forward.

The pair is that of Structured KD and CWD, PSPNet-R101 teaching PSPNet-R18, at full width and with Cityscapes' 19 classes. The
weights are random, as costs do not depend on them. All variants have the same student weights, teacher weights and batch, and are
timed in turn in one process. ``AdversarialMask alone`` shows the cost of training a critic, which no other term has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor

from kdgraft.losses import class_prototypes, pairwise_affinity
from kdgraft_mm.configs import load_config
from kdgraft_seg.reader import SegReader
from kdgraft_seg.relations import CrossImageRelations

from ..timing import peak_memory
from .methods import methods
from .mm import Variants, measure
from .steps import Rows, publish

STUDENT = "mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py"
TEACHER = "mmseg::pspnet/pspnet_r101-d8_4xb2-80k_cityscapes-512x1024.py"
LEVELS = dict(tap=[f"backbone[{stage}]" for stage in (1, 2, 3)])
OWN: dict[str, dict[str, Any]] = {"FSP": LEVELS, "Review": LEVELS, "WeightMatching": dict(modules="decode_head")}
RECIPES: dict[str, dict[str, Any]] = {
    "SoftTargets": dict(terms=[dict(type="SoftTargets")]),
    "PairwiseAffinity": dict(terms=[dict(type="PairwiseAffinity")]),
    "DIST": dict(terms=[dict(type="DIST")]),
    "cwd": dict(recipe="cwd"),
    "ifvd, no critic": dict(recipe=dict(type="ifvd", adversarial=0.0)),
    "cirkd": dict(recipe="cirkd"),
    "skd, no critic": dict(recipe=dict(type="skd", adversarial=0.0)),
    "skd": dict(recipe="skd"),
    "AdversarialMask alone": dict(terms=[dict(type="AdversarialMask", weight=0.1)]),
    **{
        name: dict(terms=[term])
        for name, term in methods(SegReader, "backbone[-1]", OWN).items()
        if name not in ("SoftTargets", "PairwiseAffinity", "DIST", "ChannelWise")
    },
}
SIZE = {"cpu": 192, "cuda": 512}
IMAGES = {"cpu": 2, "cuda": 8}


def main(pairs: int = 30, device: str = "cpu", out: str = "runs/costs/seg") -> Rows:
    """Measure, print the tables and write them to ``out``; see :func:`kdgraft_bench.costs.mm.measure`."""
    student = load_config(STUDENT).model
    student.pretrained = None
    variants = Variants(
        scope="mmseg",
        models=MODELS,
        kind="DistilledSegmentor",
        student=student,
        teacher=TEACHER,
        recipes=RECIPES,
        batch=batch,
        size=SIZE,
        images=IMAGES,
        forward=lambda teacher, inputs: teacher(inputs, mode="tensor"),
        stored=("cwd",),
    )
    title = "peak of the loss itself on one image of 512 channels, forward and backward, MiB, by the side of the feature map"
    return publish({**measure(variants, pairs, device), title: growth(device)}, device, out)


def growth(device: str = "cpu", channels: int = 512, sides: Sequence[int] = (32, 64, 128)) -> Rows:
    """Measure the memory of affinity and relation terms at growing resolutions, beside the size of one N×N map."""
    rows: dict[str, dict[str, str]] = {}
    for side in sides:
        generator = torch.Generator().manual_seed(0)
        teacher = torch.randn(1, channels, side, side, generator=generator).to(device)
        student = torch.randn(1, channels, side, side, generator=generator).to(device)
        labels = torch.randint(19, (1, side, side), generator=generator).to(device)
        relations = CrossImageRelations()
        relations.allocate(channels, channels, 19, torch.device(device))
        terms: dict[str, Callable[[], Tensor]] = {
            "the two maps themselves": partial(_added, student, teacher),
            "PairwiseAffinity": partial(pairwise_affinity, student, teacher, patch=2),
            "ClassPrototypes": partial(class_prototypes, student, teacher, labels),
            "CrossImageRelations": partial(_cross_image, relations, student, teacher, labels),
        }
        for name, loss in terms.items():
            held = peak_memory(partial(_with_gradient, loss, student), device)
            rows.setdefault(name, {"term": name})[f"{side}×{side}"] = f"{held / 2**20:.1f}"
        rows.setdefault("(one N×N map)", {"term": "(one N×N map)"})[f"{side}×{side}"] = f"{side**4 * 4 / 2**20:.0f}"
    return list(rows.values())


def _with_gradient(loss: Callable[[], Tensor], student: Tensor) -> None:
    student.requires_grad_()
    loss().backward()
    student.grad = None


def _added(student: Tensor, teacher: Tensor) -> Tensor:
    return (student + teacher).sum()


def _cross_image(term: CrossImageRelations, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    return term.relate(student, teacher, labels).value()


def batch(size: int, count: int, device: str, classes: int = 19) -> tuple[Tensor, list[Any]]:
    """Return a batch as the data preprocessor returns it: noise with labels in blocks of 16 pixels, a tenth of them ignored."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 3, size, size, generator=generator)
    blocks = torch.randint(classes, (count, 1, size // 16, size // 16), generator=generator)
    blocks[torch.rand(blocks.shape, generator=generator) < 0.1] = 255
    labels = blocks.repeat_interleave(16, 2).repeat_interleave(16, 3)
    samples = []
    for label in labels:
        sample = SegDataSample(metainfo=dict(img_shape=(size, size), ori_shape=(size, size), pad_shape=(size, size)))
        sample.gt_sem_seg = PixelData(data=label.to(device))
        samples.append(sample)
    return inputs.to(device), samples
