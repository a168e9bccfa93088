"""The graft on a Hugging Face student: a subclass of its own class, with the distiller as a child module.

The model stays an instance of its class under its own name, so the Trainer wraps, clips, evaluates, saves and reloads the plain
student. In training its ``forward`` also runs the teacher and the terms, inside whatever the host wrapped around it (DDP,
autocast).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import is_dataclass, make_dataclass
from functools import cache, wraps
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdgraft.classes import class_order
from kdgraft.distiller import HostDistiller
from kdgraft.distributed import sum_over_ranks, world_size
from kdgraft.errors import DistillError, WiringError
from kdgraft.hiding import hide_from_state_dict
from kdgraft.isolation import isolated_rng
from kdgraft.regions import Batch
from kdgraft.schedules import Step
from kdgraft.taps import Recorder, Recording
from kdgraft.teacher import Teacher

from .attention import AttentionRecorder
from .cache import TeacherCache
from .chunked import PLAIN, Part, Tail, chunked_losses, head_of
from .heads import check_heads, router_loss
from .logits import LogitTerm
from .registry import TERMS
from .tasks import accepted, auto_class, decoder_inputs, example, frame_mask, has_decoder, task_of
from .tokens import IGNORED, SAMPLE_IDS, TEACHER_INPUTS, TOKEN_PAIRS, Frames, read_batch

LABELS = frozenset({"labels", "start_positions", "end_positions", "next_sentence_label", "num_items_in_batch"})


class TextDistiller(HostDistiller):
    """The distiller of Hugging Face models: it hears attention, too."""

    recorder: type[Recorder] = AttentionRecorder

    def record_through(
        self, cache: TeacherCache | None, ids: Any, inputs: Mapping[str, Any], run: Callable[[], Any], device: str
    ) -> Recording:
        """The teacher's recording, from the cache where there is one that knows these samples."""
        if cache is None or ids is None:
            return self.record_teacher(run, device)
        taps = self._teacher_recorder.taps
        given = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        found = cache.look_up(ids, given, taps)
        if found is not None:
            return found
        recording = self.record_teacher(run, device)
        cache.store(ids, given, recording, taps)
        return recording


