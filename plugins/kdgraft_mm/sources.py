"""Sources with models of mmengine, built from configs, each with its own view of the student's batch."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import Registry as MMRegistry
from mmengine.utils import import_modules_from_strings
from torch import Tensor, nn

from kdgraft.errors import DistillError, WiringError, check_flag, nearest
from kdgraft.files import digest
from kdgraft.inheriting import check_alike
from kdgraft.pixels import Normalisation
from kdgraft.sources import FeatureTeacher, Itself, Source, Teacher, gather_sources, library_teacher

from .checkpoints import SAFE_TYPES
from .configs import MissingConfig, checked_model, load_config, model_of
from .resolution import Resolution, samples_padded_to, teacher_scale
from .stored import Stored, StoredFeatures
from .views import TeacherView, image_sizes

KNOWN = ("config", "checkpoint", "precision", "trusted", "scale")
Batched = tuple[Tensor, Any]
"""Inputs ``(B, C, H, W)`` and data samples."""


class SourceView:
    """One source's view of the student's batch: in its normalisation and, if the source has its own, in its resolution.

    Args:
        student: the student.
        source: a source with its own model. One without (an ensemble of others, or the student itself) needs no view.
    """

    def __init__(self, student: Any, source: Source) -> None:
        self.resolution: Resolution | None = None
        self._view: TeacherView | None = None
        if isinstance(source, Itself) or source.members != (source.name,):
            return
        ours, theirs = student.data_preprocessor, _preprocessor(source)
        self._view = TeacherView(ours, theirs)
        if source.scale != 1:
            self.resolution = Resolution.of(Fraction(source.scale).limit_denominator(1000), ours, theirs)

    def __call__(self, delivered: Batched, reduced: Batched) -> Batched:
        """Return the source's batch.

        Args:
            delivered: the batch that the pipeline delivered.
            reduced: the student's batch, which is the same one if no source has its own resolution.
        """
        inputs, samples = reduced if self.resolution is None else delivered
        if self._view is None:
            return inputs, samples
        view = self._view(inputs, image_sizes(samples))
        if self.resolution is None:
            return view, samples
        padded = reduced[0].shape[-2], reduced[0].shape[-1]
        view = self.resolution.teacher_inputs(view, padded, self._view.pad_value)
        return view, samples_padded_to(samples, (view.shape[-2], view.shape[-1]))


def _preprocessor(source: Source) -> nn.Module | Normalisation:
    if isinstance(source, FeatureTeacher):
        return source.normalisation
    return source.model.get_submodule("data_preprocessor")


def build_sources(teacher: Any, teachers: Any, models: MMRegistry) -> dict[str, Source]:
    """Return the sources of a config by name.

    Args:
        teacher: a single source, as in :func:`build_teacher`, or a dict of another type.
        teachers: several sources by name.
        models: the host's model registry.
    """
    return gather_sources(
        teacher,
        teachers,
        lambda name, spec: build_teacher(spec, models, name),
        lambda name, spec: _model(_checked(name, spec, ("config",), ("config",), "dict(config='…')"), models, name),
    )


def check_scales(owner: str, teacher: Any, teachers: Any, scales: bool, distils: bool) -> None:
    """Raise a :class:`DistillError` for resolutions of sources that are not possible.

    Args:
        owner: the name of the graft, for messages.
        teacher: see :func:`build_sources`.
        teachers: see :func:`build_sources`.
        scales: true where the host can reduce the delivered batch for the student.
        distils: true where there are terms.
    """
    specs = [teacher, *(teachers.values() if isinstance(teachers, Mapping) else ())]
    found = {teacher_scale(spec) for spec in specs} - {Fraction(1)}
    if not found:
        return
    if not scales:
        raise DistillError(
            f"{owner} takes no teacher scale: labels of pixels are not brought to the student's size; leave it out"
        )
    if len(found) > 1:
        raise DistillError(
            f"{owner}: the pipeline delivers one resolution, and the teachers have {len(found)} scales other than 1; give all "
            "of those the same"
        )
    if not distils:
        raise DistillError(
            f"{owner}: without terms the student would not be reduced by the teacher's scale; leave scale out and "
            "resize in the pipeline"
        )


def check_inheritance(student: Any, sources: Mapping[str, Source], paths: tuple[str, ...]) -> None:
    """Raise a :class:`WiringError` unless student and teacher have modules of the same shapes at these paths."""
    if not paths:
        return  # sources such as an Ensemble have no model of their own
    if len(sources) > 1 or not all(isinstance(source, Teacher) for source in sources.values()):
        raise WiringError(f"inherit takes weights from one teacher, and there are {', '.join(sources)}; leave it out")
    for name, source in sources.items():
        if isinstance(source, Stored):
            raise WiringError(
                f"inherit takes weights from a teacher, and {name!r} has a store in their place; leave one out"
            )
        if isinstance(source, FeatureTeacher):
            raise WiringError(
                f"inherit takes weights from a model of the host, and {name!r} is a {type(source.weighed).__name__}; leave it out"
            )
        check_alike(student, source.model, paths, name)


def build_teacher(spec: Any, models: MMRegistry, name: str = "teacher") -> Teacher:
    """Build a teacher's architecture. Its weights are read when training starts.

    Args:
        spec: ``dict(config=…, checkpoint=…)`` with ``config`` a path, ``"mmdet::…"``, a model or a whole config, and
            optionally ``precision`` and ``trusted`` (see :class:`kdgraft.Teacher`) and ``scale`` (see
            :meth:`~kdgraft_mm.graft.Graft.build`); or ``dict(type="transformers", …)``, a teacher of features from another library:
            see :func:`kdgraft.sources.library_teacher`, with ``scale`` beside. With ``store="folder"``, which ``kdgraft cache``
            filled, the teacher does not run, and needs no checkpoint.
        models: the host's model registry.
        name: the name of the teacher in messages.

    Raises:
        DistillError: an argument is missing or misspelt.
        MissingConfig: the config file does not exist.
    """
    if isinstance(spec, Mapping) and spec.get("store") is not None:
        return _stored(spec, models, name)
    if isinstance(spec, Mapping) and "type" in spec:
        return _of_library(spec, name)
    spec = _checked(name, spec, KNOWN, ("config", "checkpoint"))
    trusted = spec.get("trusted", False)
    check_flag(name, "trusted", trusted)
    made = Teacher(
        _model(spec, models, name),
        spec["checkpoint"],
        precision=spec.get("precision", "inherit"),
        trusted=trusted,
        safe_types=SAFE_TYPES,
    )
    made.scale = float(teacher_scale(spec))
    return made


def _stored(spec: Mapping[str, Any], models: MMRegistry, name: str) -> Stored:
    """Build a teacher whose outputs are in a store; its checkpoint is not read."""
    folder = spec["store"]
    if not isinstance(folder, (str, Path)):
        raise DistillError(f"{name}: store must be the folder that kdgraft cache filled, got {folder!r}")
    rest = {key: value for key, value in spec.items() if key != "store"}
    identity = identity_of(rest)
    if "type" in rest:
        return StoredFeatures(_of_library(rest, name), str(folder), identity)
    rest = {"checkpoint": None, **_checked(name, rest, KNOWN, ("config",))}
    made = Teacher(_model(rest, models, name))
    made.scale = float(teacher_scale(rest))
    return Stored(made, str(folder), identity)


def identity_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return what tells one teacher from another without its weights: its scale, and a digest of its model or its library's settings."""
    if "type" in spec:
        told: Any = {key: value for key, value in spec.items() if key not in ("checkpoint", "precision", "trusted")}
    else:
        told = model_of(load_config(spec["config"])).to_dict()
    return {"model": digest(told), "scale": str(teacher_scale(spec))}


