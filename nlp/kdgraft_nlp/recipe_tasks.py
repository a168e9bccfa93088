"""The tasks of recipe files: their models, the columns and other entries of ``data`` that they read, and their metrics."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kdgraft.errors import DistillError, check_number, nearest

from .chats import is_chat


class RecipeTask(NamedTuple):
    """A task of recipe files.

    Attributes:
        model: the kind of its models, a key of :data:`kdgraft_nlp.tasks.AUTO_CLASSES`.
        columns: the entries of ``data`` that name its columns of texts, each with the column that is read by default.
        label: the entry that names the column of labels; empty for language models, whose labels are their texts.
        metrics: the metrics of an evaluation beside the loss.
        further: other entries of ``data`` that this task reads and not every one.
        texts: its samples are texts, which a tokenizer reads; else they are images, which an image processor reads.
    """

    model: str
    columns: Mapping[str, str]
    label: str = ""
    metrics: tuple[str, ...] = ()
    further: tuple[str, ...] = ()
    texts: bool = True


LABELS = {"label": "label", "tags": "tags", "answers": "answers", "target": "target"}
"""The entries that name a column of labels, each with the column that is read by default."""
_TEXT = {"text": "text"}
TASKS = {
    "classification": RecipeTask(
        "sequence",
        _TEXT,
        "label",
        ("accuracy", "f1", "macro_f1", "matthews_correlation"),
        ("classes", "soft_labels", "labels"),
    ),
    "multi_label": RecipeTask(
        "sequence", _TEXT, "label", ("micro_f1", "macro_f1"), ("classes", "soft_labels", "labels")
    ),
    "regression": RecipeTask("sequence", _TEXT, "label", ("mse", "pearson", "spearman"), ("labels",)),
    "tokens": RecipeTask("tokens", {"words": "tokens"}, "tags", ("accuracy", "span_f1"), ("classes", "labels")),
    "multiple_choice": RecipeTask(
        "choice", {"context": "context", "question": "", "choices": "choices"}, "label", ("accuracy",)
    ),
    "question_answering": RecipeTask(
        "question",
        {"question": "question", "context": "context"},
        "answers",
        ("exact_match", "f1"),
        ("stride", "answer_length"),
    ),
    "seq2seq": RecipeTask("seq2seq", {"source": "source"}, "target", further=("prefix", "target_length")),
    "causal": RecipeTask(
        "causal", _TEXT, further=("joined", "packed", "prompt", "completion", "messages", "weights", "labels")
    ),
    "masked": RecipeTask("masked", _TEXT, further=("joined", "labels")),
    "detection": RecipeTask(
        "detection",
        {},
        metrics=("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
        further=("images", "classes"),
        texts=False,
    ),
}
"""The tasks of recipe files."""
IMAGE_MODELS = {told.model for told in TASKS.values() if not told.texts}
"""The kinds of models of tasks on images."""
LABELLED = tuple(name for name, task in TASKS.items() if task.label)
"""The tasks whose samples have labels."""
ALONE = ("multiple_choice", "question_answering", "seq2seq", "detection")
"""The tasks whose samples have a layout of their own, which a second tokenizer does not read."""
COLUMN = ((str,), "a column's name")
DATA_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "train": ((str, Path), "a file or a folder"),
    "eval": ((str, Path), "a file or a folder"),
    "text": ((str, list, tuple), "a column's name, or two for pairs"),
    "words": COLUMN,
    "context": COLUMN,
    "question": COLUMN,
    "choices": ((str, list, tuple), "a column of lists of texts, or the names of two or more columns of texts"),
    "source": COLUMN,
    **dict.fromkeys(LABELS, COLUMN),
    "images": ((str, Path, Mapping), "a folder, or {train: folder, eval: folder}"),
    "classes": ((list, tuple), "a list of the classes' names, in their order"),
    "fraction": ((int, float), "a number in (0, 1]"),
    "length": ((int,), "a whole number of tokens"),
    "stride": ((int,), "a whole number of tokens"),
    "answer_length": ((int,), "a whole number of tokens"),
    "target_length": ((int,), "a whole number of tokens"),
    "prefix": ((str,), "a text"),
    "soft_labels": ((str, Mapping), "a column's name, or {column: name, values: logits}"),
    "labels": ((bool,), "true or false"),
    "joined": ((bool,), "true or false"),
    "packed": ((bool,), "true or false"),
    "prompt": COLUMN,
    "completion": COLUMN,
    "messages": COLUMN,
    "weights": COLUMN,
}
"""The entries of ``data``, with their types and a description of these."""
EVERYWHERE = ("train", "eval", "fraction", "length")
"""The entries of ``data`` that every task reads; the last is for texts."""
FILES = {".jsonl": "json", ".json": "json", ".csv": "csv"}
"""The suffixes of data files, with the names of their readers in datasets."""


def check_entries(task: str, data: Mapping[str, Any]) -> None:
    """Raise a :class:`DistillError` for an entry of ``data`` that this task does not read, and other tasks do."""
    if task not in TASKS:
        return
    told = TASKS[task]
    read = (*told.columns, *([told.label] if told.label else []), *told.further)
    # Of texts, these are refused with more advice.
    special = ("joined", "packed", "prompt", "completion", "messages", "weights") if told.texts else ()
    everywhere = EVERYWHERE if told.texts else EVERYWHERE[:-1]
    for entry, value in data.items():
        if value is not None and entry in DATA_KINDS and entry not in (*read, *everywhere, *special):
            raise DistillError(f"data.{entry} is not read for task {task}, which reads {', '.join(read)}; leave it out")


def check_text(task: str, data: Mapping[str, Any]) -> None:
    """Raise a :class:`DistillError` unless ``data.text`` names one column, or two where the task takes pairs."""
    text = data.get("text")
    if not isinstance(text, (list, tuple)):
        return
    if len(text) != 2 or not all(isinstance(column, str) for column in text):
        raise DistillError(f"data.text must name a column, or two for pairs of texts; got {text!r}")
    if task in TASKS and TASKS[task].model != "sequence":
        takes = ", ".join(name for name, told in TASKS.items() if told.model == "sequence")
        raise DistillError(f"data.text names two columns, which only {takes} take; name one for task {task}")


def check_choices(task: str, data: Mapping[str, Any]) -> None:
    """Raise a :class:`DistillError` unless ``data.choices`` names one column of lists, or two columns or more."""
    choices = data.get("choices")
    if isinstance(choices, (list, tuple)) and (len(choices) < 2 or not all(isinstance(one, str) for one in choices)):
        raise DistillError(f"data.choices must be {DATA_KINDS['choices'][1]}; got {choices!r}")


def check_classes(task: str, data: Mapping[str, Any]) -> None:
    """Raise a :class:`DistillError` unless ``data.classes`` has two or more different names."""
    classes = data.get("classes")
    if not isinstance(classes, (list, tuple)):
        return
    fine = all(isinstance(one, (str, int)) and not isinstance(one, bool) for one in classes)
    if not fine or len(classes) < 2 or len({*map(str, classes)}) < len(classes):
        raise DistillError(f"data.classes must have two or more names, each once; got {list(classes)!r}")


def check_images(task: str, data: Mapping[str, Any]) -> None:
    """Raise a :class:`DistillError` unless ``data.images`` is a folder, or names one for each set."""
    images = data.get("images")
    for key, value in images.items() if isinstance(images, Mapping) else ():
        if key not in ("train", "eval") or not isinstance(value, (str, Path)):
            raise DistillError(f"data.images is {DATA_KINDS['images'][1]}; got {images!r}")


def check_soft(task: str, data: Mapping[str, Any]) -> None:
    """Raise a :class:`DistillError` for a malformed ``data.soft_labels``."""
    told = soft_column(data)
    if not isinstance(data.get("soft_labels"), Mapping):
        return
    for key in told:
        if key not in ("column", "values"):
            raise DistillError(f"data.soft_labels takes no argument {key!r}{nearest(str(key), ('column', 'values'))}")
    if not isinstance(told.get("column"), str) or told.get("values", "logits") not in ("probabilities", "logits"):
        raise DistillError(
            f"data.soft_labels needs column, and takes values: probabilities or logits; got {data['soft_labels']!r}"
        )


def soft_column(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``column`` of a recipe's soft labels and the kind of their ``values``; nothing where it names none."""
    given = data.get("soft_labels")
    return dict(given) if isinstance(given, Mapping) else {} if given is None else {"column": given}


