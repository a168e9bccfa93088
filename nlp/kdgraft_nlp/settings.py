"""Recipe files: read, and checked before data, tokenizers and models are touched. All that can be told is told at once."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, PreTrainedTokenizerBase, TrainingArguments

from kdgraft.errors import DistillError, check_number, nearest
from kdgraft.isolation import isolated_rng
from kdgraft.registry import call, expand_recipe
from kdgraft.terms import build_terms

from .reader import HFReader
from .registry import RECIPES, TERMS
from .tasks import AUTO_CLASSES

TASKS = {
    "classification": "sequence",
    "regression": "sequence",
    "tokens": "tokens",
    "causal": "causal",
    "masked": "masked",
}
LABELLED = ("classification", "regression", "tokens")
"""Tasks whose samples have a label."""
KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "task": ((str,), "a name"),
    "data": ((Mapping,), "a mapping, such as {train: train.jsonl}"),
    "tokenizer": ((str, Path, Mapping, PreTrainedTokenizerBase), "a folder, or {vocab_size: 4000}"),
    "student": ((str, Path, Mapping), "a folder, or a config such as {model_type: bert, hidden_size: 64}"),
    "teacher": ((str, Path, Mapping), "a folder, or a source such as {type: Itself, momentum: 0.99}"),
    "teachers": ((Mapping,), "folders by name, such as {a: large, b: larger}"),
    "init_from": ((list, tuple, Mapping), "a list of the teacher's layers, such as [1, 3, 5]"),
    "recipe": ((str, Mapping), "a name, or {type: name, …}"),
    "terms": ((list, tuple), "a list of names, or of {type: name, …}"),
    "host_weight": ((int, float), "a number >= 0"),
    "chunked": ((bool, int), "true, false, or a number of tokens"),
    "training": ((Mapping,), "a mapping of TrainingArguments, such as {max_steps: 100}"),
    "output": ((str, Path), "a folder"),
}
"""The entries of a recipe, with what each may be."""
DATA_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "train": ((str, Path), "a file or a folder"),
    "eval": ((str, Path), "a file or a folder"),
    "text": ((str, list, tuple), "a column's name, or two for pairs"),
    "words": ((str,), "a column's name"),
    "label": ((str,), "a column's name"),
    "tags": ((str,), "a column's name"),
    "fraction": ((int, float), "a number in (0, 1]"),
    "length": ((int,), "a whole number of tokens"),
}
FILES = {".jsonl": "json", ".json": "json", ".csv": "csv"}
"""Endings of data files, with what reads them."""
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
"""The least that arguments of a training can be, where TrainingArguments takes any number."""
_ELSEWHERE = {"output_dir": "write output: FOLDER, beside training", "resume_from_checkpoint": "use --resume"}
METRICS = {
    "classification": ("accuracy", "macro_f1"),
    "regression": ("mse", "pearson"),
    "tokens": ("accuracy", "span_f1"),
}
"""What an evaluation gives beside the loss."""
_FROM_DATA = ("num_labels", "id2label", "label2id", "problem_type")
"""What the task and the data say of a student."""
_BY_KEYWORD = ("attn_implementation", "dtype", "torch_dtype", "rope_theta", "rope_scaling")
"""What configs take by keyword and keep under another name."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats: PyYAML takes ``2e-3`` for a text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load(path: str | Path, options: Sequence[str] = ()) -> dict[str, Any]:
    """Reads a recipe file, YAML or TOML, and overrides entries by ``a.b=value``.

    Raises:
        DistillError: no such file, not readable, or an option that is none.
    """
    path = Path(path)
    if not path.is_file():
        raise DistillError(f"recipe file not found: {path}")
    try:
        config = _toml(path) if path.suffix == ".toml" else _yaml(path.read_text(encoding="utf-8"))
    except DistillError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DistillError(f"cannot read {path}: {_flat(error)}") from None
    if not isinstance(config, dict):
        raise DistillError(f"{path} holds no settings; it starts with 'task: classification' or the like")
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise DistillError(f"write options like training.learning_rate=0.001, got {option!r}")
        *parents, last = key.split(".")
        place = config
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise DistillError(f"cannot set {key}: {parent} is {place!r}")
        try:
            place[last] = _yaml(value)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise DistillError(f"cannot read the option {option!r}: {_flat(error)}") from None
    return config


