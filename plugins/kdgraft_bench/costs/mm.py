"""Costs of detectors and of segmentors: variants of one training step, timed in turn, and their memory."""

from __future__ import annotations

import copy
import gc
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DefaultScope, Registry
from torch import Tensor

from kdgraft.batch import Batch
from kdgraft.store import Store
from kdgraft_mm.configs import load_config
from kdgraft_mm.replaying import VIEW
from kdgraft_mm.sources import build_teacher, identity_of
from kdgraft_mm.writing import Values, Writer, columns_of

from ..timing import check_device, interleave, peak_memory
from .steps import Rows, compared, machine, teacher_forward, training_step

VALUES: Values = "float16"
"""The numbers of stores that are timed."""


@dataclass
class Variants:
    """One student, one teacher, and the ways to train it.

    Attributes:
        scope: the host's registry scope.
        models: the host's registry.
        kind: the distilled model's type.
        student: the plain student's ``model`` entry.
        teacher: config of the teacher, whose weights are random; or a dict with the ``type`` of another library.
        recipes: settings of a distilled model by name.
        batch: (side, images, device) -> the batch as the data preprocessor returns it.
        size, images: side and number of the images by device.
        forward: runs the teacher up to its outputs.
        references: models of other packages by name, made from (teacher config's path, checkpoint's path), for further ratios.
        stored: the names of recipes that are timed with a stored teacher as well, in float16.
    """

    scope: str
    models: Registry
    kind: str
    student: dict[str, Any]
    teacher: str | Mapping[str, Any]
    recipes: Mapping[str, Mapping[str, Any]]
    batch: Callable[[int, int, str], tuple[Tensor, list[Any]]]
    size: Mapping[str, int]
    images: Mapping[str, int]
    forward: Callable[[Any, Tensor], Any]
    references: Mapping[str, Callable[[str, str], dict[str, Any]]] = field(default_factory=dict)
    stored: Sequence[str] = ()


def measure(variants: Variants, pairs: int, device: str) -> dict[str, Rows]:
    """Time plain step, teacher forward, references and recipes in turn in one process.

    Args:
        variants: what to time.
        pairs: interleaved rounds.
        device: ``"cpu"``, or ``"cuda"`` (bf16 autocast, larger images).

    Returns:
        Title -> table: of times and of memory.
    """
    check_device(device)
    size, count = variants.size[device], variants.images[device]
    with (
        tempfile.TemporaryDirectory() as scratch,
        _quiet(),
        DefaultScope.overwrite_default_scope(variants.scope),
    ):
        steps, models, tapped = _steps(variants, Path(scratch), size, count, device)
        rows = compared(
            interleave(steps, pairs, device=device), [*variants.references, *(("plain",) if variants.stored else ())]
        )
        stores = [
            {"teacher": name, "kB a view of an image": f"{stored_bytes(models[name]) / 1000:.0f}"}
            for name in map(stored_name, variants.stored)
        ]
    title = (
        f"{machine(device)}, {count} images of {size}×{size}, {pairs} interleaved rounds, medians with 95 % intervals"
    )
    weights = sum(tensor.nbytes for tensor in models["teacher"].state_dict().values()) / 2**20
    held = f"peak of one step beyond the weights, MiB (the teacher's weights, {weights:.1f} MiB, come on top)"
    tables = {title: rows, held: _memory(steps, tapped, device)}
    return {**tables, f"stored outputs, {VALUES}": stores} if stores else tables


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings: random weights have no class names to compare."""
    logger = logging.getLogger("kdgraft")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _steps(
    variants: Variants, scratch: Path, size: int, count: int, device: str
) -> tuple[dict[str, Callable[[], Any]], dict[str, Any], dict[str, int]]:
    torch.manual_seed(0)
    spec, teacher = _teacher(variants, scratch)
    plain = variants.models.build(copy.deepcopy(variants.student))
    models: dict[str, Any] = {"plain": plain}
    for name, entry in variants.references.items():
        models[name] = variants.models.build(entry(spec["config"], spec["checkpoint"]))
    for name, settings in variants.recipes.items():
        student = copy.deepcopy(variants.student)
        kind = student.pop("type")

        def distilled(spec: dict[str, Any], student: Any = student, kind: str = kind, settings: Any = settings) -> Any:
            own = dict(student, type=variants.kind, student=kind, teacher=spec, **copy.deepcopy(dict(settings)))
            return variants.models.build(own)

        models[name] = distilled(spec)
        models[name].start_distilling()
        # All variants share one teacher, as a copy for each of them would fill the memory.
        models[name].distiller.teacher.model = teacher
        if name in variants.stored:
            folder = str(scratch / f"store {len(models)}")
            stored = distilled({**spec, "store": folder})
            models[stored_name(name)] = stored
            fill_by_batch(models[name], variants.batch(size, count, "cpu"), identity_of(spec), folder)
            stored.start_distilling()
    for name, model in models.items():
        # SyncBN would need a process group, and this is a single process.
        models[name] = revert_sync_batchnorm(model)
        models[name].load_state_dict(plain.state_dict(), strict=True)
        models[name].to(device).train()
    teacher.to(device)
    inputs, samples = variants.batch(size, count, device)
    for number, sample in enumerate(samples):
        sample.set_metainfo({VIEW: (0, number)})
    tapped = {name: _tapped_bytes(models[name], inputs, samples) for name in variants.recipes}
    steps = {
        name: training_step(partial(_loss, model, inputs, samples), model.parameters(), device)
        for name, model in models.items()
    }
    forward = teacher_forward(lambda: variants.forward(teacher, inputs), device)
    ordered = {"plain": steps.pop("plain"), "teacher forward": forward, **steps}
    return ordered, {**models, "teacher": teacher}, tapped


def _teacher(variants: Variants, scratch: Path) -> tuple[dict[str, Any], Any]:
    """Write a teacher of random weights; return the ``teacher`` entry of a config, and the model."""
    checkpoint = str(scratch / "teacher.pth")
    if not isinstance(variants.teacher, str):
        spec = {**variants.teacher, "checkpoint": checkpoint}
        source = build_teacher(spec, variants.models)  # which reads the file when it is loaded
        torch.save(source.weighed.state_dict(), checkpoint)
        source.load()
        return spec, source.model
    config = load_config(variants.teacher)
    config.model.pop("pretrained", None)
    teacher = revert_sync_batchnorm(variants.models.build(copy.deepcopy(config.model)))
    teacher.eval().requires_grad_(False)
    torch.save({"state_dict": teacher.state_dict()}, checkpoint)
    config.dump(scratch / "teacher.py")
    return dict(config=str(scratch / "teacher.py"), checkpoint=checkpoint), teacher


def stored_name(name: str) -> str:
    """Return the name of a recipe's step with a stored teacher."""
    return f"{name}, stored"


