"""Columns of a recipe's sets: their texts, and the labels, tags, numbers and classes in them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import ClassLabel, Dataset

from kdgraft.errors import DistillError

from .recipe_tasks import LABELLED, LABELS, TASKS

TextColumns = str | Sequence[str]
"""A column of texts (or of lists of words), or the two columns of pairs of texts."""


def columns_of(task: str, data: Mapping[str, Any], sets: Mapping[str, Dataset]) -> tuple[TextColumns, str | None]:
    """Return the columns of texts and labels; a :class:`DistillError` is raised where a set lacks one.

    With ``labels: false`` the training set needs no labels, and the evaluation set, which names the classes, must be there.

    Args:
        task: the recipe's task, whose samples are texts, or pairs of texts, with one label each or none.
        data: the recipe's ``data``.
        sets: its sets.
    """
    ((text, standard),), label = TASKS[task].columns.items(), TASKS[task].label
    texts = data.get(text) or standard
    unlabelled = data.get("labels") is False
    if unlabelled and task in LABELLED and "eval" not in sets:
        raise DistillError("data.labels is false, so that data.eval must name the classes; add it")
    labels = data.get(label) or LABELS[label] if label else None
    for split, found in sets.items():
        wanted = {text: texts, **({label: labels} if labels and not (unlabelled and split == "train") else {})}
        check_columns(split, found, wanted)
    return texts, labels


def own_columns(task: str, data: Mapping[str, Any], sets: Mapping[str, Dataset]) -> dict[str, Any]:
    """Return the columns of a task whose samples have a layout of their own, by the entry of ``data`` that names each.

    Raises:
        DistillError: a set lacks one of them.
    """
    told = TASKS[task]
    standard = {**told.columns, told.label: LABELS[told.label]}
    found = {entry: data.get(entry) or column for entry, column in standard.items() if data.get(entry) or column}
    for split, one in sets.items():
        check_columns(split, one, found)
    return found


def check_columns(split: str, found: Dataset, wanted: Mapping[str, Any]) -> None:
    """Raise a :class:`DistillError` where a set lacks a column.

    Args:
        split: ``"train"`` or ``"eval"``.
        found: the set.
        wanted: the column, or several, by the entry of ``data`` that names it.
    """
    owner = "training" if split == "train" else "evaluation"
    for entry, columns in wanted.items():
        for column in columns_in(columns):
            if column not in found.column_names:
                raise DistillError(
                    f"the {owner} set has no column {column!r} but {', '.join(found.column_names)}; name it with data.{entry}"
                )


def texts_of(found: Dataset, column: TextColumns, *, words: bool = False) -> list[list[Any]]:
    """Return the texts of each column, or its lists of words.

    Raises:
        DistillError: a sample is neither; the message names the first one, which the tokenizer's own error does not.
    """
    read = [list(found[name][:]) for name in columns_in(column)]  # at once, as one by one takes seconds
    for name, values in zip(columns_in(column), read, strict=True):
        for i, value in enumerate(values):
            fine = isinstance(value, list) and all(isinstance(word, str) for word in value)
            if not (fine if words else isinstance(value, str)):
                wanted = "a list of words" if words else "a text"
                raise DistillError(f"column {name!r} must hold {wanted} per sample; sample {i} has {short(value)}")
    return read


def check_tags(found: Dataset, text: TextColumns, label: str) -> None:
    """Raise a :class:`DistillError` unless every word has a tag."""
    (words,), tags = texts_of(found, text, words=True), _classes("tokens", found, label)
    for i, (some, own) in enumerate(zip(words, tags, strict=True)):
        if len(some) != len(own):
            raise DistillError(f"sample {i} has {len(some)} {text} and {len(own)} {label}; every word needs a tag")


def class_names(task: str, found: Dataset, column: str, given: Sequence[Any] | None = None) -> list[str]:
    """Return the classes of a column of labels or tags: those given, those that the set declares, or those that occur, sorted.

    Args:
        task: the recipe's task.
        found: the set.
        column: its column of labels.
        given: the names in ``data.classes``, in their order.

    Raises:
        DistillError: the column is malformed, has a single class, or has one that is not among those given.
    """
    told = None if given is None else [str(name) for name in given]
    if task == "multi_label" and (width := _vector_width(found, column)):
        if told is not None and len(told) != width:
            raise DistillError(
                f"column {column!r} has {width} numbers a sample, and data.classes has {len(told)} names"
            )
        return told or [f"LABEL_{i}" for i in range(width)]
    declared = _declared(found, column)
    values = _classes(task, found, column)
    seen = {name for value in values for name in (value if isinstance(value, list) else [value])}
    if told is not None:
        if missing := sorted(seen - {*told}):
            raise DistillError(
                f"column {column!r} has the class {missing[0]!r}, which data.classes lacks; add it there"
            )
        return told
    if len(seen) < 2:
        raise DistillError(
            f"column {column!r} holds only one class, {', '.join(seen) or 'none'}; training needs at least two"
        )
    return list(declared) if declared is not None else sorted(seen)


def _declared(found: Dataset, column: str) -> list[str] | None:
    feature = found.features[column]
    feature = getattr(feature, "feature", feature)
    return feature.names if isinstance(feature, ClassLabel) else None


def _classes(task: str, found: Dataset, column: str) -> list[Any]:
    """Return the name of each sample's class, or the names of its tags."""
    declared = _declared(found, column)
    values: list[Any] = []
    for i, value in enumerate(found[column]):
        where = f"sample {i} of column {column!r}"
        if task in ("tokens", "multi_label"):
            if not isinstance(value, list):
                kind = "tags" if task == "tokens" else "classes, or of a 0 or 1 for each class"
                raise DistillError(f"{where} must be a list of {kind}, got {short(value)}")
            values.append([_class(one, declared, where) for one in value])
        else:
            values.append(_class(value, declared, where))
    return values


