"""The graft on a Hugging Face student: a subclass of its own class, with the engine as a child module.

The model stays an instance of its class under its own name, so the Trainer wraps, clips, evaluates, saves and reloads the plain
student. In training its ``forward`` also runs the sources and the terms, inside whatever the host wrapped around it (DDP,
autocast).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass, make_dataclass
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn

from kdgraft.batch import Batch, Samples
from kdgraft.engine import Engine
from kdgraft.errors import DistillError, WiringError
from kdgraft.hiding import hide_from_state_dict, own_children
from kdgraft.isolation import isolated_rng
from kdgraft.schedules import Step
from kdgraft.sources import STUDENT, Cached, Ensemble, Itself, Source, Teacher
from kdgraft.terms import ScoreTerm

from .attention import AttentionRecorder
from .cache import TeacherCache
from .chunked import LogitTransform, head_of
from .heads import check_heads
from .initialisation import init_from_teacher
from .layers import refuse_dropped_layers
from .link import LABELS, Link, link_of, tie, untie
from .passes import no_loss, run_student
from .reader import ChunkedReader, HFReader
from .registry import TERMS
from .sources import build_sources, compare_classes
from .tasks import (
    accepted,
    base_of,
    by_name,
    decoder_inputs,
    example,
    frame_mask,
    has_decoder,
    reads_text_alone,
    task_of,
)
from .tokens import SAMPLE_IDS, TEACHER_INPUTS, tokens_of


class Grafted:
    """Mixed in before the student's own class."""

    distiller: Engine | None

    def __reduce_ex__(self, _: Any) -> Any:
        """Copies and pickles are plain students: a teacher belongs in no file, and a copy is taken to be kept as it is."""
        plain = object.__new__(_student_class(self))
        plain.__dict__.update(vars(self))
        own_children(plain)
        _take_off(plain, type(self))
        return plain.__reduce_ex__(1)  # later protocols insist on this object's own class

    def plain_forward(self, *args: Any, **inputs: Any) -> Any:
        """The student's own forward."""
        return super().forward(*args, **inputs)  # type: ignore[misc]

    def distilling_forward(self, **inputs: Any) -> Any:
        """The student's output; in training also the sources' passes and ``distill``, the terms' losses, in the output."""
        link, engine = link_of(self), self.distiller
        own = link.of_student(inputs)
        asked = link.asked is not None or not link.hosted
        if engine is None or not asked or not self.training or not torch.is_grad_enabled():  # type: ignore[attr-defined]
            return self.plain_forward(**own)
        current, device = link.next_step(), next(self.parameters()).device  # type: ignore[attr-defined]
        batch, totals = link.of_pass(inputs, current)
        # Before any model is listened to, which hides the arguments that its forward names.
        theirs = _inputs_of_sources(link, engine, inputs, batch, current.at)

        def run(source: Source) -> Any:
            return source.model(**theirs[source.name])

        with engine.step(self, batch, current.at, run, device, totals=totals, parts=current.parts) as step:  # type: ignore[arg-type]
            ran = run_student(self, own)
        losses = ran.finish(step)
        peers = {
            name: (found["loss"] if "loss" in found else no_loss(found)) * step.host_share(listener=name)
            for name, found in step.outputs.items()
        }
        current.keep(step, losses, peers)
        current.without_loss = isinstance(ran.output, Mapping) and "loss" not in ran.output
        return _with_losses(ran.output, {**losses, **{f"peer.{name}.loss": value for name, value in peers.items()}})


