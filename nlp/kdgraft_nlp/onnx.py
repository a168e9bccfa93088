"""Export of a saved student to ONNX."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from kdgraft.errors import DistillError
from kdgraft.onnx import Exported, Freedom, export_onnx

from .checks import one_line
from .tasks import example, task_of

LEFT_OUT = "tokenizer or image processor; for language models the loop that generates, and its cache"
TOKENS = ("input_ids", "attention_mask", "decoder_input_ids")


def export_student(
    folder: str | Path, out: str | Path, *, size: Sequence[int] | None = None, force: bool = False
) -> Exported:
    """Write a saved student as ONNX: ``kdgraft export FOLDER student.onnx --onnx``.

    Args:
        folder: the folder that ``save_model`` or ``save_pretrained`` wrote.
        out: the file, such as ``student.onnx``.
        size: for other hosts alone; images have the size that the config says.
        force: overwrite an existing file.

    Raises:
        DistillError: the folder holds no whole model, or see :func:`kdgraft.onnx.export_onnx`.
    """
    if size is not None:
        raise DistillError(
            "--size is for detectors and segmentors; the lengths of texts may vary, and images have the config's size"
        )
    model = _model(Path(folder)).float().eval()
    inputs = _inputs(model)
    return export_onnx(
        model,
        inputs,
        out,
        freedoms=[*_freedoms(inputs)],
        about={"model": type(model).__name__, "task": task_of(model), **_labels(model)},
        left_out=LEFT_OUT,
        force=force,
    )


def _model(folder: Path) -> PreTrainedModel:
    if (folder / "adapter_config.json").is_file():
        raise DistillError(
            f"{folder} has adapters alone; merge them first: AutoPeftModel….from_pretrained(…).merge_and_unload().save_pretrained(…)"
        )
    if not (folder / "config.json").is_file():
        raise DistillError(f"{folder} is not the folder of a saved model: it has no config.json")
    with one_line("export"):
        names = AutoConfig.from_pretrained(folder).architectures or []
        kind: Any = getattr(transformers, names[0], None) if names else None
        if kind is None:
            raise DistillError(f"{folder}: config.json names no class of transformers in architectures, but {names}")
        model: PreTrainedModel = kind.from_pretrained(folder)
    for part in model.modules():  # decoders may have a config of their own
        if hasattr(getattr(part, "config", None), "use_cache"):
            part.config.use_cache = False  # type: ignore[union-attr]
    return model


def _inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return inputs of at least two samples, as an axis of one is taken for fixed."""
    found = example(model, torch.device("cpu"))
    if "decoder_input_ids" in found:  # axes of the same size may be taken for one
        found["decoder_input_ids"] = found["decoder_input_ids"][:, 1:]
    alone = task_of(model) == "sequence" and "input_ids" in found and len(found["input_ids"]) == 1
    if alone:  # a classifier of texts without a padding token
        return found
    return {name: value if len(value) > 1 else torch.cat([value, value]) for name, value in found.items()}


def _freedoms(inputs: Mapping[str, Tensor]) -> Iterator[Freedom]:
    """Yield what may vary, the freest first."""
    along = {name: value.ndim - 1 for name, value in inputs.items() if name in (*TOKENS, "input_values")}
    many = next(iter(inputs.values())).shape[0] > 1
    batch = dict.fromkeys(inputs, (0,) if many else ())
    if along:
        axes = {name: (*batch[name], *((along[name],) if name in along else ())) for name in inputs}
        told = "batch and length" if many else "the length"
        yield Freedom(told, axes, [_longer(inputs, along, many)])
    if many:
        yield Freedom("batch", batch, [{name: torch.cat([value, value[:1]]) for name, value in inputs.items()}])


def _longer(inputs: Mapping[str, Tensor], along: Mapping[str, int], many: bool) -> dict[str, Tensor]:
    """Return longer inputs, more of them, with padding at the end of the first one."""
    found = {
        name: torch.cat([value, value.narrow(along[name], 0, value.shape[along[name]] - 1)], along[name])
        if name in along
        else value
        for name, value in inputs.items()
    }
    if many:
        found = {name: torch.cat([value, value[:1]]) for name, value in found.items()}
        if "attention_mask" in found:
            found["attention_mask"] = found["attention_mask"].clone()
            found["attention_mask"][0, ..., -2:] = 0
    return found


def _labels(model: PreTrainedModel) -> dict[str, str]:
    names = getattr(model.config, "id2label", None) or {}
    return {"labels": ", ".join(str(name) for _, name in sorted(names.items()))} if names else {}
