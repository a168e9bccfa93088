"""Sources that are models of Hugging Face, or folders that ``save_pretrained`` wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from kdgraft.classes import class_order
from kdgraft.errors import DistillError, WiringError
from kdgraft.sources import Cached, Peer, Source, Teacher, gather_sources
from kdgraft.sources.base import share_parameters

from .absent import Absent
from .adapters import BASE, AdaptersOff, base_of
from .cache import TeacherCache
from .checks import flat
from .class_teachers import ClassTeacher
from .loading import load_whole
from .registry import SOURCES
from .tasks import auto_class

SENTENCES = "modules.json"
"""The file by which a folder of sentence-transformers is known."""


def build_sources(teacher: Any, teachers: Any, student: nn.Module, cache: TeacherCache | None) -> dict[str, Source]:
    """Build the sources, with their weights loaded.

    Args:
        teacher: a model, a :class:`~kdgraft.Source`, or a folder.
        teachers: several by name.
        student: the student.
        cache: the cache of the outputs of the only teacher.

    Returns:
        The sources by name.

    Raises:
        DistillError: there is no teacher, a folder holds no model, or weights do not fit; the message lists their keys.
    """
    absent = teacher is None and teachers is None and cache is not None and cache.teacher is not None
    if absent and cache is not None:
        return {"teacher": Cached(Teacher(cache.stand_in()), cache, absent=True)}
    if teacher is None and teachers is None:
        raise DistillError("terms need teacher=…: a model, or the folder that save_pretrained wrote")
    found = gather_sources(
        teacher,
        teachers,
        lambda name, given: _teacher(name, given, student),
        lambda name, given: _load(_folder(name, given), student),
        SOURCES,
    )
    for name, source in found.items():
        if isinstance(source, Absent):
            if len(found) > 1 or cache is not None:
                kind = type(source).__name__.lower()
                raise DistillError(
                    f"{name!r} is {kind}, which stands for one teacher; leave out other sources, and a TeacherCache"
                )
            source.stand_for(student)
        source.load()
        if isinstance(source, (Teacher, Peer)):
            source.model = base_of(source.model)
        if isinstance(source, ClassTeacher):
            source.fit_to(student)
    return found if cache is None else _cached(found, cache)


def _cached(found: dict[str, Source], cache: TeacherCache) -> dict[str, Source]:
    """Return the only teacher with a cache of its outputs."""
    (name, first), *others = found.items()
    if isinstance(first, ClassTeacher):
        raise DistillError(f"a cache is for a classifier, and {type(first).__name__} is none; leave out the cache")
    if isinstance(first, AdaptersOff):
        raise DistillError("a cache is for a teacher that is not there, and teacher='base' always is; leave it out")
    if others or not isinstance(first, Teacher):
        raise DistillError("a cache holds the outputs of one teacher; leave it out with several teachers or peers")
    cache.belongs_to(first.model)
    return {name: Cached(first, cache)}


def _teacher(name: str, given: Any, student: nn.Module) -> Teacher:
    if given == BASE:
        return AdaptersOff(student)
    if isinstance(given, (str, Path)):
        given = _load(given, student) if not (Path(given) / SENTENCES).is_file() else _load_sentences(given)
    if not isinstance(given, nn.Module):
        raise DistillError(f"{name} must be a model or a folder, got {given!r}")
    model = base_of(given)
    if share_parameters(student, model):
        raise WiringError(
            "student and teacher share parameters, which the teacher would freeze; pass a copy.deepcopy of one"
        )
    if not hasattr(model, "config"):
        raise DistillError(f"the teacher must be a Hugging Face model, got {type(model).__name__}")
    return Teacher(model)


def _load_sentences(folder: str | Path) -> Any:
    """Load a folder that sentence-transformers wrote."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise DistillError(
            f"{folder} is a model of sentence-transformers; pip install sentence-transformers, or give the transformer's own folder"
        ) from None
    try:
        return SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise DistillError(f"cannot load the teacher {folder}: {flat(error)}") from None


def _folder(name: str, given: Any) -> str | Path:
    if not isinstance(given, (str, Path)):
        raise DistillError(f"{name} must be a model or a folder, got {given!r}")
    return given


def _load(folder: str | Path, student: nn.Module) -> nn.Module:
    loads = auto_class(student)
    if loads is None:
        raise DistillError(
            f"{folder} cannot be loaded, as the kind of {type(student).__name__} is unknown; load the teacher and pass the model"
        )
    return load_whole(loads, folder)


def compare_classes(student: nn.Module, sources: Mapping[str, Source]) -> None:
    """Set the permutation of each teacher's classes into the student's order, by the class names in their configs.

    Raises:
        WiringError: the names differ, or the order differs for a peer, which trains on the student's labels unchanged.
    """
    for name, source in sources.items():
        if not isinstance(source, (Teacher, Peer)):
            continue
        names = _class_names(student), _class_names(source.model)
        if any(names):
            source.class_order = class_order(*names, ("student's config", "teacher's config"))
        if source.trains and source.class_order is not None:
            raise WiringError(
                f"the peer {name!r} has the student's classes in another order; give both configs the same id2label"
            )


def _class_names(model: Any) -> list[str] | None:
    """Return the class names in ``config.id2label``; ``None`` for the default names, LABEL_0 and so on."""
    names = getattr(model.config, "id2label", None)
    if not names:
        return None
    found = [names[key] for key in sorted(names)]
    return None if all(name == f"LABEL_{i}" for i, name in enumerate(found)) else found