def _yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


def _toml(path: Path) -> dict[str, Any]:
    if sys.version_info < (3, 11):
        raise DistillError("reading TOML needs Python 3.11; write the recipe in YAML")
    import tomllib

    return tomllib.loads(path.read_text(encoding="utf-8"))


def check_settings(config: Mapping[str, Any], *, files: bool = True) -> TrainingArguments:
    """Checks everything in a recipe that neither data nor models are needed for; returns its training arguments.

    Args:
        config: the recipe.
        files: whether the data are in files that ``data`` names.

    Raises:
        DistillError: the mistakes, all of them in one line.
    """
    told: list[str] = []

    def look(check: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return check(*arguments)
        except DistillError as error:
            told.append(str(error))
            return None

    told += _entries("a recipe", "", config, KINDS)
    # What is of the wrong kind has been told, and is not looked into.
    fine = {key: value for key, value in config.items() if key in KINDS and _fits(value, KINDS[key][0])}
    name = str(config.get("task"))
    if name not in TASKS and _fits(config.get("task"), KINDS["task"][0]):
        told.append(f"task is one of {', '.join(TASKS)}; got {config.get('task')!r}")
    task = TASKS.get(name)
    data = fine.get("data") or {}
    told += _entries("data", "data.", data, DATA_KINDS)
    for check in (_check_text, _check_amounts):
        look(check, name, data)
    files = files and _fits(config.get("data"), KINDS["data"][0])
    for split in ("train", "eval") if files else ():
        look(check_file, split, data.get(split))
    wrong = _training(fine.get("training") or {})
    told += wrong
    arguments = None if wrong else look(_arguments, fine)
    if arguments is not None and arguments.eval_strategy.value != "no" and files and not data.get("eval"):
        told.append("training.eval_strategy evaluates, and there is no data.eval")
    best = getattr(arguments, "metric_for_best_model", None)
    if best is not None and task and best.removeprefix("eval_") not in (known := ("loss", *METRICS.get(name, ()))):
        told.append(f"training.metric_for_best_model is one of {', '.join(known)}; got {best!r}")
    for entry in ("teacher", "student"):
        if isinstance(fine.get(entry), (str, Path)):
            look(check_folder, entry, fine[entry])
    for name, given in (fine.get("teachers") or {}).items():
        if isinstance(given, (str, Path)):
            look(check_folder, f"teachers.{name}", given)
    if isinstance(fine.get("student"), Mapping):
        look(_check_config, fine["student"], task)
    elif config.get("student") is None:
        told.append(f"a recipe needs student: {KINDS['student'][1]}")
    if isinstance(fine.get("tokenizer"), (str, Path)):
        look(check_folder, "tokenizer", fine["tokenizer"], "tokenizer_config.json")
    elif config.get("tokenizer") is None and tokenizer_folder(config) is None:
        told.append(
            "tokenizer is a folder, or {vocab_size: 4000} to train one on the training set; the student and the teacher bring none"
        )
    told += _terms(fine.get("recipe"), fine.get("terms"))
    taught = [config.get("teacher"), config.get("teachers")]
    if all(given is None for given in taught) and (config.get("recipe") or config.get("terms")):
        told.append("a recipe or terms need teacher: the folder of a trained model")
    if all(given is None for given in taught) and config.get("init_from") is not None:
        told.append("init_from needs teacher, whose layers the student starts from")
    if any(given is not None for given in taught) and config.get("recipe") is None and config.get("terms") is None:
        told.append("a teacher is given, and nothing says what to learn; name terms or a recipe, or leave it out")
    if fine.get("host_weight") is not None:
        look(check_number, "host_weight", "the host's share", fine["host_weight"], 0)
    if fine.get("chunked"):
        look(_check_chunked, fine["chunked"])
    if told or arguments is None:
        many = f"{len(told)} mistakes: " if len(told) > 1 else ""
        raise DistillError(many + "; ".join(f"({i}) {said}" if many else said for i, said in enumerate(told, 1)))
    return arguments


@contextmanager
def one_line(entry: str, mistaken: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Turns what a host raises over a value of a recipe, whatever it is, into one line with the entry's name.

    Args:
        entry: the name.
        mistaken: asked after an error, whether it is the recipe's; others pass as they are.
    """
    try:
        yield
    except DistillError:
        raise
    except Exception as error:
        if not mistaken():
            raise
        raise DistillError(f"{entry}: {type(error).__name__}: {_flat(error)}") from error


def _flat(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _fits(value: Any, kinds: tuple[type, ...]) -> bool:
    return value is None or (isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)))


def _entries(owner: str, prefix: str, found: Mapping[Any, Any], known: Mapping[str, tuple[Any, str]]) -> list[str]:
    """Names that mean nothing, and values of the wrong kind."""
    told = []
    for key, value in found.items():
        if key not in known:
            told.append(f"{owner} has no entry {key!r}{nearest(str(key), known)}")
        elif not _fits(value, known[key][0]):
            told.append(f"{prefix}{key} is {known[key][1]}; got {value!r}")
    return told


def _check_text(task: str, data: Mapping[str, Any]) -> None:
    text = data.get("text")
    if not isinstance(text, (list, tuple)):
        return
    if len(text) != 2 or not all(isinstance(column, str) for column in text):
        raise DistillError(f"data.text is a column's name, or two for pairs of texts; got {text!r}")
    if task not in ("classification", "regression"):
        raise DistillError(
            f"data.text names two columns, and task {task} takes one; pairs are for classification and regression"
        )


def _check_amounts(task: str, data: Mapping[str, Any]) -> None:
    fraction, length = data.get("fraction"), data.get("length")
    if isinstance(fraction, (int, float)) and not isinstance(fraction, bool) and not 0 < fraction <= 1:
        raise DistillError(f"data.fraction must be in (0, 1], got {fraction!r}")
    if isinstance(length, int) and not isinstance(length, bool):
        check_number("data", "length", length, 2, whole=True)


def check_file(split: str, source: Any) -> None:
    """Raises a :class:`DistillError` unless a set's file or folder is there."""
    if source is None and split == "train":
        raise DistillError("data needs train: a jsonl or csv file, or a folder that save_to_disk wrote")
    if not isinstance(source, (str, Path)):
        return
    path = Path(source)
    if path.is_dir():
        return
    if not path.is_file():
        raise DistillError(f"no data at {source}")
    if path.suffix not in FILES:
        raise DistillError(f"cannot read {source}; data is jsonl, csv, or a folder that save_to_disk wrote")
    if not path.stat().st_size:
        raise DistillError(f"{source} holds no samples")


def check_folder(entry: str, source: str | Path, file: str = "config.json") -> None:
    """Raises a :class:`DistillError` unless a folder of ``save_pretrained`` is there, or a model of that name in the hub's cache."""
    if (Path(source) / file).is_file():
        return
    cached = re.fullmatch(r"([\w.-]+/)?[\w.-]+", str(source)) and not Path(source).exists()
    if cached and isinstance(try_to_load_from_cache(str(source), file), str):
        return
    raise DistillError(f"no {entry} at {source}: there is no {file}; give the folder that save_pretrained wrote")


def tokenizer_folder(config: Mapping[str, Any]) -> str | Path | None:
    """The folder of the student, or else of a teacher, that brings a tokenizer."""
    teachers = config.get("teachers")
    several = teachers.values() if isinstance(teachers, Mapping) else ()
    for source in (config.get("student"), config.get("teacher"), *several):
        if isinstance(source, (str, Path)):
            try:
                check_folder("tokenizer", source, "tokenizer_config.json")
            except DistillError:
                continue
            return source
    return None


def _training(training: Mapping[str, Any]) -> list[str]:
    """What is wrong with single training arguments; TrainingArguments looks at few of its values."""
    hints = get_type_hints(TrainingArguments)
    known = [field.name for field in fields(TrainingArguments) if field.init]
    told = []
    for key, value in training.items():
        lowest = _LOWEST.get(str(key), -math.inf)
        if key in _ELSEWHERE:
            told.append(f"training.{key} does not count here; {_ELSEWHERE[key]}")
        elif key not in known:
            told.append(f"training takes no argument {key!r}{nearest(str(key), known)}")
        elif value is not None and not _typed(value, hints[key]):
            told.append(f"training.{key} is {_named(hints[key])}, got {value!r}")
        elif isinstance(value, float) and not math.isfinite(value):
            told.append(f"training.{key} must be finite, got {value!r}")
        elif isinstance(value, (int, float)) and value < lowest:
            told.append(f"training.{key} must be >= {lowest:g}, got {value!r}")
    if training.get("max_steps") == 0 or (training.get("num_train_epochs") == 0 and not training.get("max_steps")):
        told.append("training.max_steps and training.num_train_epochs must leave something to train")
    if isinstance(training.get("seed"), int) and training["seed"] >= 2**32:
        told.append(f"training.seed must be < {2**32}, got {training['seed']}")
    return told


def _typed(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type; annotations that say more than the plain ones fit anything."""
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


def _arguments(config: Mapping[str, Any]) -> TrainingArguments:
    training = dict(config.get("training") or {})
    training.setdefault("report_to", [])
    with one_line("training"):
        return call(TrainingArguments, {"output_dir": config.get("output", "work_dirs/nlp"), **training}, "training")


def _check_config(spec: Mapping[str, Any], task: str | None) -> None:
    """Names in a student's config, of its parts too; the configs themselves take any name in silence."""
    if not isinstance(spec.get("model_type"), str):
        raise DistillError(
            "student is a folder, or a config such as {model_type: bert, hidden_size: 64, num_hidden_layers: 2}"
        )
    for name in _FROM_DATA:
        if name in spec:
            raise DistillError(f"student.{name} comes from the task and the data; leave it out")
    for name, value in spec.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise DistillError(f"student.{name} must be finite, got {value!r}")
    with one_line("student"):
        kind = type(AutoConfig.for_model(spec["model_type"]))
    _check_names("student", kind, spec)
    mapping = AUTO_CLASSES[task]._model_mapping if task else {}
    if task and kind not in mapping:
        raise DistillError(f"student: transformers has no model of type {spec['model_type']!r} for this task")


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


def _terms(recipe: Any, terms: Any) -> list[str]:
    """What is wrong with the recipe, and with each term by itself: names, arguments, the notation of taps."""
    told = []
    specs = list(terms or [])
    try:
        with one_line("recipe"):
            specs = [*expand_recipe(recipe, RECIPES), *specs]
    except DistillError as error:
        told.append(str(error))
    for spec in specs:
        try:
            with one_line(f"term {spec.get('type') if isinstance(spec, Mapping) else spec}"), isolated_rng():
                build_terms([spec], TERMS, HFReader)
        except DistillError as error:
            kind = str(spec.get("type") if isinstance(spec, Mapping) else spec)
            told.append(str(error) if kind in str(error) else f"term {kind}: {error}")
    return told


def _check_chunked(chunked: Any) -> None:
    if chunked is not True:
        check_number("chunked", "the number of tokens", chunked, 1, whole=True)
