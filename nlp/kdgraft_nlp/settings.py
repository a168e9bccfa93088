"""Reading of recipe files, and checks of recipes before data, tokenizers and models are loaded; all mistakes are reported."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase, TrainingArguments

from kdgraft import toml
from kdgraft.errors import DistillError, check_number, nearest
from kdgraft.isolation import isolated_rng
from kdgraft.registry import expand_recipe
from kdgraft.sources import students_in
from kdgraft.terms import build_terms

from .adapters import BASE
from .arguments import check_student, training_arguments, training_mistakes
from .chats import is_chat
from .checks import check_folder, flat, one_line
from .images import FILE
from .label_words import check_label_words, reads_texts
from .on_policy import read_on_policy
from .reader import HFReader
from .recipe_tasks import ALONE, CHECKS, DATA_KINDS, IMAGE_MODELS, LABELLED, TASKS, check_file
from .registry import RECIPES, TERMS
from .weighing import check_weights

KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "task": ((str,), "a name"),
    "data": ((Mapping,), "a mapping, such as {train: train.jsonl}"),
    "tokenizer": ((str, Path, Mapping, PreTrainedTokenizerBase), "a folder, or {vocab_size: 4000}"),
    "teacher_tokenizer": ((bool, str, Path), "true (the one in the teacher's folder), or a folder"),
    "processor": ((str, Path, Mapping), "a folder, or settings such as {size: {height: 480, width: 480}}"),
    "student": ((str, Path, Mapping), "a folder, or a config such as {model_type: bert, hidden_size: 64}"),
    "teacher": ((str, Path, Mapping), "a folder, or a source such as {type: Itself, momentum: 0.99}"),
    "teachers": ((Mapping,), "folders by name, such as {a: large, b: larger}"),
    "init_from": ((list, tuple, Mapping), "a list of the teacher's layers, such as [1, 3, 5]"),
    "recipe": ((str, Mapping), "a name, or {type: name, …}"),
    "terms": ((list, tuple), "a list of names, or of {type: name, …}"),
    "host_weight": ((int, float), "a number >= 0"),
    "on_policy": ((Mapping,), "a mapping, such as {share: 0.5, max_new_tokens: 64}"),
    "chunked": ((bool, int), "true, false, or a number of tokens"),
    "trainer": ((Mapping,), "another Trainer's function with its arguments, such as {type: trainers.py:mine}"),
    "adapters": ((Mapping,), "a mapping of peft's LoraConfig, such as {r: 8, target_modules: [q_proj, v_proj]}"),
    "training": ((Mapping,), "a mapping of TrainingArguments, such as {max_steps: 100}"),
    "output": ((str, Path), "a folder"),
}
"""The entries of a recipe, with their types and a description of these."""
_TAUGHT = ("teacher", "teachers", "teacher_tokenizer", "init_from", "recipe", "terms", "on_policy")
"""The entries that say who teaches what."""


class _Loader(yaml.SafeLoader):
    """A loader with the floats of YAML 1.2; PyYAML's own reads ``2e-3`` as a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load(path: str | Path, options: Sequence[str] = ()) -> dict[str, Any]:
    """Read a recipe file, YAML or TOML, and override its entries by options ``a.b=value``.

    Raises:
        DistillError: the file does not exist or cannot be read, or an option is malformed.
    """
    path = Path(path)
    if not path.is_file():
        raise DistillError(f"recipe file not found: {path}")
    try:
        text = path.read_text(encoding="utf-8")
        config = toml.loads(text) if path.suffix == ".toml" else _yaml(text)
    except DistillError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DistillError(f"cannot read {path}: {flat(error)}") from None
    if not isinstance(config, dict):
        raise DistillError(f"{path} holds no settings; start it with an entry such as 'task: classification'")
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
            raise DistillError(f"cannot read the option {option!r}: {flat(error)}") from None
    return config


def _yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