class Link:
    """What the Trainer tells the student before a step, and what it gets back."""

    def __init__(self, task: str, teacher: nn.Module | None, takes: set[str]) -> None:
        self.task = task
        self.takes = takes
        self.teacher_takes = accepted(teacher) if teacher is not None else set()
        self.frames: tuple[Frames, Frames] = (None, None)
        self.order: Tensor | None = None
        self.batch: Batch | None = None
        self.step: Step | None = None
        self.totals: dict[str, Tensor] = {}
        self.parts = 1
        self.losses: dict[str, Tensor] | None = None
        self.steps = 0
        self.chunk: int | None = None
        self.tails = (PLAIN, PLAIN)
        """What student and teacher make of their output layers' logits."""
        self.cache: TeacherCache | None = None
        self.host_factor = 1.0
        """What the Trainer multiplies the model's own loss by, relative to the terms'."""

    def read(self, inputs: Mapping[str, Any]) -> Batch:
        """What terms know of a batch."""
        return read_batch(inputs, self.task, self.frames)

    def of_student(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Without what only the teacher takes."""
        foreign = {TEACHER_INPUTS, TOKEN_PAIRS, SAMPLE_IDS} | (self.teacher_takes - self.takes)
        return {name: value for name, value in inputs.items() if name not in foreign}

    def of_teacher(self, inputs: Mapping[str, Any], teacher: Any) -> dict[str, Any]:
        """What the teacher takes of the batch; no labels, so that it computes no loss."""
        own = inputs.get(TEACHER_INPUTS, {})
        found = {**inputs, **own}
        other = own.get("input_ids") is not None
        if other:  # another tokenizer: nothing of the student's tokens
            found = {**{k: v for k, v in inputs.items() if not _per_token(k)}, **own}
        if has_decoder(teacher) and found.get("decoder_input_ids") is None:
            labels = own.get("labels") if other else found.get("labels")
            if other and labels is None:
                raise DistillError(
                    "a teacher with a decoder and a tokenizer of its own needs its own target tokens; give the data set a column "
                    "teacher_decoder_input_ids or teacher_labels"
                )
            if labels is not None:
                found["decoder_input_ids"] = decoder_inputs(teacher, labels)
        keep = self.teacher_takes - LABELS
        found = {name: value for name, value in found.items() if name in keep}
        if "use_cache" in keep:
            found["use_cache"] = False
        return found


def _per_token(name: str) -> bool:
    names = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "special_tokens_mask")
    return name in names or name.startswith("decoder_")


class Grafted:
    """Mixed in before the student's own class."""

    distiller: TextDistiller | None
    _distill: Link

    def plain_forward(self, *args: Any, **inputs: Any) -> Any:
        """The student's own forward."""
        return super().forward(*args, **inputs)  # type: ignore[misc]

    def distilling_forward(self, *args: Any, **inputs: Any) -> Any:
        """The student's output; in training also the teacher's pass and ``distill``, the terms' losses, in the output."""
        link, distiller = self._distill, self.distiller
        own = link.of_student(inputs)
        if distiller is None or not self.training or not torch.is_grad_enabled():  # type: ignore[attr-defined]
            return self.plain_forward(*args, **own)
        batch = link.batch if link.batch is not None else link.read(inputs)
        step = link.step if link.step is not None else Step(link.steps, 0)
        link.steps += 1
        device = next(self.parameters()).device  # type: ignore[attr-defined]
        if link.order is not None:
            batch.class_order = link.order = link.order.to(device)
        active = distiller.active(step)
        teacher = None
        if active:
            model = distiller.teacher.model
            given = link.of_teacher(inputs if "labels" in inputs else {**inputs, "labels": batch.labels}, model)
            teacher = distiller.record_through(
                link.cache, inputs.get(SAMPLE_IDS), given, lambda: model(**given), device.type
            )
        if link.chunk is not None:
            return self._in_chunks(own, batch, step, teacher)
        with distiller.record_student(self) if active else nullcontext() as student:  # type: ignore[arg-type]
            output = self.plain_forward(*args, **own)
        link.losses = distiller.losses(student, teacher, batch, step, device, link.totals, link.parts)
        return _with_losses(output, link.losses)

    def _in_chunks(self, inputs: dict[str, Any], batch: Batch, step: Step, teacher: Recording | None) -> Any:
        """As the plain pass, but the losses on logits come from hidden states; the output has no logits."""
        link, distiller = self._distill, self.distiller
        assert distiller is not None and link.chunk is not None
        labels = inputs.pop("labels", None)
        if labels is None:
            raise DistillError("chunked=True computes the host's loss itself and needs labels in the batch")
        items = inputs.pop("num_items_in_batch", None)
        empty = torch.zeros(0, dtype=torch.long, device=labels.device)
        states_seen: list[Tensor] = []
        hook = self.base_model.register_forward_hook(lambda _, args, output: states_seen.append(output[0]))  # type: ignore[attr-defined]
        try:
            with distiller.record_student(self) as student:  # type: ignore[arg-type]
                output = self.plain_forward(**inputs, logits_to_keep=empty)
        finally:
            hook.remove()
        hidden = states_seen[0].flatten(0, 1)
        targets = F.pad(labels, (0, 1), value=IGNORED)[:, 1:].flatten()
        items = (targets != IGNORED).sum().clamp(min=1) if items is None else torch.as_tensor(items)
        hard = 1 / items.to(hidden.device).float()
        terms = [term for term in distiller.active(step) if isinstance(term, LogitTerm)]

        def total(terms: list[LogitTerm]) -> tuple[Tensor, Tensor]:
            parts, states, head = [], None, None
            for term in terms:
                count = link.totals.get(term.name)
                if count is None:
                    own = term.count(batch)
                    assert own is not None
                    count = sum_over_ranks(own.to(hidden.device)) * link.parts
                factor = term.weight_at(step) * world_size() / count.clamp(min=1).to(hidden.device) / link.host_factor
                parts.append(Part(term.on_chunk, term.counted(batch).flatten().to(hidden.device), factor.float()))
            if terms:
                assert teacher is not None
                states = teacher[terms[0].teacher_taps[0]].flatten(0, 1)
                head = head_of(distiller.teacher.model, link.tails[1])
            return chunked_losses(
                hidden, head_of(self, link.tails[0]), targets, hard, states, head, parts, link.chunk or 1
            )

        whole, sums = total(terms)
        for term, value in zip(terms, sums[1:], strict=True):
            term.ready = value.float()
        before = dict(distiller.dropped)
        link.losses = distiller.losses(student, teacher, batch, step, hidden.device, link.totals, link.parts)
        finite = [term for term in terms if distiller.dropped[term.name] == before[term.name]]
        if len(finite) < len(terms):
            whole, sums = total(finite)
        # The terms' values are counted by their names; their gradient comes with the host's loss.
        output["loss"] = (sums[0] * hard).float() + (whole - whole.detach())
        router = router_loss(self, output)
        if router is not None:
            output["loss"] = output["loss"] + router.to(whole)
        return _with_losses(output, link.losses)


def _with_losses(output: Any, losses: Mapping[str, Tensor]) -> Any:
    """The output with the terms' losses in it, so that DDP sees every parameter of the terms in what the pass returns."""
    if is_dataclass(output):
        found = {key: value for key, value in losses.items() if key.endswith(".loss")}
        output = _output_class(type(output))(**output, distill=found)  # type: ignore[arg-type]
    return output


@cache
def _output_class(plain: Any) -> Any:
    """The model's own class of outputs with one field more."""
    return make_dataclass(
        plain.__name__, [("distill", Any, None)], bases=(plain,), namespace={"__module__": plain.__module__}
    )


@cache
def _graft_class(student: Any) -> Any:
    forward = wraps(student.forward)(lambda self, *args, **inputs: self.distilling_forward(*args, **inputs))
    names = {"forward": forward, "__module__": student.__module__, "__qualname__": student.__qualname__}
    return type(student.__name__, (Grafted, student), names)


def graft(
    student: Any,
    teacher: Any,
    terms: list[Any],
    *,
    dry_run: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
    chunk: int | None = None,
    cache: TeacherCache | None = None,
) -> Any:
    """Grafts the distiller on a student, in place.

    Args:
        student: a model of Hugging Face.
        teacher: a model, a :class:`~kdgraft.Teacher`, or the folder that ``save_pretrained`` wrote; may be left out without
            terms.
        terms: names, dicts or instances.
        dry_run: one small batch for both models; made from their configs by default.
        facts: what is known of the vocabularies: ``vocabulary`` (``"same"``, ``"different"``), ``vocabulary_checked`` (entries of
            the tokenizer).
        chunk: tokens at a time for losses on a causal model's logits; ``None``: all at once.
        cache: of the teacher's outputs, for batches with sample ids.

    Raises:
        DistillError: a wrong teacher; :class:`~kdgraft.WiringError`: a term that cannot work on the two.
    """
    _check_student(student)
    if chunk is not None and not terms:
        raise DistillError("chunked=True belongs to a distillation; give it terms or a recipe")
    model: Any = student
    task = task_of(student)
    takes = accepted(student)
    distiller = None
    device = next(student.parameters()).device
    with isolated_rng():
        held = build_teacher(teacher, student, task) if terms else None
    link = Link(task, None if held is None else held.model, takes)
    if held is not None:
        link.frames = frame_mask(student), frame_mask(held.model)
    kind: Any = student.__class__
    student.__class__ = _graft_class(kind)
    model._distill = link
    student.add_module("distiller", None)
    if held is not None:
        try:
            with isolated_rng():
                distiller = TextDistiller(held, terms, TERMS)
                distiller.teacher.load()
                held.model.to(device)
                ours = dict(dry_run) if dry_run is not None else example(student)
                theirs = link.of_teacher(ours, held.model) if dry_run is not None else example(held.model)
                ours = _without_labels(student, link.of_student(ours))
                if chunk is not None:
                    link.tails = _chunk(student, distiller, task, ours, theirs)
                    link.chunk = chunk
                _wire(student, distiller, ours, theirs, facts or {})
                if cache is not None:
                    if task in ("seq2seq", "ctc"):
                        raise WiringError(
                            f"the cache keeps outputs of the tokens that {type(student).__name__} is given, not of a decoder's or "
                            "of frames; leave the cache out"
                        )
                    for term in distiller._all_terms():
                        cache.check(term.teacher_taps, term.name)
                    link.cache = cache
                if any(term.compares_classes for term in distiller._all_terms()):
                    names = _class_names(student), _class_names(held.model)
                    if any(names):
                        link.order = class_order(*names, ("student's config", "teacher's config"))
        except BaseException:
            student.__class__ = kind
            del student._modules["distiller"], student._distill
            raise
        hide_from_state_dict(distiller)
        distiller.to(device)
    student.add_module("distiller", distiller)
    return student


def _check_student(student: Any) -> None:
    """Refuses what cannot be grafted on; takes off what accelerate left."""
    if isinstance(student, Grafted):
        raise DistillError("this student is being distilled already; build a new one for another distiller")
    if not isinstance(student, nn.Module) or not hasattr(student, "config"):
        raise DistillError(f"the student must be a Hugging Face model, got {type(student).__name__}")
    before = vars(student).get("_original_forward")  # accelerate's, left by an evaluation in mixed precision
    if getattr(before, "__func__", None) is type(student).forward:
        del student.forward, student._original_forward
    if "forward" in vars(student):
        raise DistillError(
            f"something has replaced the forward of this {type(student).__name__}; distil first, wrap or patch it afterwards"
        )


def _chunk(student: Any, distiller: TextDistiller, task: str, ours: Any, theirs: Any) -> tuple[Tail, Tail]:
    if task != "causal":
        raise WiringError(f"chunked=True is for causal language models, and {type(student).__name__} is none")
    tails = check_heads(student, ours), check_heads(distiller.teacher.model, theirs)
    for term in distiller._all_terms():
        if isinstance(term, LogitTerm):
            if not term.same_vocabulary:
                raise WiringError(f"{term.name} sorts whole vocabularies and cannot be chunked; leave chunked out")
            term.chunked = True
    return tails


def _without_labels(student: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A batch as the dry run takes it: no labels, of which a decoder's inputs are made."""
    found = {name: value for name, value in inputs.items() if name not in LABELS}
    if has_decoder(student) and "decoder_input_ids" not in found and "labels" in inputs:
        found["decoder_input_ids"] = decoder_inputs(student, inputs["labels"])
    return found


def _wire(student: Any, distiller: TextDistiller, ours: Any, theirs: Any, facts: Mapping[str, Any]) -> None:
    model = distiller.teacher.model
    distiller.wire(
        student,
        lambda: student.plain_forward(**ours),
        lambda: model(**theirs),
        frozenset({"labels"}),
        facts,
    )


def build_teacher(teacher: Any, student: nn.Module, task: str) -> Teacher:
    """A :class:`~kdgraft.Teacher` from a model or from a folder of ``save_pretrained``, loaded strictly.

    Raises:
        DistillError: no teacher, a folder that is none, or weights that do not fit; the message lists the keys.
    """
    if teacher is None:
        raise DistillError("terms need teacher=…: a model, or the folder that save_pretrained wrote")
    if isinstance(teacher, (str, Path)):
        teacher = _load_teacher(Path(teacher), student, task)
    if isinstance(teacher, nn.Module):
        trained = {id(p) for p in student.parameters() if p.requires_grad}
        if any(id(p) in trained for p in teacher.parameters()):
            raise WiringError("student and teacher share parameters, which the teacher would freeze; copy.deepcopy one")
        if not hasattr(teacher, "config"):
            raise DistillError(f"the teacher must be a Hugging Face model, got {type(teacher).__name__}")
        teacher = Teacher(teacher)
    if not isinstance(teacher, Teacher):
        raise DistillError(f"teacher must be a model or a folder, got {teacher!r}")
    return teacher


def _load_teacher(folder: Path, student: nn.Module, task: str) -> nn.Module:
    if not (folder / "config.json").is_file():
        raise DistillError(
            f"no teacher at {folder}: there is no config.json; give the folder that save_pretrained wrote"
        )
    loads = auto_class(student)
    if loads is None:
        raise DistillError(
            f"cannot tell which kind of model {type(student).__name__} is; load the teacher and pass the model"
        )
    try:
        model, found = loads.from_pretrained(folder, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise DistillError(f"cannot load the teacher {folder}: {' '.join(str(error).split())[:300]}") from None
    problems = [
        f"{len(found[kind])} {kind.removesuffix('_keys')}: {', '.join(str(key) for key in sorted(found[kind], key=str)[:4])}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if found.get(kind)
    ]
    if problems:
        raise DistillError(
            f"checkpoint {folder} does not fit the teacher {type(model).__name__}; {'; '.join(problems)}"
        )
    return model


def _class_names(model: Any) -> list[str] | None:
    """The names in ``config.id2label``; ``None`` for the default ones, LABEL_0 and so on."""
    names = getattr(model.config, "id2label", None)
    if not names:
        return None
    found = [names[key] for key in sorted(names)]
    return None if all(name == f"LABEL_{i}" for i, name in enumerate(found)) else found
