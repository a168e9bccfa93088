"""The graft on a Hugging Face student: a subclass of its own class, with the engine as a child module.

The model remains an instance of its class under its own name, so the Trainer wraps, clips, evaluates, saves and reloads the plain
student. In training its ``forward`` also runs the sources and the terms, inside the host's wrappers (DDP, autocast).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from kdgraft.sources import Cached, Ensemble, Source, Specialists, Teacher
from kdgraft.step import scaled

from .absent import Absent
from .adapters import AdaptersOff, base_of
from .cache import TeacherCache
from .class_teachers import ClassTeacher
from .initialisation import init_from_teacher
from .link import Link, is_tied, link_of, tie, untie
from .passes import no_loss, run_student
from .predictions import ignored_index
from .sources import build_sources, compare_classes
from .tasks import (
    accepted,
    by_name,
    task_of,
)
from .tokens import SAMPLE_IDS, TEACHER_INPUTS
from .wired import wired
from .zero import runs_in_parts, whole_while

FUSED = "fused_lm_head"
"""The argument by which TRL's trainers ask a replaced forward for the loss without logits."""


class Grafted:
    """The mixin before the student's own class."""

    distiller: Engine | None

    def __reduce_ex__(self, _: Any) -> Any:
        """Copy and pickle the plain student: a file must not contain a teacher, and a copy must not change in training."""
        plain = object.__new__(_student_class(self))
        plain.__dict__.update(vars(self))
        own_children(plain)
        _take_off(plain, type(self))
        return plain.__reduce_ex__(1)  # later protocols require this object's own class

    def plain_forward(self, *args: Any, **inputs: Any) -> Any:
        """Run the student's own forward: its class's, or the one that stood in its place on the instance."""
        replaced = link_of(self).replaced if is_tied(self) else None
        return super().forward(*args, **inputs) if replaced is None else replaced(*args, **inputs)  # type: ignore[misc]

    def distilling_forward(self, **inputs: Any) -> Any:
        """Run the student, in training with its sources, and add the terms' losses to its output as ``distill``."""
        link, engine = link_of(self), self.distiller
        own = link.of_student(inputs)
        asked = link.asked is not None or not link.hosted
        if engine is None or not asked or not self.training or not torch.is_grad_enabled():  # type: ignore[attr-defined]
            return self.plain_forward(**own)
        current, device = link.next_step(), next(self.parameters()).device  # type: ignore[attr-defined]
        batch, totals = link.of_pass(inputs, current)
        # Before any model is recorded, which hides the names of its forward's arguments.
        theirs = _inputs_of_sources(link, engine, inputs, batch, current.at)

        def run(source: Source) -> Any:
            return source.model(**theirs[source.name])

        with engine.step(self, batch, current.at, run, device, totals=totals, parts=current.parts) as step:  # type: ignore[arg-type]
            ran = run_student(self, own, batch)
        losses = ran.finish(step)
        peers = {
            name: scaled(found["loss"] if "loss" in found else no_loss(found), step.host_share(listener=name))
            for name, found in step.outputs.items()
        }
        current.keep(step, losses, peers)
        current.without_loss = isinstance(ran.output, Mapping) and "loss" not in ran.output
        return _with_losses(ran.output, {**losses, **{f"peer.{name}.loss": value for name, value in peers.items()}})


def _inputs_of_sources(
    link: Link, engine: Engine, inputs: Mapping[str, Any], batch: Batch, at: Step
) -> dict[str, Mapping[str, Any]]:
    """Return the inputs of each source's model in a step, by its name, and give the batch the ids of the samples.

    Raises:
        DistillError: the batch has the teacher's own tokens, and another source reads the student's.
    """
    others = [name for name, source in engine.sources.items() if not isinstance(source, (Teacher, Ensemble))]
    if others and inputs.get(TEACHER_INPUTS) is not None:
        raise DistillError(
            f"the batch has the teacher's own tokens or columns, and {others[0]!r} reads the student's; remove these or this source"
        )
    given = inputs if "labels" in inputs else {**inputs, "labels": batch.labels}
    found = {
        name: link.of_peer(inputs, name) if source.trains else link.of_source(given, name, source.model)
        for name, source in engine.sources.items()
        if name in link.sources and (source.trains or engine.active(at))
    }
    ids, teacher = inputs.get(SAMPLE_IDS), engine.teacher
    if ids is None and isinstance(teacher, Absent):
        ids = ()
    if ids is not None:
        stored = found.get(teacher.name, {}) if isinstance(teacher, Cached) else {}
        batch.samples = Samples(ids, {k: v for k, v in stored.items() if isinstance(v, Tensor)})
    return found


