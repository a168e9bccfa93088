"""Training from a recipe file: ``kdgraft train recipe.yaml``; the scripts of ``nlp/configs`` and the demo use it too.

=====================  ====================================================================================================
``task``               ``classification``, ``multi_label``, ``regression``, ``tokens``, ``multiple_choice``,
                       ``question_answering``, ``seq2seq``, ``causal``, ``masked`` or ``detection``
``data``               ``train``, ``eval``: jsonl or csv files, or folders that ``save_to_disk`` wrote; ``fraction``: the share
                       of the training set to use; ``length``: tokens, 128 by default; the columns are named by the entries
                       of the table below
``tokenizer``          a folder; or ``{vocab_size: 4000}`` to train one (byte-level BPE) on the training set, where neither
                       the student's nor the teacher's folder has one
``processor``          for images in place of a tokenizer: the folder of an image processor, which all models share; or settings
                       such as ``{size: {height: 480, width: 480}}``, which change that of the student's or else the teacher's
                       folder, or of the student's type, which it is by default
``student``            a folder of ``save_pretrained``; or a config: ``{model_type: bert, hidden_size: 64, …}``
``teacher``            a folder, or a source such as ``{type: Itself, momentum: 0.99}``, ``{type: Stored, folder: store}``,
                       ``{type: Served, url: http://localhost:8000/v1}``, or of classes ``{type: LabelWords, model: folder,
                       template: "{text} It is", words: {positive: [" good"], negative: [" bad"]}}`` (in a template stand the
                       columns of texts); without it the model trains alone (as a teacher, or as a plain student)
``teacher_tokenizer``  where the teacher has another tokenizer, ``true`` (the one in its folder) or a folder: each text is
                       encoded by both, on its own (``joined`` is false), cut to what the student reads of it; for terms such
                       as ``UniversalLogits``, ``GOLD``, ``DSKD`` and those on samples
``teachers``           several by name instead, for the terms' ``source``: ``{a: large, b: larger}``; a source may combine
                       others: ``{teacher: {type: Ensemble, members: [a, b]}, …}``, or train beside the student, from a
                       folder or a config: ``{peers: {type: Peers, models: [{model_type: bert, …}, …]}}``, ``{peer: {type:
                       Peer, model: folder}}``
``adapters``           for a student in a folder: adapters of PEFT, ``{r: 8, target_modules: [q_proj, v_proj]}`` for LoRA, or
                       ``{type: LoHaConfig, …}``; with ``teacher: base`` its own base model teaches
``init_from``          layers of the teacher that the student starts from, ``[1, 3, 5]``; see
                       :func:`~kdgraft_nlp.init_from_teacher`
``recipe``             a recipe's name, or ``{type: name, …}``
``terms``              a list of terms beside the recipe's
``host_weight``        the factor of the host's own loss under a teacher, 1 by default
``on_policy``          for causal models under a teacher: ``{share: 0.5, max_new_tokens: 64, …}``: a share of the steps
                       trains on texts that the student writes; see :class:`~kdgraft_nlp.OnPolicy`
``chunked``            for causal models under a teacher; see :class:`~kdgraft_nlp.DistillTrainer`
``training``           arguments of :class:`transformers.TrainingArguments`
``trainer``            ``{type: file.py:function, …}``: a function that returns the Trainer to train with, from the arguments of a
                       Trainer (``model``, ``args`` …) and the other entries here, to compare another package's training on the
                       same student, data and schedule; who teaches is said there alone
``output``             the folder of checkpoints and of the student
=====================  ====================================================================================================

=======================  ==================================================================================================
task                     entries of ``data``, with the columns that are read by default, and metrics beside the loss
=======================  ==================================================================================================
``classification``       ``text: text``, or ``[first, second]`` for pairs; ``label: label``; ``classes``: the names in their
                         order, by default those that the set declares, or those that occur, sorted; ``soft_labels``: a column
                         of one probability for each class, or ``{column: name, values: logits}``, that teaches in place of a
                         model (:class:`~kdgraft_nlp.SoftLabels`), or beside ``teachers`` as the source ``soft_labels``. Accuracy, macro-F1,
                         Matthews' correlation, and of two classes the F1 of the second
``multi_label``          so too; a label is a list of names, or a 0 or 1 for each class. Micro- and macro-F1
``regression``           so too; a label is a number. Squared error, Pearson's and Spearman's correlation
``tokens``               ``words: tokens``, ``tags: tags``. Accuracy, F1 of spans
``multiple_choice``      ``context: context``, ``choices: choices`` (a list of texts) or several columns of one text each,
                         ``question``: put before each choice; ``label: label``, the number of the right one. Accuracy
``question_answering``   ``question: question``, ``context: context``, ``answers: answers``, as in SQuAD; ``stride``: the tokens that
                         two windows of ``length`` share, a third of them by default; ``answer_length``: tokens of the
                         longest answer, 30 by default. Exact match and F1, as shares of 1
``seq2seq``              ``source: source``, ``target: target``; ``prefix``: put before each source; ``target_length``: tokens.
                         Perplexity
``causal``, ``masked``   ``text: text``; ``joined: false``: each text on its own, cut to ``length``, not blocks of joined texts;
                         causal alone: ``packed: true``: so too, and the texts of a batch are one row without padding;
                         ``prompt`` and ``completion``, or ``messages``: columns of prompts and answers (texts, or messages for
                         the tokenizer's chat template), whose answers alone have labels; ``weights``: under a teacher, a
                         column with the weight of each text. Perplexity
``detection``            ``train``, ``eval``: json files in COCO's format; ``images``: the folder of their images, or ``{train: folder,
                         eval: folder}``, by default ``DIR/train`` for ``DIR/annotations/instances_train.json``; ``classes``: the names
                         in their order, by default that of their ids. COCO's average precisions: ap, ap50, ap75, ap_small, …
=======================  ==================================================================================================

``labels: false`` (tasks on texts and words): train on the terms alone, on texts without labels.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import (
    Trainer,
    TrainerCallback,
    set_seed,
)

from kdgraft.errors import DistillError
from kdgraft.files import held
from kdgraft.functions import called
from kdgraft.isolation import isolated_rng
from kdgraft.launching import waiting
from kdgraft.sources import Cached
from kdgraft.telling import said_aloud

from .adapters import adapted, base_of
from .checkpoints import newest_first
from .checks import check_sizes, one_line
from .class_teachers import ClassTeacher
from .data import drawn
from .label_words import reads_texts
from .link import link_of
from .packing import check_apart
from .recipe_parts import build_model, build_reader, check_best, layout_of, recipe_sources, trainer_of
from .recipe_tasks import TASKS
from .second_tokenizer import read_by_teacher, second_view, teacher_tokenizer
from .settings import check_settings, load, sources_in, tokenizer_folder, untaught
from .tasks import LANGUAGE_MODELS
from .trainer import DistillTrainer
from .weighing import check_weights_of


class _FirstStep(TrainerCallback):
    """Callback that notes the first finished step."""

    done = False

    def on_step_end(self, *args: Any, **settings: Any) -> None:
        self.done = True


def train(
    path: str | Path,
    options: Sequence[str] = (),
    work_dir: str | None = None,
    resume: str | None = None,
    amp: bool = False,
    seed: int | None = None,
    *,
    timeout: float | None = None,
    partial: bool = False,
) -> DistillTrainer:
    """Train a recipe file, and save the plain student and its tokenizer in ``output``, which only one run at a time may use.

    Args:
        path: the recipe file.
        options: overrides of its entries, ``a.b=value``.
        work_dir: overrides ``output``.
        resume: the folder of a checkpoint to resume from; ``"auto"``: the newest complete one in ``output``.
        amp: train in bfloat16.
        seed: overrides ``training.seed``.
        timeout: seconds that a process waits for the others; ``training.ddp_timeout``, or half an hour, by default.
        partial: resume even where states of the checkpoint are missing or damaged, and start these afresh.
    """
    config = load(path, options)
    config.setdefault("output", work_dir or f"work_dirs/{Path(path).stem}")
    if work_dir is not None:
        config["output"] = work_dir
    told = {**({"bf16": True} if amp else {}), **({} if seed is None else {"seed": seed})}
    if timeout is not None:
        told["ddp_timeout"] = round(timeout)
    if isinstance(config.get("training") or {}, Mapping):
        config["training"] = {**(config.get("training") or {}), **told}
    if resume is not None:
        first = newest_first(config["output"]) if resume == "auto" else [Path(resume)]
        if not any(folder.is_dir() for folder in first):
            said = (
                f"{resume} is not the folder of a checkpoint"
                if first
                else f"there is no checkpoint in {config['output']}"
            )
            raise DistillError(f"nothing to resume: {said}")
    with said_aloud():
        trainer, metrics = train_recipe(config, resume, partial)
    if trainer.is_world_process_zero():
        if metrics:
            print("  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))
        print(f"student in {config['output']}")
    return trainer


def train_recipe(
    config: Mapping[str, Any], resume: str | None = None, partial: bool = False, schedule: float = 1.0
) -> tuple[DistillTrainer, dict[str, float]]:
    """Train a recipe, and save the plain student and its tokenizer in its ``output``, which only one run at a time may use.

    Args:
        config: the recipe's entries.
        resume, partial: see :func:`train`.
        schedule: the length of the learning rate's schedule in units of the training, which stops early in a longer one.

    Returns:
        The trainer, and the student's metrics on the ``eval`` set, if any.
    """
    with held(config["output"]):
        trainer = build(config)
        if schedule != 1:
            _lengthen(trainer, schedule)
        first_step = _FirstStep()
        trainer.add_callback(first_step)
        # Errors before the first step are mistakes in the recipe; later errors are not.
        with waiting(trainer.args.ddp_timeout), one_line("training", lambda: not first_step.done):
            told = {"partial": True} if partial else {}  # another Trainer takes no such argument
            trainer.train(resume_from_checkpoint=True if resume == "auto" else resume, **told)
        trainer.save_model()
        if trainer.eval_dataset is None:
            return trainer, {}
        found = with_perplexity(config, _last_evaluation(trainer) or trainer.evaluate())
        trainer.save_metrics("eval", found)
        return trainer, _shown(found)


def _lengthen(trainer: DistillTrainer, schedule: float) -> None:
    """Let the learning rate follow a schedule that is longer than the training."""
    create = trainer.create_scheduler

    def create_longer(num_training_steps: int, *others: Any, **named: Any) -> Any:
        return create(round(num_training_steps * schedule), *others, **named)

    trainer.create_scheduler = create_longer  # type: ignore[method-assign]


def _last_evaluation(trainer: DistillTrainer) -> dict[str, float] | None:
    """Return the evaluation at the end of the training, where it is of the model that was saved."""
    if trainer.args.load_best_model_at_end:
        return None
    step = trainer.state.global_step
    entries = [entry for entry in trainer.state.log_history if "eval_loss" in entry and entry["step"] == step]
    return {key: value for key, value in entries[-1].items() if key != "step"} if entries else None


def with_perplexity(config: Mapping[str, Any], found: Mapping[str, float]) -> dict[str, float]:
    """Return an evaluation's metrics; a language model's with ``eval_perplexity``, the exponential of the loss per token."""
    if TASKS[config["task"]].model not in LANGUAGE_MODELS:
        return dict(found)
    return {**found, "eval_perplexity": math.exp(min(found["eval_loss"], 50.0))}


def evaluate(path: str | Path, student: str | Path, options: Sequence[str] = ()) -> dict[str, float]:
    """Evaluate a saved student on the ``eval`` set of a recipe.

    Args:
        path: the recipe file; its student, teachers and terms are ignored.
        student: the folder that ``save_pretrained`` wrote, or of a checkpoint.
        options: overrides of the recipe's entries, ``a.b=value``.

    Returns:
        The metrics.

    Raises:
        DistillError: the recipe has a mistake or no ``eval`` set, or there is no such folder.
    """
    with tempfile.TemporaryDirectory() as scratch, one_line("evaluation"):
        trainer, config = plain_trainer(path, student, options, scratch)
        return _shown(with_perplexity(config, trainer.evaluate()))


def plain_trainer(
    path: str | Path, student: str | Path, options: Sequence[str], output: str | Path
) -> tuple[DistillTrainer, dict[str, Any]]:
    """Return the trainer of a saved student without terms, for evaluations, and the recipe that it follows.

    Args:
        path, student, options: see :func:`evaluate`.
        output: a folder for the trainer, which writes nothing to it.

    Raises:
        DistillError: as :func:`evaluate` does.
    """
    config = {**load(path, options), "student": str(student), "adapters": None}  # a saved student has its own
    config["tokenizer"] = tokenizer_folder(config) or config.get("tokenizer")
    config = untaught(config)
    if isinstance(config.get("data"), Mapping) and not config["data"].get("eval"):
        raise DistillError(f"{path} has no set to evaluate the student on; add data.eval")
    return build({**config, "output": str(output)}), config


def check(path: str | Path, options: Sequence[str] = ()) -> None:
    """Build everything, run one step on one batch and print the wiring; up to three more give the terms' shares of the gradient."""
    from kdgraft.tables import print_rows
    from kdgraft.telling import MEASURED, print_shares, watch

    config = load(path, options)
    config.setdefault("output", f"work_dirs/{Path(path).stem}")
    trainer = build(config)
    trainer.state.epoch = 0.0
    trainer.current_gradient_accumulation_steps = 1
    with one_line("training"):
        batches = list(islice(trainer.get_train_dataloader(), MEASURED))  # on the device, as accelerate prepares them
        if config.get("trainer"):
            print(f"{'loss':<40} {float(trainer.compute_loss(trainer.model.train(), batches[0]).detach()):.5f}")
            return
        tried = trainer.on_policy_losses(batches[0])
        measured = trainer.distiller if link_of(trainer.model).chunk is None else None
        if measured is not None:
            watch(measured)
        loss = trainer.compute_loss(trainer.model.train(), dict(batches[0]))
        first = dict(link_of(trainer.model).last.losses)
        for batch in batches[1:] if measured is not None else ():
            trainer.compute_loss(trainer.model, dict(batch))
    if trainer.distiller is None:
        print("no terms: the model trains alone")
    else:
        print_rows([row._asdict() for row in trainer.distiller.rows])
        for key, value in {**first, **tried}.items():
            print(f"{key:<40} {float(value.detach()):.5f}")
    print(f"{'loss':<40} {float(loss.detach()):.5f}")
    if measured is not None:
        print_shares(measured, len(batches), "model")


