"""Checks of a distilled config before anything is imported, built or read: its names, its taps and its files."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal

from mmengine.config import Config

from kdgraft.errors import DistillError, nearest
from kdgraft.isolation import isolated_rng
from kdgraft.listing import written
from kdgraft.readers import Reader
from kdgraft.registry import RECIPES, TERMS, Registry, expand_recipe
from kdgraft.taps import Tap
from kdgraft.terms import build_terms

from .configs import config_file, imported_names

Kind = Literal["TERMS", "RECIPES"]
_CORE = {"TERMS": TERMS, "RECIPES": RECIPES}


def refuse(mistakes: Sequence[str]) -> None:
    """Raise one :class:`DistillError` that lists all mistakes, if there are any."""
    if len(mistakes) == 1:
        raise DistillError(mistakes[0])
    if mistakes:
        numbered = "; ".join(f"({number}) {mistake}" for number, mistake in enumerate(mistakes, 1))
        raise DistillError(f"{len(mistakes)} mistakes: {numbered}")


def check_outline(config: Config, plugin: str) -> None:
    """Check names, the notation of taps, and files, without importing anything.

    Args:
        config: a config whose ``model`` is one of this suite's.
        plugin: the package that registers its terms and recipes, such as ``"kdgraft_det"``.

    Raises:
        DistillError: the config has mistakes; the message lists all of them.
    """
    model = config.model
    mistakes: list[str] = []
    terms = model.get("terms")
    known = _known(config, plugin, "TERMS")
    for spec in terms if isinstance(terms, (list, tuple)) else ():
        mistakes += _of_term({"type": spec} if isinstance(spec, str) else spec, known)
    recipe = model.get("recipe")
    name = recipe.get("type") if isinstance(recipe, Mapping) else recipe
    recipes = _known(config, plugin, "RECIPES")
    if isinstance(name, str) and recipes is not None and name not in recipes:
        mistakes.append(f"no recipe is called {name!r}{nearest(name, recipes)}")
    refuse([*dict.fromkeys((*mistakes, *_of_files(config)))])


def check_terms(model: Mapping[str, Any], terms: Registry, recipes: Registry, reader: type[Reader]) -> None:
    """Build every term once, to find mistakes in its arguments before any model is built.

    Raises:
        DistillError: there are mistakes; the message lists all of them.
    """
    mistakes: list[str] = []
    given = model.get("terms")
    specs = list(given) if isinstance(given, (list, tuple)) else []
    with isolated_rng():
        try:
            specs = [*expand_recipe(model.get("recipe"), recipes), *specs]
        except DistillError as error:
            mistakes.append(str(error))
        for spec in specs:
            try:
                build_terms([spec], terms, reader)
            except DistillError as error:
                mistakes.append(str(error))
    refuse(mistakes)


def missing_data(config: Config, loaders: Sequence[str] = ("train_dataloader", "val_dataloader")) -> list[str]:
    """Return the files and folders of the data sets (by default of training and validation) that do not exist."""
    found = [f"{loader}: {path}" for loader in loaders for path in _data_files(config.get(loader)) if not path.exists()]
    return list(dict.fromkeys(found))


def _known(config: Config, plugin: str, kind: Kind) -> list[str] | None:
    """Return the names that a config may use, or ``None`` where only an import would tell them."""
    module = sys.modules.get(plugin)
    if module is not None:
        return list(getattr(module, kind))
    if set(imported_names(config)) - {plugin}:
        return None  # another module may register names
    group = f"kdgraft.{plugin.removeprefix('kdgraft_')}.{kind.lower()}"
    points = (point.name for point in entry_points(group=group))
    return list(dict.fromkeys((*_CORE[kind], *written(plugin, kind), *points)))


def _of_term(spec: Any, known: list[str] | None) -> Iterator[str]:
    if not isinstance(spec, Mapping):
        return
    kind = spec.get("type")
    if isinstance(kind, str) and known is not None and kind not in known:
        yield f"no term is called {kind!r}{nearest(kind, known)}"
    for key in ("tap", "student_tap", "teacher_tap"):
        taps = spec.get(key)
        for tap in taps if isinstance(taps, (list, tuple)) else [taps]:
            if isinstance(tap, str):
                try:
                    Tap.parse(tap)
                except DistillError as error:
                    yield str(error)


def _of_files(config: Config) -> Iterator[str]:
    several = config.model.get("teachers")
    for teacher in (config.model.get("teacher"), *(several.values() if isinstance(several, Mapping) else ())):
        if not isinstance(teacher, Mapping):
            continue
        source = teacher.get("config")
        if isinstance(source, str):
            try:
                config_file(source)
            except DistillError as error:
                yield str(error)
        if teacher.get("store") is None and _is_missing(teacher.get("checkpoint")):
            yield f"checkpoint not found: {teacher['checkpoint']}"
    if _is_missing(config.get("load_from")):
        yield f"load_from not found: {config.load_from}"


def _is_missing(path: Any) -> bool:
    """Return true for the path of a file that does not exist; the host looks up addresses and other schemes."""
    return isinstance(path, str) and path != "" and "://" not in path and not Path(path).expanduser().is_file()


def _data_files(entry: Any) -> Iterator[Path]:
    """Yield the annotation files and folders that a data set's config names, also inside data sets that wrap others."""
    if isinstance(entry, (list, tuple)):
        for item in entry:
            yield from _data_files(item)
    if not isinstance(entry, Mapping) or entry.get("backend_args"):
        return
    root = entry.get("data_root") or ""
    prefixes = entry.get("data_prefix")
    for name in (entry.get("ann_file"), *(prefixes.values() if isinstance(prefixes, Mapping) else ())):
        if isinstance(name, str) and name and "://" not in name:
            with suppress(TypeError):  # the host refuses a root that is not a path
                yield Path(root) / name
    for value in entry.values():
        yield from _data_files(value)