def _with_losses(output: Any, losses: Mapping[str, Tensor]) -> Any:
    """Return the output with the terms' losses, so that DDP finds every parameter of the terms in the output of the pass.

    The Trainer needs a loss in the output; a model without labels returns none, and its loss becomes 0.
    """
    if is_dataclass(output):
        found = {key: value for key, value in losses.items() if key.endswith(".loss")}
        own: Any = output if "loss" in output else {**output, "loss": no_loss(output)}  # type: ignore[operator, dict-item]
        output = _output_class(type(output))(**own, distill=found)  # type: ignore[arg-type]
    return output


@cache
def _output_class(plain: Any) -> Any:
    """Return the model's class of outputs with a field for the terms' losses, and one for its own loss where it lacks one."""
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
    """Graft the engine on a student, in place.

    Args:
        student: a model of Hugging Face; for a wrapper of PEFT the engine is grafted on the base model.
        teacher: a model, a :class:`~kdgraft.Source`, or the folder that ``save_pretrained`` wrote; optional without terms, or
            where the cache has its outputs for every sample.
        terms: names, dicts or instances.
        teachers: several sources by name, instead of ``teacher``.
        dry_run: one small batch for all models; made from their configs by default.
        facts: facts about the vocabularies: ``vocabulary`` (``"same"``, ``"different"``), ``vocabulary_checked`` (the size of the
            tokenizer).
        chunk: the number of tokens in a chunk, for losses on a causal model's logits; ``None``: no chunks.
        cache: a cache of the teacher's outputs, for batches with sample ids.
        init_from: layers of the teacher to initialise the student from; see :func:`~kdgraft_nlp.init_from_teacher`.

    Returns:
        The student that was given.

    Raises:
        DistillError: the teacher cannot be used.
        WiringError: a term cannot be wired to the two models.
    """
    given, student = student, base_of(student)
    _check_student(student)
    _check_options(student, terms, chunk, cache)
    with isolated_rng():
        sources = build_sources(teacher, teachers, student, cache) if terms else {}
    if init_from is not None:
        theirs = _one_model(sources)
        with whole_while([*student.parameters(), *theirs.parameters()], change=True):
            init_from_teacher(student, theirs, init_from)
    fused, replaced = is_fused(student), vars(student).pop("forward", None)
    link = Link(task_of(student), accepted(student))
    link.fused, link.replaced, link.ignored = fused, replaced, ignored_index(student)
    kind: Any = student.__class__
    student.__class__ = _graft_class(kind)
    tie(student, link)
    student.add_module("distiller", None)
    engine = None
    if sources:
        try:
            models = [student, *(source.model for source in sources.values() if isinstance(source, Teacher))]
            with isolated_rng(), runs_in_parts(models), _telling_of_replaced(link, kind.__name__):
                engine = wired(student, sources, terms, dry_run, facts or {}, chunk)
                if cache is not None:
                    for term in engine.all_terms:
                        cache.check(term.teacher_taps, term.name)
                compare_classes(student, _of_classes(engine))
        except BaseException:
            undistill(student)
            raise
        hide_from_state_dict(engine)
        engine.to(next(student.parameters()).device)
    student.add_module("distiller", engine)
    return given


@contextmanager
def _telling_of_replaced(link: Link, name: str) -> Iterator[None]:
    """Say in an error of the wiring that a forward of the user's ran, which may be why."""
    try:
        yield
    except WiringError as error:
        if link.replaced is None or link.fused:
            raise
        raise WiringError(
            f"{error}; the forward of this {name} was replaced on the instance, and ran as the student's own"
        ) from None


def _one_model(sources: Mapping[str, Source]) -> Any:
    """Return the model of the only frozen teacher; raise a :class:`DistillError` where sources are none or others."""
    (source,) = sources.values() if len(sources) == 1 else (None,)
    if not isinstance(source, Teacher):
        raise DistillError(
            "init_from needs one frozen teacher, given with terms; for another model call init_from_teacher(student, model, …) before"
        )
    if isinstance(source, ClassTeacher):
        raise DistillError(f"init_from: {type(source).__name__} has no layers to start from; leave it out")
    if isinstance(source, Absent):
        raise DistillError(
            "init_from copies weights, and those of a stored or served teacher are not here; leave it out"
        )
    if isinstance(source, AdaptersOff):
        raise DistillError("init_from: the student has the layers of its own base already; leave it out")
    return source.model