def build(config: Mapping[str, Any], data: Mapping[str, Dataset] | None = None) -> DistillTrainer:
    """Build the trainer that a recipe describes.

    Args:
        config: the entries of the recipe.
        data: ``train`` and ``eval`` sets in memory, instead of files.

    Raises:
        DistillError: an entry is wrong; the message names it.
    """
    arguments = check_settings(config, files=data is None)
    set_seed(arguments.seed)
    task, told = str(config["task"]), dict(config.get("data") or {})
    if not TASKS[task].texts:
        arguments.remove_unused_columns = False  # the collator reads images and boxes of columns that no model takes
    layout = layout_of(task, told)
    sets = dict(data) if data is not None else layout.sets_of(told)
    check_weights_of(told, sets["train"])
    theirs = teacher_tokenizer(config)
    texts = any(reads_texts(source) for source in sources_in(config).values())
    samples = layout(task, told, sets, kept=texts or theirs is not None)
    tokenizer = build_reader(samples, sets["train"], config)
    samples.read_classes(sets)
    check_best(arguments, samples)
    sets["train"] = drawn(sets["train"], told.get("fraction") or 1, arguments.seed)
    encoded = {split: samples.encode(split, found, tokenizer) for split, found in sets.items()}
    names = samples.names
    student = adapted(build_model(config["student"], task, tokenizer, names), config.get("adapters"), TASKS[task].model)
    collator = second_view(
        samples.collator(tokenizer, student), theirs, samples.text_columns, words=task == "tokens", texts=texts
    )
    settings = {key: config.get(key) for key in ("recipe", "terms", "init_from")}

    def peer(owner: str, spec: Any) -> Any:
        return build_model(spec, task, tokenizer, names, owner)

    parts = dict(
        model=student,
        args=arguments,
        train_dataset=encoded["train"],
        eval_dataset=encoded.get("eval"),
        data_collator=collator,
        processing_class=tokenizer,
        compute_metrics=samples.metrics(),
    )
    if config.get("trainer"):
        return _other_trainer(config["trainer"], parts)
    with isolated_rng():
        settings |= recipe_sources(config, samples, peer)
    taught = bool(settings["teacher"] or settings["teachers"])
    with one_line("training"):
        trainer = trainer_of(task)(
            **parts,
            chunked=(config.get("chunked") or False) if taught else False,
            host_weight=config.get("host_weight", 1) if taught else 1,
            on_policy=config.get("on_policy") if taught else None,
            weights=told.get("weights") if taught else None,
            **settings,
        )
    if TASKS[task].texts:
        seen = (tokenizer, encoded) if theirs is None else (theirs, read_by_teacher(collator, encoded))
        check_sizes("student", student, tokenizer, encoded)
        _check_texts(trainer, student, seen, packed=bool(told.get("packed")))
    return trainer