def _inputs_of_sources(
    link: Link, engine: Engine, inputs: Mapping[str, Any], batch: Batch, at: Step
) -> dict[str, Mapping[str, Any]]:
    """What each source's model is given in a step, by its name; a teacher with a store learns which samples these are.

    Raises:
        DistillError: the batch has tokens of the teacher's own, and a source reads the student's.
    """
    others = [name for name, source in engine.sources.items() if not isinstance(source, (Teacher, Ensemble))]
    if others and inputs.get(TEACHER_INPUTS) is not None:
        raise DistillError(
            f"the batch has tokens or columns of the teacher's own, and {others[0]!r} reads the student's; take the second "
            "tokenizer and the columns teacher_… out, or that source"
        )
    given = inputs if "labels" in inputs else {**inputs, "labels": batch.labels}
    found = {
        name: link.of_peer(inputs, name) if source.trains else link.of_source(given, name, source.model)
        for name, source in engine.sources.items()
        if name in link.sources and (source.trains or engine.active(at))
    }
    ids, teacher = inputs.get(SAMPLE_IDS), engine.teacher
    if ids is not None and isinstance(teacher, Cached) and teacher.name in found:
        batch.samples = Samples(ids, {k: v for k, v in found[teacher.name].items() if isinstance(v, Tensor)})
    return found


def _with_losses(output: Any, losses: Mapping[str, Tensor]) -> Any:
    """The output with the terms' losses in it, so that DDP sees every parameter of the terms in what the pass returns.

    A model that was given no labels returns no loss, and the Trainer asks for one: it gets 0.
    """
    if is_dataclass(output):
        found = {key: value for key, value in losses.items() if key.endswith(".loss")}
        own: Any = output if "loss" in output else {**output, "loss": no_loss(output)}  # type: ignore[operator, dict-item]
        output = _output_class(type(output))(**own, distill=found)  # type: ignore[arg-type]
    return output


@cache
def _output_class(plain: Any) -> Any:
    """The model's own class of outputs with a field for the terms' losses, and one for its own where it has none."""
    more = [(name, Any, None) for name in ("distill", "loss") if name not in plain.__dataclass_fields__]
    return make_dataclass(plain.__name__, more, bases=(plain,), namespace={"__module__": plain.__module__})


@cache
def _graft_class(student: Any) -> Any:
    @wraps(student.forward)
    def forward(self: Grafted, *args: Any, **inputs: Any) -> Any:
        return self.distilling_forward(**by_name(student.forward, args, inputs))

    names = {"forward": forward, "__module__": student.__module__, "__qualname__": student.__qualname__}
    return type(student.__name__, (Grafted, student), names)


def graft(
    student: Any,
    teacher: Any,
    terms: list[Any],
    *,
    teachers: Mapping[str, Any] | None = None,
    dry_run: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
    chunk: int | None = None,
    cache: TeacherCache | None = None,
    init_from: Any = None,
) -> Any:
    """Grafts the engine on a student, in place.

    Args:
        student: a model of Hugging Face; under a wrapper of PEFT the engine goes on the base model.
        teacher: a model, a :class:`~kdgraft.Source`, or the folder that ``save_pretrained`` wrote; may be left out without
            terms, and where the cache has what it says of every sample.
        terms: names, dicts or instances.
        teachers: several sources by name, instead of ``teacher``.
        dry_run: one small batch for all models; made from their configs by default.
        facts: what is known of the vocabularies: ``vocabulary`` (``"same"``, ``"different"``), ``vocabulary_checked`` (entries of
            the tokenizer).
        chunk: tokens at a time for losses on a causal model's logits; ``None``: all at once.
        cache: of the teacher's outputs, for batches with sample ids.
        init_from: layers of the teacher that the student starts from; see :func:`~kdgraft_nlp.init_from_teacher`.

    Returns:
        The student that was given.

    Raises:
        DistillError: a wrong teacher; :class:`~kdgraft.WiringError`: a term that cannot work on the two.
    """
    given, student = student, base_of(student)
    _check_student(student)
    if chunk is not None and not terms:
        raise DistillError("chunked=True belongs to a distillation; give it terms or a recipe")
    if cache is not None and terms and task_of(student) in ("seq2seq", "ctc"):
        sort = "a model with a decoder" if task_of(student) == "seq2seq" else "a model of frames"
        raise WiringError(
            f"the cache keeps no outputs of {sort} ({type(student).__name__}): it keeps those of the tokens that a model is given, not "
            "of a decoder's or of frames; leave the cache out"
        )
    with isolated_rng():
        sources = build_sources(teacher, teachers, student, cache) if terms else {}
    if init_from is not None:
        init_from_teacher(student, _one_model(sources), init_from)
    link = Link(task_of(student), accepted(student))
    kind: Any = student.__class__
    student.__class__ = _graft_class(kind)
    tie(student, link)
    student.add_module("distiller", None)
    engine = None
    if sources:
        try:
            with isolated_rng():
                engine = _wired(student, sources, terms, dry_run, facts or {}, chunk)
                if cache is not None:
                    for term in engine.all_terms:
                        cache.check(term.teacher_taps, term.name)
                compare_classes(student, _of_classes(engine))
        except BaseException:
            student.__class__ = kind
            _take_off(student, _graft_class(kind))
            raise
        hide_from_state_dict(engine)
        engine.to(next(student.parameters()).device)
    student.add_module("distiller", engine)
    return given


