"""Image processors of recipe files: the folder's own, or made from settings for a type of models, without the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import transformers
from transformers import AutoConfig, AutoImageProcessor
from transformers.image_processing_utils import BaseImageProcessor

from kdgraft.errors import DistillError, nearest

from .checks import check_folder, one_line

FILE = "preprocessor_config.json"
"""The file in which a folder keeps its image processor."""
_OF_TYPES = {
    "conditional_detr": "ConditionalDetr",
    "d_fine": "RTDetr",
    "dab-detr": "ConditionalDetr",
    "deformable_detr": "DeformableDetr",
    "detr": "Detr",
    "lw_detr": "DeformableDetr",
    "rt_detr": "RTDetr",
    "rt_detr_v2": "RTDetr",
    "table-transformer": "Detr",
    "yolos": "Yolos",
}
"""The image processors with which transformers' detectors were published, by the type of the model."""
_SEEN = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
"""The settings of a processor that say which values a pixel has."""


def processor_folder(config: Mapping[str, Any]) -> str | Path | None:
    """Return the folder of a recipe's student, or else of its teacher, that has an image processor."""
    for source in (config.get("student"), config.get("teacher")):
        if isinstance(source, (str, Path)) and (Path(source) / FILE).is_file():
            return source
    return None


def build_processor(config: Mapping[str, Any]) -> BaseImageProcessor:
    """Return a recipe's image processor; all models of the recipe are given what it makes.

    The processors that use PIL are taken, which need no torchvision and give the same numbers on every machine.

    Args:
        config: the recipe, whose ``processor`` is a folder, or settings. Settings change the processor of the student's or else the
            teacher's folder; where neither has one, that of the student's type.

    Raises:
        DistillError: there is none for this type of models, a setting is unknown, images of unequal sizes would make no batch, or
            a teacher was trained on images with other values.
    """
    spec = config.get("processor")
    told = dict(spec) if isinstance(spec, Mapping) else {}
    folder = spec if isinstance(spec, (str, Path)) else processor_folder(config)
    with one_line("processor"):
        if folder is not None:
            found = _loaded(folder)
            kind: Any = type(found)
        else:
            kind, found = _class_of(config["student"]), None
        known = get_type_hints(kind.valid_kwargs)
        for key in told:
            if key not in known:
                raise DistillError(f"processor: a {kind.__name__} has no setting {key!r}{nearest(str(key), known)}")
        if found is None or told:
            kept = {} if found is None else {k: v for k, v in found.to_dict().items() if k in known}
            found = kind(**{**kept, **told})
    _check_batches(found)
    _check_teachers(config, found)
    return found


def _class_of(student: Any) -> Any:
    kind = student["model_type"] if isinstance(student, Mapping) else AutoConfig.from_pretrained(student).model_type
    if kind not in _OF_TYPES:
        raise DistillError(
            f"processor: there is none known for models of type {kind!r}; give processor: a folder with a {FILE}"
        )
    return _named(f"{_OF_TYPES[kind]}ImageProcessor")


def _named(name: str) -> Any:
    """Return the class of a processor by the name under which its folder keeps it, in the version that uses PIL."""
    name = name.removesuffix("Fast").removesuffix("Pil")
    return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name, None)


def _loaded(folder: str | Path) -> BaseImageProcessor:
    check_folder("processor", folder, FILE)
    file = Path(folder) / FILE
    told = json.loads(file.read_text(encoding="utf-8")).get("image_processor_type") if file.is_file() else None
    kind = _named(told) if isinstance(told, str) else None
    return (kind or AutoImageProcessor).from_pretrained(folder)  # type: ignore[no-any-return]


def _check_batches(found: Any) -> None:
    size = found.size
    fixed = bool(getattr(size, "height", None) and getattr(size, "width", None)) and getattr(found, "do_resize", True)
    if not fixed and not getattr(found, "do_pad", False):
        raise DistillError(
            "processor: images of unequal sizes make no batch; set size: {height: 480, width: 480}, or do_pad: true"
        )


def _check_teachers(config: Mapping[str, Any], found: Any) -> None:
    """Raise a :class:`DistillError` where a teacher's folder says that it was trained on images with other values."""
    several = config.get("teachers")
    teachers = {"teacher": config.get("teacher"), **(several if isinstance(several, Mapping) else {})}
    for name, source in teachers.items():
        if not isinstance(source, (str, Path)) or not (Path(source) / FILE).is_file():
            continue
        with one_line(f"the processor of {name}"):
            theirs = _loaded(source)
        for key in _SEEN:
            ours, own = (getattr(one, key, None) for one in (found, theirs))
            needed = getattr(theirs, "do_normalize", True) if key.startswith("image_") else True
            if needed and (list(ours) if isinstance(ours, tuple) else ours) != (
                list(own) if isinstance(own, tuple) else own
            ):
                raise DistillError(
                    f"{name} was trained on images with {key}={own!r}, and this recipe's processor has {ours!r}; give processor the "
                    f"teacher's folder, {source}"
                )