def _check_texts(trainer: DistillTrainer, student: Any, seen: tuple[Any, Any], *, packed: bool) -> None:
    """Refuse teachers that cannot read the tokens, ``seen`` by their tokenizer, and models that do not keep packed texts apart."""
    if packed:
        check_apart(base_of(student), "student")
    for name, source in trainer.distiller.sources.items() if trainer.distiller is not None else ():
        if source.members == (name,) and not isinstance(source, ClassTeacher):
            check_sizes(name, source.model, *seen)
            if packed and not isinstance(source, Cached):
                check_apart(source.model, name)


def _other_trainer(told: Mapping[str, Any], parts: Mapping[str, Any]) -> Any:
    """Return the Trainer that the function of a recipe's ``trainer`` builds.

    Args:
        told: the entry.
        parts: the arguments of a Trainer.
    """
    with one_line("trainer"):
        own = {name: value for name, value in told.items() if name != "type"}
        trainer = called(str(told["type"]), {**parts, **own})
    if not isinstance(trainer, Trainer):
        raise DistillError(f"trainer: {told['type']} returned a {type(trainer).__name__}, not a transformers.Trainer")
    return trainer


def _shown(found: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics of an evaluation without its times."""
    others = ("runtime", "per_second", "epoch", "model_preparation")
    return {key.removeprefix("eval_"): value for key, value in found.items() if not any(word in key for word in others)}