def check_settings(config: Mapping[str, Any], *, files: bool = True) -> TrainingArguments:
    """Check everything in a recipe that needs neither data nor models, and return its training arguments.

    Args:
        config: the recipe.
        files: the data are in files that ``data`` names.

    Raises:
        DistillError: the recipe has mistakes; the message lists all of them in one line.
    """
    told = _Mistakes(_entries("a recipe", "", config, KINDS))
    # Values of the wrong type are mistakes already, and are not checked further.
    fine = {key: value for key, value in config.items() if key in KINDS and _fits(value, KINDS[key][0])}
    name = str(config.get("task"))
    if name not in TASKS and _fits(config.get("task"), KINDS["task"][0]):
        told.append(f"task is one of {', '.join(TASKS)}; got {config.get('task')!r}")
    files = files and _fits(config.get("data"), KINDS["data"][0])
    data = fine.get("data") or {}
    _check_data(name, data, files, told)
    wrong = training_mistakes(fine.get("training") or {})
    told += wrong
    arguments = None if wrong else told.look(training_arguments, fine)
    if arguments is not None:
        _check_evaluation(name, arguments, not files or bool(data.get("eval")), told)
    _check_models(config, fine, TASKS[name].model if name in TASKS else None, told)
    _check_teaching(config, fine, bool(data.get("soft_labels")), told)
    _check_trainer(fine, told)
    _check_second_tokenizer(name, data, fine, told)
    if name == "question_answering" and arguments is not None and arguments.train_sampling_strategy != "random":
        told.append(
            "training.train_sampling_strategy also sorts the windows of an evaluation, by which answers are found; leave it out"
        )
    if told or arguments is None:
        many = f"{len(told)} mistakes: " if len(told) > 1 else ""
        raise DistillError(many + "; ".join(f"({i}) {said}" if many else said for i, said in enumerate(told, 1)))
    return arguments


class _Mistakes(list[str]):
    """The mistakes in a recipe, one message each."""

    def look(self, check: Callable[..., Any], *arguments: Any) -> Any:
        """Return the result of a check; where it raises a :class:`DistillError`, add its message and return ``None``."""
        try:
            return check(*arguments)
        except DistillError as error:
            self.append(str(error))
            return None


def _check_data(task: str, data: Mapping[str, Any], files: bool, told: _Mistakes) -> None:
    told += _entries("data", "data.", data, DATA_KINDS)
    for check in (*CHECKS, check_weights):
        told.look(check, task, data)
    for split in ("train", "eval") if files else ():
        told.look(check_file, split, data.get(split), task)


def _check_evaluation(task: str, arguments: TrainingArguments, evaluates: bool, told: _Mistakes) -> None:
    if arguments.eval_strategy != "no" and not evaluates:
        told.append("training.eval_strategy needs a set to evaluate on; add data.eval")
    best, known = arguments.metric_for_best_model, ("loss", *(TASKS[task].metrics if task in TASKS else ()))
    if best is not None and task in TASKS and best.removeprefix("eval_") not in known:
        told.append(f"training.metric_for_best_model is one of {', '.join(known)}; got {best!r}")


def _check_models(config: Mapping[str, Any], fine: Mapping[str, Any], task: str | None, told: _Mistakes) -> None:
    folders = {**sources_in(fine), "student": fine.get("student")}
    peers = {f"{entry}{end}": one for entry, given in folders.items() for end, one in students_in(given).items()}
    for entry, given in (folders | peers).items():
        if isinstance(given, (str, Path)) and not (given == BASE and config.get("adapters") is not None):
            told.look(check_folder, entry, given)
        if reads_texts(given):
            told.look(check_label_words, entry, given, fine)
    for entry, given in peers.items():
        if isinstance(given, Mapping):
            told.look(check_student, given, task, entry)
        elif not isinstance(given, (str, Path)):
            told.append(
                f"{entry} is a folder, or a config such as {{model_type: bert, hidden_size: 64}}; got {given!r}"
            )
    _check_student(config, fine, task, told)
    if task in IMAGE_MODELS:
        _check_processor(fine, told)
    else:
        _check_tokenizer(config, fine, told)