def _one_model(sources: Mapping[str, Source]) -> Any:
    """The model of the one frozen teacher; raises a :class:`DistillError` where there is another source, or none."""
    (source,) = sources.values() if len(sources) == 1 else (None,)
    if not isinstance(source, Teacher):
        raise DistillError(
            "init_from takes layers of one frozen teacher: give teacher=… and terms; of another model "
            "init_from_teacher(student, model, layers=…) takes them beforehand"
        )
    return source.model


def _of_classes(engine: Engine) -> dict[str, Source]:
    """The sources whose classes some term compares with the student's."""
    heard = {name for term in engine.all_terms if term.compares_classes for name in engine.members(term.source)}
    return {name: source for name, source in engine.sources.items() if name in heard}


def _wired(
    student: Any,
    sources: Mapping[str, Source],
    terms: list[Any],
    dry_run: Mapping[str, Any] | None,
    facts: Mapping[str, Any],
    chunk: int | None,
) -> Engine:
    """An engine wired by a dry run of all models."""
    link, device = link_of(student), next(student.parameters()).device
    engine = Engine(sources, terms, TERMS, AttentionRecorder, HFReader if chunk is None else ChunkedReader)
    ours = dict(dry_run) if dry_run is not None else example(student)
    theirs: dict[str, Mapping[str, Any]] = {}
    for name, source in engine.sources.items():
        if isinstance(source, Itself):
            if source.momentum is not None:  # the average takes what the student does
                link.sources[name] = link.takes
                theirs[name] = link.of_source(ours, name, student)
            continue
        if not isinstance(getattr(source, "model", None), nn.Module):
            continue
        link.know(name, source.model)
        if not isinstance(source, Teacher) or not source.placed:
            source.model.to(device)
        made = ours if dry_run is not None else example(source.model, device)
        theirs[name] = link.of_source(made, name, source.model)
        if isinstance(source, Cached):
            source.example = theirs[name]
    teachers = [source.model for source in engine.sources.values() if isinstance(source, Teacher)]
    link.frames = frame_mask(student), frame_mask(teachers[0] if teachers else student)
    own = _without_labels(student, link.of_student(ours))
    if chunk is not None:
        link.transforms, link.chunk = _chunk(student, engine, own, theirs), chunk
    samples = tokens_of(link.read(ours)).size

    def run(source: Source) -> Any:
        return source.model(**theirs[source.name])

    engine.wire(
        student,
        lambda: student.plain_forward(**own),
        run,
        frozenset({"labels", "tokens"} if reads_text_alone(student) else {"labels"}),
        {**facts, "samples": samples},
    )
    models = {STUDENT: student, **dict(engine.peers.items())}
    for term in engine.all_terms:
        refuse_dropped_layers(models[term.listener], [term])
    return engine


