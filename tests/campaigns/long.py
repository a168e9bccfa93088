"""Long runs: after thousands of steps nothing has piled up, in memory or in the time of a step."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from campaigns.runner import Campaign, Case, Listed
from kdgraft import Distiller

Step = Callable[[int], Any]
HALF, PART = 0.5, 0.2
"""Where counting begins, once all is imported and filled, and the share of the steps after that and at the end that is compared."""


def plain() -> Step:
    from support.plain import SETTINGS, model

    torch.manual_seed(0)
    kinds = ("SoftTargets", "CRD", "FactorTransfer", "AdversarialScores", "Review")
    terms = [{"type": kind, "tap": "conv", "name": kind.lower(), **SETTINGS.get(kind, {})} for kind in kinds]
    terms = [
        {k: v for k, v in term.items() if k != "tap" or term["type"] in ("CRD", "FactorTransfer", "Review")}
        for term in terms
    ]
    terms[1]["memory"], terms[2]["pretrain"] = 64, 500
    distiller = Distiller(model(4), model(8), terms, torch.rand(4, 3, 8, 8))
    optimizer = torch.optim.Adam([p for p in distiller.parameters() if p.requires_grad], lr=1e-4)

    def step(number: int) -> None:
        images, labels = torch.rand(4, 3, 8, 8), torch.randint(5, (4,))
        out = distiller(images, targets=labels, indices=[4 * number + at for at in range(4)])
        optimizer.zero_grad()
        out.total(torch.nn.functional.cross_entropy(out.student, labels)).backward()
        optimizer.step()

    return step


def texts() -> Step:
    from kdgraft_nlp.student import graft
    from support import nlp

    terms = ["ForwardKL", "HiddenStates", "AttentionMaps"]
    student = graft(nlp.model("llama", 16, 2, 4, seed=1).train(), nlp.model("llama", 32, 2, 4, seed=2), terms)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-4)
    samples = nlp.samples(16, "causal")

    def step(number: int) -> None:
        first = number % 12
        optimizer.zero_grad()
        nlp.loss_of(student, nlp.collate(samples[first : first + 4])).backward()
        optimizer.step()

    return step


def detectors() -> Step:
    from support.det import build, detector, distilled, losses, part, raw_batch, save_teacher

    teacher = detector(width=6, channels=12)
    terms = [dict(type="FeatureImitation", tap="neck[*]"), dict(type="SoftTargets")]
    checkpoint = save_teacher(Path(tempfile.mkdtemp()) / "teacher.pth", teacher)
    model = build(distilled(detector(), teacher, checkpoint, recipe="ld", terms=terms))
    batch = part(raw_batch(), slice(0, 1))
    return _trained(model, lambda: losses(model, batch))


def segmentors() -> Step:
    from support.seg import batch, build, distilled, losses_of, save_teacher, segmentor

    teacher = save_teacher(Path(tempfile.mkdtemp()) / "teacher.pth")
    model = build(
        distilled(segmentor(), teacher, recipe="cwd", terms=[dict(type="FeatureImitation", tap="backbone[2]"), "DIST"])
    )
    given = batch(2)
    return _trained(model, lambda: losses_of(model, *given))


def _trained(model: Any, losses: Callable[[], dict[str, torch.Tensor]]) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)

    def step(number: int) -> None:
        found = losses()
        optimizer.zero_grad()
        torch.stack([value for key, value in found.items() if "loss" in key]).sum().backward()
        optimizer.step()

    return step


HOSTS: dict[str, Callable[[], Step]] = {"torch": plain, "nlp": texts, "det": detectors, "seg": segmentors}


def check(case: Case) -> None:
    step, steps = HOSTS[case["host"]](), case["steps"]
    times, at = [], {}
    for number in range(steps):
        begun = time.process_time()
        step(number)
        times.append(time.process_time() - begun)
        if number in (int(HALF * steps), steps - 1):
            gc.collect()
            at[number] = len(gc.get_objects()), _resident()
    (objects, memory), (objects_then, memory_then) = at.values()
    assert objects_then - objects < 200, f"objects: {objects_then - objects} more after {steps} steps"
    assert memory_then - memory < 16, f"memory: {memory_then - memory:.0f} MiB more after {steps} steps"
    half, part = int(HALF * steps), int(PART * steps)
    first, last = (statistics.median(some) for some in (times[half : half + part], times[-part:]))
    assert last < 1.3 * first + 5e-4, f"time: a step takes {last / first:.2f} times as long after {steps} steps"


def _resident() -> float:
    """The memory of this process in MiB."""
    import psutil

    return psutil.Process().memory_info().rss / 2**20


LONG = Campaign(
    "long runs",
    "5 000 steps in each host: no more objects, no more memory and no longer steps at the end than at the beginning",
    Listed(lambda: [dict(host=host, steps=5000) for host in HOSTS]),
    check,
    count=4,
    sample=0,
    seconds=1800,
    host="mmdet",
)