def stored_bytes(model: Any) -> float:
    """Return the bytes that the store of a model's teacher takes for a view of an image."""
    outputs = model.distiller.teacher.outputs
    return float(outputs.files.size()) / len(outputs.index)


def fill_by_batch(model: Any, batch: tuple[Tensor, list[Any]], identity: Mapping[str, Any], folder: str) -> None:
    """Store what the teacher of a distilled model gives on one batch."""
    for number, sample in enumerate(batch[1]):
        sample.set_metainfo({VIEW: (0, number)})
    writer = Writer(model, "teacher", VALUES, nullcontext)
    about, _ = writer.about(batch, identity)
    store = Store.create(folder, {**about, "views": 1, "seed": 0, "samples": 1, "per_part": 1})
    store.write(0, columns_of(writer.rows(batch)))


def _loss(model: Any, inputs: Tensor, samples: list[Any]) -> Tensor:
    loss, _ = model.parse_losses(model.loss(inputs, samples))
    return loss


def _memory(steps: dict[str, Callable[[], Any]], tapped: dict[str, int], device: str) -> Rows:
    """Return the peaks of the steps beyond the resident weights, and the plain step's peak plus the bytes of the teacher's taps."""
    mib = 2**20
    rows: Rows = []
    plain = 0
    for name, step in steps.items():
        gc.collect()
        peak = peak_memory(step, device)
        plain = peak if name == "plain" else plain
        row = {"step": name, "peak": f"{peak / mib:.1f}", "plain + taps": "–"}
        if name in tapped:
            row["plain + taps"] = f"{(plain + tapped[name]) / mib:.1f}"
        rows.append(row)
    return rows


def _tapped_bytes(model: Any, inputs: Tensor, samples: list[Any]) -> int:
    """Return the bytes of the tensors that the teacher's taps record in one step."""
    distiller = model.distiller
    recording = distiller.record(
        "teacher", lambda source: source.model(inputs, samples, mode="tensor"), Batch(), inputs.device
    )
    taps = {tap for term in distiller.terms.values() for tap in term.teacher_taps if not tap.parameters}
    held = {tensor.data_ptr(): tensor.nbytes for tap in taps for tensor in recording.tensors(tap)}
    return sum(held.values())