def undistill(model: Any) -> Any:
    """Takes the distiller off a student, in place: a plain model again, for another trainer or for ``torch.save``.

    Args:
        model: the model of a trainer that distils. The trainer still evaluates and saves it, and trains it plainly.

    Returns:
        The model.

    Raises:
        DistillError: nothing is grafted on it.

    Example::

        trainer.train()
        student = undistill(trainer.model)
    """
    student = base_of(model)
    if not isinstance(student, Grafted):
        raise DistillError(f"this {type(model).__name__} is not being distilled")
    graft: Any = type(student)
    student.__class__ = _student_class(student)
    _take_off(student, graft)
    return model


def _student_class(model: Grafted) -> Any:
    """The class that a student had before the graft."""
    return type(model).__bases__[1]


def _take_off(student: Any, graft: Any) -> None:
    """Removes what the graft put on an instance whose class is plain again, and what accelerate made of the graft's forward."""
    del student.distiller
    untie(student)
    _unwrap_forward(student, graft)


def _unwrap_forward(student: Any, kind: Any) -> None:
    """Takes off the mixed precision that accelerate left around a class's own forward; the next trainer puts it on anew."""
    before = vars(student).get("_original_forward")
    if getattr(before, "__func__", None) is kind.forward:
        del student.forward, student._original_forward
        vars(student).pop("_is_accelerate_prepared", None)


def _check_student(student: Any) -> None:
    """Refuses what cannot be grafted on; takes off what accelerate left."""
    if isinstance(student, Grafted):
        raise DistillError(
            "this student is being distilled already; build a new one, or undistill(model) for another distiller"
        )
    if not isinstance(student, nn.Module) or not hasattr(student, "config"):
        raise DistillError(f"the student must be a Hugging Face model, got {type(student).__name__}")
    if isinstance(student, nn.Sequential):
        raise DistillError(
            f"a {type(student).__name__} runs and saves whatever is in it one by one, and the distiller would be; distil the "
            "transformer in it by itself"
        )
    _unwrap_forward(student, type(student))
    if "forward" in vars(student):
        raise DistillError(
            f"something has replaced the forward of this {type(student).__name__}; distil first, wrap or patch it afterwards"
        )


def _chunk(
    student: Any, engine: Engine, ours: Mapping[str, Any], theirs: Mapping[str, Mapping[str, Any]]
) -> tuple[LogitTransform, LogitTransform]:
    """Check that terms on logits can be computed in chunks; return what both models make of their output layers' logits."""
    if task_of(student) != "causal":
        raise WiringError(f"chunked=True is for causal language models, and {type(student).__name__} is none")
    teacher = engine.teacher
    if len(engine.sources) > 1 or not isinstance(teacher, Teacher):
        raise WiringError("chunked=True computes the losses of one frozen teacher; leave it out with other sources")
    heads = [head_of(model).weight.device for model in (student, teacher.model)]
    if heads[0] != heads[1]:
        raise WiringError(
            f"chunked=True needs the teacher's output layer where the student's is ({heads[0]}), and its weights are on "
            f"{'no device' if heads[1].type == 'meta' else heads[1]}; change the device_map, or leave chunked out"
        )
    transforms = check_heads(student, ours), check_heads(teacher.model, theirs[teacher.name])
    for term in engine.all_terms:
        if isinstance(term, ScoreTerm) and not term.in_chunks:
            raise WiringError(f"{term.name} cannot be computed in chunks of tokens; leave chunked out")
    return transforms


def _without_labels(student: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A batch as the dry run takes it: no labels, of which a decoder's inputs are made."""
    found = {name: value for name, value in inputs.items() if name not in LABELS}
    if has_decoder(student) and "decoder_input_ids" not in found and "labels" in inputs:
        found["decoder_input_ids"] = decoder_inputs(student, inputs["labels"])
    return found