def _of_classes(engine: Engine) -> dict[str, Source]:
    """Return the sources whose classes a term compares with the student's."""
    heard = {name for term in engine.all_terms if term.compares_classes for name in engine.members(term.source)}
    heard -= {name for one in engine.sources.values() if isinstance(one, Specialists) for name in one.classes}
    return {name: source for name, source in engine.sources.items() if name in heard}


def undistill(model: Any) -> Any:
    """Remove the distiller from a student, in place, which makes it a plain model for another trainer or ``torch.save``.

    Args:
        model: the model of a trainer that distils. The trainer can still evaluate, save and train it, without distillation.

    Returns:
        The model.

    Raises:
        DistillError: the model is not being distilled.

    Example::

        trainer.train()
        student = undistill(trainer.model)
    """
    student = base_of(model)
    if not isinstance(student, Grafted):
        raise DistillError(f"this {type(model).__name__} is not being distilled")
    graft: Any = type(student)
    replaced = link_of(student).replaced
    student.__class__ = _student_class(student)
    _take_off(student, graft)
    if replaced is not None:
        vars(student)["forward"] = replaced
    return model


def _student_class(model: Grafted) -> Any:
    """Return the class that a student had before the graft."""
    return type(model).__bases__[1]


def _take_off(student: Any, graft: Any) -> None:
    """Remove the graft's attributes from an instance whose class is plain again, and accelerate's wrapper of its forward."""
    del student.distiller
    untie(student)
    _unwrap_forward(student, graft)


def _unwrap_forward(student: Any, kind: Any) -> None:
    """Remove accelerate's mixed precision around a forward, its class's or the instance's; the next trainer adds it again."""
    before = vars(student).pop("_original_forward", None)
    if before is None:
        return
    del student.forward
    if getattr(before, "__func__", None) is not kind.forward:
        student.forward = before
    vars(student).pop("_is_accelerate_prepared", None)


def is_fused(model: Any) -> bool:
    """Return whether a model's forward was replaced by one that computes the loss without logits, as TRL's trainers do."""
    forward = vars(model).get("forward")
    if forward is None:
        return False
    return FUSED in inspect.signature(getattr(forward, "__func__", forward), follow_wrapped=False).parameters


def refuse_fused_liger(arguments: Any) -> None:
    """Refuse the kernel of Liger that replaces the forward of a model, when training starts, by one without logits.

    Raises:
        DistillError: the arguments of a trainer ask for it.
    """
    if not getattr(arguments, "use_liger_kernel", False):
        return
    if (arguments.liger_kernel_config or {}).get("fused_linear_cross_entropy", True):
        raise DistillError(
            "use_liger_kernel replaces the student's forward, and the distillation with it, by one without logits; set "
            "liger_kernel_config={'fused_linear_cross_entropy': False} to keep the other kernels, and chunked=True, which holds no logits either"
        )


def _check_student(student: Any) -> None:
    """Refuse a student that cannot be grafted, and remove accelerate's wrapper of its forward."""
    if isinstance(student, Grafted):
        raise DistillError("this student is already being distilled; build a new one, or undistill(model) first")
    if not isinstance(student, nn.Module) or not hasattr(student, "config"):
        raise DistillError(f"the student must be a Hugging Face model, got {type(student).__name__}")
    if isinstance(student, nn.Sequential):
        raise DistillError(
            f"a {type(student).__name__} runs and saves all its modules in order, the distiller included; distil the transformer in it"
        )
    _unwrap_forward(student, type(student))


def _check_options(student: Any, terms: list[Any], chunk: int | None, cache: TeacherCache | None) -> None:
    if chunk is not None and not terms:
        raise DistillError("chunked=True is for distillation only; give terms or a recipe, or leave it out")
    if cache is not None and terms and task_of(student) in ("seq2seq", "ctc"):
        sort = "a model with a decoder" if task_of(student) == "seq2seq" else "a model of frames"
        raise WiringError(
            f"the cache holds outputs for input tokens only, and {type(student).__name__} is {sort}; leave out the cache"
        )