def teacher_specs(model: Any) -> dict[str, Any]:
    """Return what a distilled model's config says of its sources, by name."""
    several = model.get("teachers")
    found = several if isinstance(several, Mapping) else {"teacher": model.get("teacher")}
    return {name: spec for name, spec in found.items() if isinstance(spec, Mapping)}


def _of_library(spec: Mapping[str, Any], name: str) -> FeatureTeacher:
    model = spec.get("model")
    if spec["type"] == "transformers" and isinstance(model, str) and not Path(model).expanduser().is_dir():
        raise MissingConfig(f"{name}: the folder {model} is missing; download the model and give its folder")
    own = {key: value for key, value in spec.items() if key != "scale"}
    made = library_teacher(own, name, images=None, safe_types=SAFE_TYPES)
    made.scale = float(teacher_scale(spec))
    return made


def _checked(
    name: str,
    spec: Any,
    known: tuple[str, ...],
    needed: tuple[str, ...],
    right: str = "",
) -> Mapping[str, Any]:
    """Return a source's dict, like ``right`` or else a teacher's; raise a :class:`DistillError` for a key that is unknown or missing."""
    if not isinstance(spec, Mapping):
        raise DistillError(f"{name} must be {right or 'dict(config=…, checkpoint=…)'}, got {spec!r}")
    for key in spec:
        if key not in known:
            raise DistillError(f"{name} takes no argument {key!r}{nearest(key, known)}")
    for key in needed:
        if not spec.get(key):
            write = right or "teacher=dict(config='…', checkpoint='teacher.pth')"
            raise DistillError(f"{name} needs {key}=…; write {write}")
    return spec


def _model(spec: Mapping[str, Any], models: MMRegistry, name: str) -> Any:
    config = load_config(spec["config"])
    imports = config.get("custom_imports")
    if imports and not config.filename:
        import_modules_from_strings(**imports)
    model = checked_model(model_of(Config(config.to_dict())), models, name)
    return revert_sync_batchnorm(models.build(model))


def teacher_classes(teacher: Teacher) -> Any:
    """Return the class names that the teacher's checkpoint records, or ``None``."""
    meta = teacher.meta.get("dataset_meta") or teacher.meta
    return meta.get("classes") or meta.get("CLASSES")
