"""``make bench-det``: what distilling a detector costs, against the plain step, the teacher's forward and mmdet's own LD.

The pair is LD's published one, GFL-R101 teaching GFL-R18, at full width; weights are random, which costs the same. All
variants have the same student weights, teacher weights and batch, and are timed in turn in one process.
"""

from __future__ import annotations

import copy
import gc
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData
from torch import Tensor

from taskdistill.bench import interleave, median_interval, peak_memory, ratio_interval
from taskdistill.errors import DistillError
from taskdistill.report import markdown, print_rows
from taskdistill_mm.configs import load_config

STUDENT = "mmdet::ld/ld_r18-gflv1-r101_fpn_1x_coco.py"
TEACHER = "mmdet::gfl/gfl_r101_fpn_ms-2x_coco.py"
RECIPES: dict[str, dict[str, Any]] = {
    "LD, main region": dict(terms=[dict(type="LocalizationDistillation")]),
    "localization": dict(recipe="localization"),
    "foreground imitation": dict(terms=[dict(type="FeatureImitation", tap="neck[*]", region="foreground")]),
    "soft targets": dict(terms=[dict(type="SoftTargets")]),
}
SIZE = {"cpu": 256, "cuda": 800}
IMAGES = {"cpu": 2, "cuda": 8}


def main(pairs: int = 30, device: str = "cpu", out: str = "runs/bench/det") -> list[dict[str, str]]:
    """Measures, prints the tables and writes them to ``out``.

    Args:
        pairs: interleaved rounds.
        device: ``"cpu"``, or ``"cuda"`` (bf16 autocast, larger images).
        out: folder for ``bench_cpu.md`` or ``bench_cuda.md``.
    """
    if device not in SIZE:
        raise DistillError(f"device must be one of {', '.join(SIZE)}, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise DistillError("no CUDA device here; run the benchmark with --device cpu")
    DefaultScope.get_instance("taskdistill_bench", scope_name="mmdet")
    logging.getLogger("taskdistill").setLevel(logging.ERROR)  # random weights have no class names to compare
    size, count = SIZE[device], IMAGES[device]
    with tempfile.TemporaryDirectory() as scratch:
        steps, models = _steps(Path(scratch), size, count, device)
    seconds = interleave(steps, pairs, device=device)
    baseline = [plain + teacher for plain, teacher in zip(seconds["plain"], seconds["teacher forward"], strict=True)]
    rows = []
    for name, values in seconds.items():
        distils = name not in ("plain", "teacher forward")
        rows.append(
            {
                "step": name,
                "ms": f"{median_interval(values).median * 1e3:.0f}",
                "/ (plain + teacher forward)": str(ratio_interval(values, baseline)) if distils else "–",
                "/ mmdet's LD": str(ratio_interval(values, seconds["mmdet LD"])) if distils else "–",
            }
        )
    memory = _memory(steps, models, device)
    machine = f"{device}, {torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()
    title = f"{machine}, {count} images of {size}×{size}, {pairs} interleaved rounds, medians with 95 % intervals"
    print_rows(rows, title=title)
    weights = sum(tensor.nbytes for tensor in models["teacher"].state_dict().values()) / 2**20
    held = f"peak of one step beyond the weights, MiB (the teacher's weights, {weights:.1f} MiB, come on top)"
    print_rows(memory, title=held)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"bench_{device}.md").write_text(f"{title}\n\n{markdown(rows)}\n\n{held}\n\n{markdown(memory)}\n")
    return rows


def _steps(scratch: Path, size: int, count: int, device: str) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    torch.manual_seed(0)
    base = load_config(STUDENT).model
    student = copy.deepcopy(base)
    for key in ("teacher_config", "teacher_ckpt"):
        student.pop(key)
    student.type = "GFL"
    student.backbone.init_cfg = None
    student.bbox_head.type = "GFLHead"
    student.bbox_head.pop("loss_ld")
    teacher_config = load_config(TEACHER)
    teacher = MODELS.build(teacher_config.model).eval().requires_grad_(False)
    checkpoint = scratch / "teacher.pth"
    torch.save({"state_dict": teacher.state_dict()}, checkpoint)
    teacher_config.dump(scratch / "teacher.py")
    plain = MODELS.build(copy.deepcopy(student))
    peer = copy.deepcopy(base)
    peer.backbone.init_cfg = None
    peer.update(teacher_config=str(scratch / "teacher.py"), teacher_ckpt=str(checkpoint))
    peer = MODELS.build(peer)
    models: dict[str, Any] = {"plain": plain, "mmdet LD": peer}
    for name, settings in RECIPES.items():
        entry = copy.deepcopy(student)
        kind = entry.pop("type")
        spec = dict(config=str(scratch / "teacher.py"), checkpoint=str(checkpoint))
        distilled = MODELS.build(
            dict(entry, type="DistilledDetector", student=kind, teacher=spec, **copy.deepcopy(settings))
        )
        distilled.start_distilling()
        models[name] = distilled
    for model in models.values():
        model.load_state_dict(plain.state_dict(), strict=True)
        model.to(device).train()
    teacher.to(device)
    inputs, samples = batch(size, count, device)
    for name in RECIPES:
        models[name].tapped = _tapped_bytes(models[name], inputs, samples)
    steps = {name: _step(model, inputs, samples, device) for name, model in models.items()}

    @torch.no_grad()
    def forward() -> None:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            teacher.bbox_head(teacher.extract_feat(inputs))

    ordered = {"plain": steps.pop("plain"), "teacher forward": forward, **steps}
    return ordered, {**models, "teacher": teacher}


def _step(model: Any, inputs: Tensor, samples: list[Any], device: str) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss, _ = model.parse_losses(model.loss(inputs, samples))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _memory(steps: dict[str, Callable[[], Any]], models: dict[str, Any], device: str) -> list[dict[str, str]]:
    """Peak of a step beyond the weights that are resident anyway, against the plain step's peak plus what the teacher's taps hold."""
    mib = 2**20
    rows: list[dict[str, str]] = []
    plain = 0
    for name, step in steps.items():
        gc.collect()
        peak = peak_memory(step, device)
        plain = peak if name == "plain" else plain
        row = {"step": name, "peak": f"{peak / mib:.1f}", "plain + taps": "–"}
        if name in RECIPES:
            row["plain + taps"] = f"{(plain + models[name].tapped) / mib:.1f}"
        rows.append(row)
    return rows


def _tapped_bytes(model: Any, inputs: Tensor, samples: list[Any]) -> int:
    """Bytes of what the teacher's taps hold in one step."""
    distiller = model.distiller
    recording = distiller.record_teacher(
        lambda: distiller.teacher.model(inputs, samples, mode="tensor"), inputs.device.type
    )
    taps = {tap for term in distiller.terms.values() for tap in term.teacher_taps}
    held = {tensor.data_ptr(): tensor.nbytes for tap in taps for tensor in recording.tensors(tap)}
    return sum(held.values())


def batch(size: int, count: int, device: str, boxes: int = 7, classes: int = 80) -> tuple[Tensor, list[Any]]:
    """A batch as the data preprocessor hands it over: noise with ``boxes`` boxes an image (COCO's average)."""
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
        meta = dict(
            img_shape=(size, size), ori_shape=(size, size), pad_shape=(size, size), batch_input_shape=(size, size)
        )
        sample = DetDataSample(metainfo=meta)
        sample.gt_instances = found
        sample.ignored_instances = InstanceData(bboxes=found.bboxes[:0], labels=found.labels[:0])
        samples.append(sample)
    return inputs.to(device), samples