def check_chats(task: str, data: Mapping[str, Any]) -> None:
    """Raise a :class:`DistillError` for entries of language models that contradict each other or the task."""
    if (data.get("packed") or is_chat(data)) and task != "causal":
        what = "packed" if data.get("packed") else "prompt, completion and messages"
        raise DistillError(f"data.{what} is for language models (task: causal); leave it out for task {task}")
    if data.get("packed") and data.get("joined"):
        raise DistillError("data.packed keeps texts apart, and data.joined makes blocks of them; leave out one")
    if not is_chat(data):
        return
    if (data.get("prompt") is None) != (data.get("completion") is None) or (
        data.get("messages") and data.get("prompt")
    ):
        raise DistillError("data names either messages, or prompt and completion")
    for other in ("text", "words", "joined", "labels"):
        if data.get(other) is not None:
            raise DistillError(f"data.{other} means nothing beside prompts and answers; leave it out")


def check_amounts(task: str, data: Mapping[str, Any]) -> None:
    """Raise a :class:`DistillError` for a fraction or a number of tokens that is out of range."""
    fraction = data.get("fraction")
    if isinstance(fraction, (int, float)) and not isinstance(fraction, bool) and not 0 < fraction <= 1:
        raise DistillError(f"data.fraction must be in (0, 1], got {fraction!r}")
    for entry, lowest in (("length", 2), ("stride", 0), ("answer_length", 1), ("target_length", 2)):
        value = data.get(entry)
        if isinstance(value, int) and not isinstance(value, bool):
            check_number("data", entry, value, lowest, whole=True)


CHECKS = (check_entries, check_text, check_choices, check_classes, check_images, check_soft, check_amounts, check_chats)
"""The checks of ``data`` that need neither files nor models."""


def check_file(split: str, source: Any, task: str = "") -> None:
    """Raise a :class:`DistillError` unless the file or folder of a set exists and can be read."""
    images = task in TASKS and not TASKS[task].texts
    if source is None and split == "train":
        what = "a json file in COCO's format" if images else "a jsonl or csv file, or a folder that save_to_disk wrote"
        raise DistillError(f"data needs train: {what}")
    if not isinstance(source, (str, Path)):
        return
    path = Path(source)
    if images and path.exists() and path.suffix != ".json":
        raise DistillError(f"cannot read {source}; the data of task {task} is a json file in COCO's format")
    if path.is_dir():
        return
    if not path.is_file():
        raise DistillError(f"no data at {source}")
    if path.suffix not in FILES:
        raise DistillError(f"cannot read {source}; data is jsonl, csv, or a folder that save_to_disk wrote")
    if not path.stat().st_size:
        raise DistillError(f"{source} holds no samples")
