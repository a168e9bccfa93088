"""Filling a store with the outputs of a teacher: ``kdgraft cache``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import set_seed

from kdgraft.batch import Samples
from kdgraft.engine import Engine
from kdgraft.errors import DistillError, check_number
from kdgraft.files import held
from kdgraft.isolation import isolated_rng
from kdgraft.sources import Cached, Source, Teacher
from kdgraft.store import KEYS, LENGTHS, Index, Store, fingerprint, narrowed, packed_ids
from kdgraft.taps import Recording, Tap
from kdgraft.terms import ScoreTerm
from kdgraft.topk import TopK

from .adapters import AdaptersOff, base_of
from .cache import check_storable
from .checks import one_line
from .class_teachers import ClassTeacher
from .link import link_of
from .packing import check_apart, texts_of
from .recipe_tasks import TASKS
from .run import build
from .served import Served
from .settings import load
from .stored import LOGITS, digest_of_tokenizer, texts_in
from .tasks import LANGUAGE_MODELS, accepted, task_of
from .vocabularies import tokenizer_of

Values = Literal["float16", "float32"]
PER_PART = 1024
AT_ONCE = 1024
"""The tokens whose distributions are sorted at once, for which some copies of their logits are made."""


def fill_store(
    trainer: Any,
    folder: str | Path,
    *,
    top_k: int | None = 50,
    values: Values = "float16",
    per_part: int = PER_PART,
    progress: bool = True,
) -> Store:
    """Run a trainer's teacher on its training set, and store what its terms read of it.

    Several processes (``torchrun``, ``accelerate launch``) share the work. A call that was interrupted goes on where it was, and ends
    with the same files, byte for byte.

    Args:
        trainer: a trainer that distils, with the teacher, terms, data set and collator of the training to come; nothing is trained.
        folder: the folder of the store.
        top_k: of a language model's tokens, the number of largest probabilities to keep; ``None`` keeps all logits.
        values: the type of the numbers. A probability p has an error of about |log p| · p / 2000 in ``"float16"``.
        per_part: the number of samples in a file.
        progress: show a progress bar.

    Returns:
        The complete store; on several processes this process's share of it.

    Raises:
        DistillError: the teacher's outputs cannot be stored, or the folder has a store of something else.
    """
    if top_k is not None:
        check_number("fill_store", "top_k", top_k, 1, whole=True)
    check_number("fill_store", "per_part", per_part, 1, whole=True)
    if values not in ("float16", "float32"):
        raise DistillError(f"fill_store: values must be 'float16' or 'float32', got {values!r}")
    filler = _Filler(trainer, top_k, values, per_part)
    store = Store.create(folder, filler.about())
    process, count = trainer.args.process_index, trainer.args.world_size
    missing = set(store.missing())
    todo = [part for part in range(store.parts)[process::count] if part in missing]
    for part in tqdm(todo, desc="store", unit="part", disable=not progress or process > 0):
        store.write(part, filler.part(store.samples_of(part)))
    return store


def fill_recipe(
    path: str | Path, folder: str | Path, options: Sequence[str] = (), *, top_k: int | None, values: Values
) -> Store:
    """Fill a store for a recipe file, and say how large it is: ``kdgraft cache``.

    Args:
        path, options: the recipe, with its teacher.
        folder, top_k, values: see :func:`fill_store`.
    """
    config = load(path, options)
    task = config.get("task")
    if task in TASKS and not TASKS[task].texts:
        raise DistillError(
            f"a store is filled with what a teacher says of texts; let the teacher run in recipes of task {task}"
        )
    config |= {"chunked": False, "on_policy": None, "output": str(folder)}
    if isinstance(config.get("training") or {}, Mapping):
        alone = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
        config["training"] = {**(config.get("training") or {}), **alone}
    trainer = build(config)
    with held(folder) if trainer.args.process_index == 0 else nullcontext(), one_line("cache"):
        store = fill_store(trainer, folder, top_k=top_k, values=values)
        trainer.accelerator.wait_for_everyone()
    if trainer.args.process_index == 0:
        index = Index(store)
        tokens = index.tokens
        each = f", {store.size() / tokens:.0f} bytes a token" if tokens else ""
        print(f"{len(index)} texts and {tokens} tokens in {folder}: {store.size() / 2**20:.1f} MiB{each}")
    return store


class _Filler:
    """Runs the teacher of a trainer on samples, for a store."""

    def __init__(self, trainer: Any, top_k: int | None, values: Values, per_part: int) -> None:
        self.trainer, self.top_k, self.values, self.per_part = trainer, top_k, np.dtype(values), per_part
        engine = getattr(trainer, "distiller", None)
        if engine is None:
            raise DistillError("nothing is read of a teacher; distil the trainer with terms or a recipe first")
        if type(trainer.model).__module__.startswith("sentence_transformers."):
            raise DistillError(
                "a store is filled by a Trainer of transformers' models; distil the transformer in this one"
            )
        self.engine: Engine = engine
        self.source = _only_teacher(engine)
        self.model = self.source.model
        self.student = base_of(trainer.model)
        self.link = link_of(self.student)
        if self.link.chunk is not None:
            raise DistillError(
                "a store is filled from whole logits; leave out chunked, and take a Trainer that computes them"
            )
        self.taps = list(dict.fromkeys(engine.taps(self.source.name)))
        for term in engine.all_terms:
            check_storable(term.teacher_taps, term.name, "a store")
        self.rows = trainer.train_dataset
        if not hasattr(self.rows, "__len__") or not len(self.rows):
            raise DistillError(
                "a data set without samples, or without a length, cannot be stored; give one of known length"
            )
        if task_of(self.model) in ("choice", "ctc"):
            raise DistillError(
                f"a store cannot hold outputs of a {type(self.model).__name__}, whose samples are padded to one another"
            )
        if getattr(trainer.data_collator, "teacher_tokenizer", None) is not None:
            raise DistillError(
                "a store holds what a teacher gives to the student's own tokens; leave out its tokenizer"
            )
        scores: list[Any] = [term.scores for term in engine.all_terms if isinstance(term, ScoreTerm)]
        self.common = next((one.common for one in scores if getattr(one, "common", None) is not None), None)
        self.size = trainer.args.per_device_train_batch_size
        if isinstance(self.source, Served):
            self._check_served(self.source)
        self.temperatures = sorted({float(getattr(term, "temperature", 1.0)) for term in engine.all_terms} | {1.0})
        self._check_fixed()
        self.described = self._describe()

    def about(self) -> dict[str, Any]:
        """Return the header of the store."""
        config: Any = self.model.config
        tokenizer = tokenizer_of(self.trainer)
        return {
            "teacher": {
                "class": type(self.model).__name__,
                "config": json.loads(config.to_json_string()),
                "weights": fingerprint(self.model),
                **({"served": self.source.outputs.model} if isinstance(self.source, Served) else {}),
            },
            "tokenizer": digest_of_tokenizer(tokenizer) if hasattr(tokenizer, "get_vocab") else None,
            "data": self._digest_of_data(),
            "taps": self.described,
            "values": self.values.name,
            "samples": len(self.rows),
            "per_part": self.per_part,
            "batch": self.trainer.args.per_device_train_batch_size,
        }

    def part(self, places: range) -> dict[str, NDArray[Any]]:
        """Return the columns of some samples."""
        found: dict[str, list[NDArray[Any]]] = {}
        for start in range(0, len(places), self.size):
            for name, rows in self._of_batch(places[start : start + self.size]).items():
                found.setdefault(name, []).append(rows)
        return {name: np.concatenate(rows) for name, rows in found.items()}

    def _batch(self, places: Sequence[int]) -> Mapping[str, Any]:
        collator = self.trainer._get_collator_with_removed_columns(self.trainer.data_collator)
        return self.trainer._prepare_inputs(collator([self.rows[place] for place in places]))  # type: ignore[no-any-return]

    def _record(self, batch: Mapping[str, Any]) -> tuple[Mapping[str, Any], Recording]:
        """Return what the teacher reads of a batch, and what its taps gave."""
        inputs = self.link.of_source(batch, self.source.name, self.model)
        read = self.link.read(batch)
        read.samples = Samples([], {name: value for name, value in inputs.items() if isinstance(value, Tensor)})
        device = next(self.student.parameters()).device
        with self.trainer.accelerator.autocast():  # in the precision of the training
            found = self.engine.record(self.source.name, lambda _: self.model(**inputs), read, device)
        return inputs, found

    def _check_served(self, source: Served) -> None:
        """Refuse to store another number of entries than the server gives, and fill its queue."""
        given, asked = source.outputs.k, self.top_k
        if asked is None or min(asked, source.outputs.classes) != given:
            raise DistillError(
                f"the server is asked for {given} entries of each token, and the store for {'all logits' if asked is None else asked}; give "
                "the teacher's top_k and that of the store (--top-k) the same number"
            )
        self.size = max(self.size, source.outputs.server.concurrency)

    def _check_fixed(self) -> None:
        """Refuse inputs that are drawn anew each time, by collating the first batch twice."""
        keys = []
        for seed in (0, 1):
            with isolated_rng():
                set_seed(seed)
                batch = self._batch(range(min(self.size, len(self.rows))))
            inputs = self.link.of_source(batch, self.source.name, self.model)
            keys.append(texts_in(inputs)[0])
        if texts_of(inputs) is not None and not isinstance(self.source, Served):  # which is sent each text on its own
            check_apart(self.model, "teacher")
        if keys[0].shape != keys[1].shape or (keys[0] != keys[1]).any():
            raise DistillError(
                "the inputs are drawn anew each time (random masks or views), so that no stored output would be found; give the teacher"
            )

    def _describe(self) -> dict[str, Any]:
        """Return, for each tap, what the store has of it, from the first batch."""
        inputs, recording = self._record(self._batch(range(min(self.size, len(self.rows)))))
        tokens = inputs.get("input_ids")
        found: dict[str, Any] = {}
        for tap in self.taps:
            value = _value(recording, tap)
            if isinstance(value, TopK):
                at = list(value.temperatures)
                found[str(tap)] = dict(per="token", k=value.ids.shape[-1], classes=value.classes, temperatures=at)
                continue
            per_token = tokens is not None and value.shape[:2] == tokens.shape
            per_token = per_token and (value.ndim == 3 or tap.text in ("[start_logits]", "[end_logits]"))
            if not per_token and len(value) != len(next(iter(inputs.values()))):
                raise DistillError(
                    f"'{tap}' has {len(value)} rows for another number of samples, which cannot be stored; leave out the term"
                )
            told: dict[str, Any] = {
                "per": "token" if per_token else "sample",
                "shape": list(value.shape[2 if per_token else 1 :]),
            }
            classes = min(value.shape[-1], self.common or value.shape[-1])  # those that the student has too
            tokens_alone = str(tap) == LOGITS and per_token and task_of(self.model) in LANGUAGE_MODELS
            if tokens_alone and self.top_k is not None and self.top_k <= classes:
                told = {"per": "token", "k": self.top_k, "classes": classes, "temperatures": self.temperatures}
            found[str(tap)] = told
        return found

    def _of_batch(self, places: Sequence[int]) -> dict[str, NDArray[Any]]:
        inputs, recording = self._record(self._batch(places))
        keys, texts = texts_in(inputs)
        lengths = [0 if where is None else len(where) for _, where in texts]
        found: dict[str, NDArray[Any]] = {KEYS: keys, LENGTHS: np.array(lengths, np.int64)}
        for tap in self.taps:
            found |= dict(self._columns(str(tap), _value(recording, tap), texts))
        return found

    def _columns(
        self, tap: str, value: Tensor | TopK, texts: Sequence[tuple[int, Tensor | None]]
    ) -> Iterator[tuple[str, NDArray[Any]]]:
        told = self.described[tap]
        if isinstance(value, TopK):
            parts = [value[row][where] for row, where in texts]
        elif told["per"] == "sample":
            yield tap, self._numbers(value[[row for row, _ in texts]])
            return
        else:
            rows = torch.cat([value[row][where] for row, where in texts if where is not None])
            if "k" not in told:
                yield tap, self._numbers(rows)
                return
            parts = [
                TopK.of(part, told["k"], told["temperatures"]) for part in rows[:, : told["classes"]].split(AT_ONCE)
            ]
        ids = torch.cat([part.ids for part in parts])
        yield f"{tap}/ids", packed_ids(ids.cpu().numpy(), told["classes"])
        for name in ("logs", "norms", "rests"):
            yield f"{tap}/{name}", self._numbers(torch.cat([getattr(part, name) for part in parts]))

    def _numbers(self, value: Tensor) -> NDArray[Any]:
        return narrowed(value.detach().float().cpu().numpy(), self.values.name)

    def _digest_of_data(self) -> str:
        digest = hashlib.sha256()
        columns = getattr(self.rows, "column_names", None)
        if columns is not None and "input_ids" in columns:
            rows = (
                ids for start in range(0, len(self.rows), 1000) for ids in self.rows[start : start + 1000]["input_ids"]
            )
        else:
            rows = (row["input_ids"] for row in self.rows if isinstance(row, Mapping) and "input_ids" in row)
        for ids in rows:
            flat = np.asarray(ids, np.int64).ravel()
            digest.update(len(flat).to_bytes(8, "little") + flat.tobytes())
        return digest.hexdigest()


def _only_teacher(engine: Engine) -> Teacher:
    found: list[Source] = list(engine.sources.values())
    elsewhere = isinstance(found[0], (Cached, AdaptersOff)) and not isinstance(found[0], Served)
    if len(found) != 1 or not isinstance(found[0], Teacher) or elsewhere:
        raise DistillError("a store holds the outputs of one frozen teacher; give one model or folder as the teacher")
    if isinstance(found[0], ClassTeacher):
        raise DistillError(
            f"a store is of a classifier, and {type(found[0]).__name__} is none; write its probabilities into a column of soft labels"
        )
    if "decoder_input_ids" in accepted(found[0].model):
        raise DistillError(f"a store cannot hold outputs of a model with a decoder ({type(found[0].model).__name__})")
    return found[0]


def _value(recording: Recording, tap: Tap) -> Tensor | TopK:
    value: Any = recording[tap]
    found: Tensor | TopK = value[0] if isinstance(value, (tuple, list)) else value
    return found
