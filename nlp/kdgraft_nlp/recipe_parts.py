"""The parts from which a recipe's trainer is built: the layout of its samples, its tokenizer and its models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, TrainingArguments

from kdgraft.errors import DistillError
from kdgraft.registry import call
from kdgraft.sources import with_students
from kdgraft.sources.gather import BuildStudent

from .chats import is_chat
from .checks import one_line
from .choices import ChoiceData
from .class_teachers import SoftLabels
from .data import train_tokenizer
from .detection import DetectionData, DetectionTrainer
from .images import build_processor
from .label_words import fill_columns
from .questions import QuestionData
from .recipe_data import SOFT, ChatData, RecipeData, TextData
from .recipe_tasks import TASKS, soft_column
from .sequences import SequenceData, decoder_tokens
from .settings import tokenizer_folder
from .tasks import AUTO_CLASSES
from .trainer import DistillTrainer

LAYOUTS: dict[str, type[RecipeData]] = {
    "multiple_choice": ChoiceData,
    "question_answering": QuestionData,
    "seq2seq": SequenceData,
    "detection": DetectionData,
}
"""The classes that read the samples of tasks with a layout of their own."""


def check_best(arguments: TrainingArguments, samples: RecipeData) -> None:
    """Raise a :class:`DistillError` where the best model is chosen by a metric that these classes do not have."""
    if str(arguments.metric_for_best_model).removeprefix("eval_") == "f1" and len(samples.names or "12") != 2:
        raise DistillError(
            f"training.metric_for_best_model: f1 is that of two classes, and there are {len(samples.names or [])}; take macro_f1"
        )


def layout_of(task: str, told: Mapping[str, Any]) -> type[RecipeData]:
    """Return the class that reads the samples of a task."""
    return ChatData if is_chat(told) else LAYOUTS.get(task, TextData)


def trainer_of(task: str) -> type[DistillTrainer]:
    """Return the class that trains the models of a task."""
    return DetectionTrainer if TASKS[task].model == "detection" else DistillTrainer


def build_reader(samples: RecipeData, found: Dataset, config: Mapping[str, Any]) -> Any:
    """Return what makes a model's inputs of a recipe's samples: its tokenizer, or for images its processor."""
    if not TASKS[samples.task].texts:
        return build_processor(config)
    return build_tokenizer(config.get("tokenizer"), samples, found, config)


def build_tokenizer(
    spec: Any, samples: RecipeData, found: Dataset, config: Mapping[str, Any]
) -> PreTrainedTokenizerBase:
    """Return a recipe's tokenizer.

    Args:
        spec: a tokenizer, its folder, or the settings of one to train.
        samples: the layout of the samples.
        found: the training set, on which one is trained.
        config: the recipe, whose student or teacher may bring one.
    """
    if isinstance(spec, PreTrainedTokenizerBase):
        return spec
    if spec is None or isinstance(spec, Mapping):
        spec = tokenizer_folder(config) or spec
    with one_line("tokenizer"):
        if isinstance(spec, (str, Path)):
            return AutoTokenizer.from_pretrained(spec)
        given = {"texts": samples.texts(found), "pairs": samples.pairs, **spec}
        return call(train_tokenizer, given, "tokenizer")


def build_model(spec: Any, task: str, tokenizer: Any, names: Sequence[str] | None, owner: str = "student") -> Any:
    """Return a model for a recipe's task.

    Args:
        spec: a folder, or a config.
        task: the recipe's task.
        tokenizer: its tokenizer; for images its processor.
        names: its classes; ``None`` for tasks without.
        owner: the name of the model, for messages.
    """
    labels: dict[str, Any] = {}
    if names is not None:
        labels = dict(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)})
    if task == "classification":
        labels["problem_type"] = "single_label_classification"
    if task == "multi_label":
        labels["problem_type"] = "multi_label_classification"
    if task == "regression":
        labels = dict(num_labels=1, problem_type="regression")
    kind = AUTO_CLASSES[TASKS[task].model]
    with one_line(owner):
        if isinstance(spec, (str, Path)):
            return kind.from_pretrained(spec, **labels)
        of_texts = dict(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id) if TASKS[task].texts else {}
        settings = {**of_texts, **spec, **labels}
        if task == "seq2seq":
            settings = {**decoder_tokens(tokenizer), **settings}
        return kind.from_config(AutoConfig.for_model(**settings))


def recipe_sources(config: Mapping[str, Any], samples: RecipeData, build_student: BuildStudent) -> dict[str, Any]:
    """Return the entries ``teacher`` and ``teachers`` of a recipe, with peers built and the source of its soft labels, if any.

    Args:
        config: the recipe.
        samples: the layout of its samples.
        build_student: builds the model of a peer.
    """

    def completed(where: str, given: Any) -> Any:
        return with_students(where, fill_columns(given, samples.text_columns), build_student)

    teacher, teachers = completed("teacher", config.get("teacher")), config.get("teachers")
    if isinstance(teachers, Mapping):
        teachers = {name: completed(f"teachers.{name}", one) for name, one in teachers.items()}
    soft = soft_column(config.get("data") or {})
    if not soft:
        return {"teacher": teacher, "teachers": teachers}
    source = SoftLabels(SOFT, values=soft.get("values", "probabilities"), classes=samples.names)
    if teachers is None:
        return {"teacher": source, "teachers": None}
    if SOFT in teachers:
        raise DistillError(f"teachers.{SOFT} is the name of data.soft_labels; give this teacher another name")
    return {"teacher": teacher, "teachers": {SOFT: source, **teachers}}