def _check_student(config: Mapping[str, Any], fine: Mapping[str, Any], task: str | None, told: _Mistakes) -> None:
    if isinstance(fine.get("student"), Mapping):
        told.look(check_student, fine["student"], task)
    elif config.get("student") is None:
        told.append(f"a recipe needs student: {KINDS['student'][1]}")


def _check_processor(fine: Mapping[str, Any], told: _Mistakes) -> None:
    for entry in ("tokenizer", "teacher_tokenizer", "on_policy", "chunked"):
        if fine.get(entry):
            told.append(f"{entry} is for texts, and this task has images; leave it out")
    if isinstance(fine.get("processor"), (str, Path)):
        told.look(check_folder, "processor", fine["processor"], FILE)


def _check_tokenizer(config: Mapping[str, Any], fine: Mapping[str, Any], told: _Mistakes) -> None:
    if config.get("processor") is not None:
        told.append("processor is for images, and this task has texts; leave it out")
    if isinstance(fine.get("tokenizer"), (str, Path)):
        told.look(check_folder, "tokenizer", fine["tokenizer"], "tokenizer_config.json")
    elif config.get("tokenizer") is None and tokenizer_folder(config) is None:
        told.append(
            "tokenizer is a folder, or {vocab_size: 4000} to train one on the training set; the student and the teacher bring none"
        )