def _class(value: Any, declared: Sequence[str] | None, where: str) -> str:
    """Return the name of a class; a whole number that was read as a float, as from a csv with gaps, is that number."""
    if declared is not None and isinstance(value, int):
        if not 0 <= value < len(declared):
            raise DistillError(f"{where} has no label ({value}); leave such samples out")
        return declared[value]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise DistillError(f"{where} has no label; leave such samples out")
    if isinstance(value, float):
        if not value.is_integer():
            raise DistillError(f"{where} is {value}, which is not a class; use task: regression for numbers")
        value = int(value)
    if not isinstance(value, (str, int)):
        raise DistillError(f"{where} must be one class, a text or a whole number, got {short(value)}")
    return str(value)


def _vector_width(found: Dataset, column: str) -> int:
    """Return the number of classes of a column whose samples have a 0 or 1 for each; 0 for a column of names of classes.

    Raises:
        DistillError: a sample has another number, or more or fewer than the first one.
    """
    values = list(found[column][:])
    if _declared(found, column) is not None or any(
        not isinstance(row, list) or not all(isinstance(one, (int, float)) for one in row) for row in values
    ):
        return 0
    width = len(values[0])
    for i, row in enumerate(values):
        where = f"sample {i} of column {column!r}"
        if any(one not in (0, 1) for one in row):
            raise DistillError(f"{where} must have a 0 or 1 for each class, or the names of classes, got {short(row)}")
        if len(row) != width:
            raise DistillError(f"{where} has {len(row)} numbers, and the first sample {width}; give one for each class")
    return width


def _numbers(found: Dataset, column: str) -> list[float]:
    for i, value in enumerate(found[column]):
        fine = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not fine or _declared(found, column) is not None:
            raise DistillError(
                f"task regression needs numbers, and sample {i} of column {column!r} has {short(value)}; use task: classification"
            )
    return [float(value) for value in found[column]]


def labels_of(
    task: str, found: Dataset, text: TextColumns, label: str, names: Sequence[str] | None, encoded: Any
) -> list[Any]:
    """Return the number, the class, a 0 or 1 for each class, or the tags of each sample."""
    if task == "regression":
        return _numbers(found, label)
    ids = {name: i for i, name in enumerate(names or [])}

    def number(name: str) -> int:
        # A class that the training set lacks counts as wrong, whatever the prediction.
        return ids.get(name, -100)

    if task == "classification":
        return [number(name) for name in _classes(task, found, label)]
    if task == "multi_label":
        return _several(found, label, ids)
    check_tags(found, text, label)
    rows = []
    for i, tags in enumerate(_classes(task, found, label)):
        places = encoded.word_ids(i)
        words = zip(places, [None, *places[:-1]], strict=True)
        rows.append([number(tags[word]) if word not in (None, before) else -100 for word, before in words])
    return rows


def _several(found: Dataset, column: str, ids: Mapping[str, int]) -> list[list[float]]:
    """Return a 0 or 1 for each class of each sample."""
    if width := _vector_width(found, column):
        if width != len(ids):
            raise DistillError(f"column {column!r} has {width} numbers a sample, and there are {len(ids)} classes")
        return [[float(one) for one in row] for row in found[column][:]]
    rows = []
    for i, names in enumerate(_classes("multi_label", found, column)):
        for name in names:
            if name not in ids:
                raise DistillError(
                    f"sample {i} of column {column!r} has the class {name!r}, which the training set lacks"
                )
        rows.append([float(name in names) for name in ids])
    return rows


def columns_in(column: TextColumns) -> list[str]:
    """Return one column, or several, as a list."""
    return [column] if isinstance(column, str) else list(column)


def short(value: Any) -> str:
    """Return a value as an error shows it, in at most 40 characters."""
    said = repr(value)
    return said if len(said) <= 40 else said[:39] + "…"
