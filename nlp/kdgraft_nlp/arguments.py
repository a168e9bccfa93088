"""Checks of a recipe's training arguments and student config by name, type and range."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from datetime import timedelta
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from transformers import AutoConfig, TrainingArguments

from kdgraft.errors import DistillError, nearest
from kdgraft.launching import TIMEOUT
from kdgraft.registry import call

from .checks import one_line
from .tasks import AUTO_CLASSES

_LOWEST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "learning_rate": 0,
    "weight_decay": 0,
    "warmup_steps": 0,
    "seed": 0,
    "data_seed": 0,
    "save_total_limit": 1,
    "eval_accumulation_steps": 1,
    "torch_empty_cache_steps": 1,
}
"""The minimum of training arguments of which TrainingArguments accepts any number."""
_ELSEWHERE = {"output_dir": "write output: FOLDER, beside training", "resume_from_checkpoint": "use --resume"}
_FROM_DATA = ("num_labels", "id2label", "label2id", "problem_type")
"""Entries of a student's config that the task and the data determine."""
_BY_KEYWORD = ("attn_implementation", "dtype", "torch_dtype", "rope_theta", "rope_scaling")
"""Keywords that configs store under another name."""


def training_mistakes(training: Mapping[str, Any]) -> list[str]:
    """Return the mistakes in single training arguments; TrainingArguments itself checks few values."""
    hints = get_type_hints(TrainingArguments)
    known = [field.name for field in fields(TrainingArguments) if field.init]
    told = []
    for key, value in training.items():
        lowest = _LOWEST.get(str(key), -math.inf)
        if key in _ELSEWHERE:
            told.append(f"training.{key} has no effect in a recipe; {_ELSEWHERE[key]}")
        elif key not in known:
            told.append(f"training takes no argument {key!r}{nearest(str(key), known)}")
        elif value is not None and not _typed(value, hints[key]):
            told.append(f"training.{key} must be {_named(hints[key])}, got {value!r}")
        elif isinstance(value, float) and not math.isfinite(value):
            told.append(f"training.{key} must be finite, got {value!r}")
        elif isinstance(value, (int, float)) and value < lowest:
            told.append(f"training.{key} must be >= {lowest:g}, got {value!r}")
    if training.get("max_steps") == 0 or (training.get("num_train_epochs") == 0 and not training.get("max_steps")):
        told.append("training.max_steps or training.num_train_epochs must be greater than 0")
    if isinstance(training.get("seed"), int) and training["seed"] >= 2**32:
        told.append(f"training.seed must be < {2**32}, got {training['seed']}")
    return told


def _typed(value: Any, hint: Any) -> bool:
    """Return whether a value is of an annotated type; any value fits an annotation that is not a plain type."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(_typed(value, part) for part in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    kind = origin or hint
    return isinstance(value, kind) if isinstance(kind, type) else True


def _named(hint: Any) -> str:
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return " or ".join(getattr(part, "__name__", str(part)) for part in parts if part is not type(None))


def training_arguments(config: Mapping[str, Any]) -> TrainingArguments:
    """Build the training arguments of a recipe, without reports by default."""
    training = dict(config.get("training") or {})
    training.setdefault("report_to", [])
    _join(training)
    with one_line("training"):
        return call(TrainingArguments, {"output_dir": config.get("output", "work_dirs/nlp"), **training}, "training")


def _join(training: Mapping[str, Any]) -> None:
    """Make the process group of a training on CPUs: transformers gives its time-out to those on accelerators alone."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1 and {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if not several or not training.get("use_cpu") or training.get("ddp_backend") not in (None, "gloo"):
        return
    if not torch.distributed.is_initialized():
        seconds = training.get("ddp_timeout", TIMEOUT)
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=seconds))


def check_student(spec: Mapping[str, Any], task: str | None, owner: str = "student") -> None:
    """Check the names in a student's config and in its parts; the configs themselves accept any name."""
    if not isinstance(spec.get("model_type"), str):
        raise DistillError(
            f"{owner} is a folder, or a config such as {{model_type: bert, hidden_size: 64, num_hidden_layers: 2}}"
        )
    for name in _FROM_DATA:
        if name in spec:
            raise DistillError(f"{owner}.{name} is set by the task and the data; leave it out")
    for name, value in spec.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise DistillError(f"{owner}.{name} must be finite, got {value!r}")
    with one_line(owner):
        kind = type(AutoConfig.for_model(spec["model_type"]))
    _check_names(owner, kind, spec)
    mapping = AUTO_CLASSES[task]._model_mapping if task else {}
    if task and kind not in mapping:
        raise DistillError(f"{owner}: transformers has no model of type {spec['model_type']!r} for this task")


def _check_names(owner: str, kind: Any, spec: Mapping[str, Any]) -> None:
    known = {*_BY_KEYWORD, "model_type", *vars(kind()), *kind.attribute_map}
    known |= {name for name in dir(kind) if isinstance(getattr(kind, name), property)}
    known |= {field.name for field in fields(kind)} if is_dataclass(kind) else set()
    shown = sorted(name for name in known if not name.startswith("_"))
    wrong = [f"{name!r}{nearest(str(name), shown)}" for name in spec if name not in known]
    if wrong:
        raise DistillError(f"{owner}: a config of type {kind.model_type!r} has no entry {', nor '.join(wrong)}")
    for name, part in getattr(kind, "sub_configs", {}).items():
        inner = spec.get(name)
        if isinstance(inner, Mapping):
            if part is AutoConfig:
                part = type(AutoConfig.for_model(inner["model_type"])) if "model_type" in inner else None
            if part is not None:
                _check_names(f"{owner}.{name}", part, inner)