def sources_in(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a recipe says of each of its sources, by the entry that names it."""
    several = config.get("teachers")
    found = {f"teachers.{name}": given for name, given in several.items()} if isinstance(several, Mapping) else {}
    return {"teacher": config.get("teacher"), **found}


def _check_teaching(config: Mapping[str, Any], fine: Mapping[str, Any], soft: bool, told: _Mistakes) -> None:
    if config.get("adapters") is not None and isinstance(fine.get("student"), Mapping):
        told.append("adapters are added to a trained model; give student: a folder")
    _check_terms(fine.get("recipe"), fine.get("terms"), told)
    taught = soft or any(config.get(entry) is not None for entry in ("teacher", "teachers"))
    if soft and config.get("teacher") is not None:
        told.append(
            "data.soft_labels teach by themselves; leave out teacher, or name it by teachers: {NAME: …}, beside which soft labels are the "
            "source 'soft_labels'"
        )
    if not taught and (config.get("recipe") or config.get("terms")):
        told.append("a recipe or terms need teacher: the folder of a trained model")
    if not taught and config.get("init_from") is not None:
        told.append("init_from needs teacher, whose layers the student starts from")
    if taught and config.get("recipe") is None and config.get("terms") is None:
        told.append("a teacher is given, and nothing says what to learn; name terms or a recipe, or leave it out")
    if fine.get("host_weight") is not None:
        told.look(check_number, "host_weight", "the host's share", fine["host_weight"], 0)
    if fine.get("on_policy") is not None:
        told.look(_check_on_policy, fine["on_policy"], config.get("task"), taught)
    if fine.get("chunked") and fine["chunked"] is not True:
        told.look(partial(check_number, whole=True), "chunked", "the number of tokens", fine["chunked"], 1)


def _check_trainer(fine: Mapping[str, Any], told: _Mistakes) -> None:
    """Refuse what another Trainer would not do, and a function that is not named."""
    if fine.get("trainer") is None:
        return
    if not isinstance(fine["trainer"].get("type"), str):
        told.append("trainer needs type: a function, file.py:function")
    for entry in _TAUGHT:
        if fine.get(entry) is not None:
            told.append(f"trainer teaches in its own way; leave out {entry}, or leave out trainer")


def _check_second_tokenizer(task: str, data: Mapping[str, Any], fine: Mapping[str, Any], told: _Mistakes) -> None:
    if data.get("joined") is not None and task in LABELLED:
        told.append(
            f"data.joined is for language models, whose texts are joined to blocks; leave it out for task {task}"
        )
    given, teacher = fine.get("teacher_tokenizer"), fine.get("teacher")
    if not given:
        return
    if task in ALONE:
        told.append(f"teacher_tokenizer: tokens of two tokenizers are not paired for task {task}; use one tokenizer")
    if data.get("packed") or is_chat(data):
        told.append("teacher_tokenizer reads texts one by one; leave out data.packed, prompt, completion and messages")
    if isinstance(teacher, (str, Path)):
        told.look(check_folder, "teacher_tokenizer", teacher if given is True else given, "tokenizer_config.json")
    else:
        told.append("teacher_tokenizer needs teacher: the folder of one model, which reads the texts with it")
    if task == "masked":
        told.append(
            "teacher_tokenizer: the same random mask cannot be drawn for two tokenizers; distil masked models with one tokenizer"
        )
    if data.get("joined"):
        told.append(
            "data.joined: the tokens of two tokenizers are paired text by text, not in blocks; leave it out, or set it to false"
        )
    if fine.get("init_from") is not None:
        told.append(
            "init_from copies the teacher's embeddings, which teacher_tokenizer says are of other tokens; leave out one"
        )


def _check_on_policy(given: Mapping[str, Any], task: Any, taught: bool) -> None:
    """Raise a :class:`DistillError` for settings that make no sense, or where nothing is learnt from texts of the student."""
    read_on_policy(given)
    if not taught or task != "causal":
        raise DistillError(
            f"on_policy needs {'task: causal' if taught else 'teacher, which reads what the student writes'}"
        )


def _fits(value: Any, kinds: tuple[type, ...]) -> bool:
    return value is None or (isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool)))


def _entries(owner: str, prefix: str, found: Mapping[Any, Any], known: Mapping[str, tuple[Any, str]]) -> list[str]:
    """Return the mistakes in a mapping: unknown entries, and values of the wrong type."""
    told = []
    for key, value in found.items():
        if key not in known:
            told.append(f"{owner} has no entry {key!r}{nearest(str(key), known)}")
        elif not _fits(value, known[key][0]):
            told.append(f"{prefix}{key} is {known[key][1]}; got {value!r}")
    return told


def tokenizer_folder(config: Mapping[str, Any]) -> str | Path | None:
    """Return the folder of the student, or else of a teacher with the same tokenizer, that contains a tokenizer."""
    teachers = config.get("teachers")
    several = [config.get("teacher"), *(teachers.values() if isinstance(teachers, Mapping) else ())]
    for source in (config.get("student"), *([] if config.get("teacher_tokenizer") else several)):
        if isinstance(source, (str, Path)):
            try:
                check_folder("tokenizer", source, "tokenizer_config.json")
            except DistillError:
                continue
            return source
    return None


def untaught(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe without its teachers, its terms and another Trainer, which encodes its texts as before."""
    found = {**config, **dict.fromkeys((*_TAUGHT, "trainer"))}
    if config.get("teacher_tokenizer") and config.get("task") == "causal" and isinstance(config.get("data"), Mapping):
        found["data"] = {**config["data"], "joined": False}
    elif isinstance(config.get("data"), Mapping):
        found["data"] = {key: value for key, value in config["data"].items() if key != "soft_labels"}
    return found


def _check_terms(recipe: Any, terms: Any, told: _Mistakes) -> None:
    """Check the recipe and each term by itself: names, arguments, the notation of taps."""

    def expanded() -> list[dict[str, Any]]:
        with one_line("recipe"):
            return expand_recipe(recipe, RECIPES)

    def check(spec: Any, kind: str) -> None:
        try:
            with one_line(f"term {kind}"), isolated_rng():
                build_terms([spec], TERMS, HFReader)
        except DistillError as error:
            raise error if kind in str(error) else DistillError(f"term {kind}: {error}") from None

    for spec in [*(told.look(expanded) or []), *(terms or [])]:
        told.look(check, spec, str(spec.get("type") if isinstance(spec, Mapping) else spec))
