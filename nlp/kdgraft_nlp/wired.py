"""The wiring of a student to its sources: an engine, and a dry run of all models on a small batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from kdgraft.balance import AutoWeight
from kdgraft.engine import Engine
from kdgraft.errors import WiringError
from kdgraft.sources import STUDENT, Cached, Ensemble, Itself, Source, Specialists, Teacher
from kdgraft.terms import ScoreTerm

from .absent import Absent
from .attention import AttentionRecorder
from .chunked import LogitTransform, head_of
from .class_teachers import check_class_teachers
from .heads import check_heads
from .layers import refuse_dropped_layers
from .link import LABELS, link_of
from .reader import ChunkedReader, HFReader
from .registry import TERMS
from .tasks import decoder_inputs, example, frame_mask, has_decoder, reads_text_alone, task_of
from .tokens import tokens_of

CHUNK = 256
"""The tokens of a chunk, for losses on logits that are computed from states."""


def wired(
    student: Any,
    sources: Mapping[str, Source],
    terms: list[Any],
    dry_run: Mapping[str, Any] | None,
    facts: Mapping[str, Any],
    chunk: int | None,
) -> Engine:
    """Build an engine and wire it by a dry run of all models."""
    link = link_of(student)
    if link.fused and chunk is None:
        chunk = CHUNK
    engine = Engine(sources, terms, TERMS, AttentionRecorder, HFReader if chunk is None else ChunkedReader)
    check_class_teachers(engine)
    if link.fused and not any(isinstance(term, ScoreTerm) for term in engine.all_terms):
        chunk = None  # terms on layers alone
    ours = dict(dry_run) if dry_run is not None else example(student)
    theirs = _example_inputs(student, engine, ours, dry_run is not None)
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
        _fields(student),
        {**facts, "samples": samples},
    )
    if isinstance(engine.teacher, Absent):
        engine.teacher.check_terms(engine.all_terms)
    models = {STUDENT: student, **dict(engine.peers.items())}
    for term in engine.all_terms:
        refuse_dropped_layers(models[term.listener], [term])
    return engine


def _fields(student: nn.Module) -> frozenset[str]:
    """Return the fields of a batch that models of this kind come with."""
    more = {"tokens"} if reads_text_alone(student) else {"boxes"} if task_of(student) == "detection" else set()
    return frozenset({"labels", *more})


def _example_inputs(student: Any, engine: Engine, ours: Mapping[str, Any], given: bool) -> dict[str, Mapping[str, Any]]:
    """Return the inputs of each source's model in the dry run, and put the models on the student's device.

    Args:
        student, engine: the student and its sources.
        ours: the student's inputs.
        given: these are for the sources too; otherwise each gets inputs that are made from its own config.
    """
    link, device = link_of(student), next(student.parameters()).device
    theirs: dict[str, Mapping[str, Any]] = {}
    for name, source in engine.sources.items():
        if isinstance(source, Itself):
            if source.momentum is not None:  # the average takes the same inputs as the student
                link.sources[name] = link.takes
                theirs[name] = link.of_source(ours, name, student)
            continue
        if not isinstance(getattr(source, "model", None), nn.Module):
            continue
        link.know(name, source.model)
        if not isinstance(source, Teacher) or not source.placed:
            source.model.to(device)
        theirs[name] = link.of_source(ours if given else example(source.model, device), name, source.model)
        if isinstance(source, Cached):
            source.example = theirs[name]
    return theirs


def _chunk(
    student: Any, engine: Engine, ours: Mapping[str, Any], theirs: Mapping[str, Mapping[str, Any]]
) -> dict[str, LogitTransform]:
    """Check that terms on logits can be computed in chunks; return the transforms of all models' logits by name."""
    # A trainer that computes its loss without logits leaves no choice.
    what, instead = ("chunked=True", "leave out chunked")
    if link_of(student).fused:
        what, instead = ("a trainer without logits, such as SFTTrainer,", "use a Trainer or a DistillTrainer")
    if task_of(student) != "causal":
        raise WiringError(
            f"chunked=True is for causal language models, and {type(student).__name__} is not one; leave it out"
        )
    teachers = _teachers_in_chunks(student, engine, what, instead)
    transforms = {STUDENT: check_heads(student, ours)}
    transforms |= {one.name: check_heads(one.model, theirs[one.name]) for one in teachers}
    for term in engine.all_terms:
        if isinstance(term, ScoreTerm) and not term.in_chunks:
            raise WiringError(f"{term.name} needs whole logits, which {what} does not compute; {instead}")
        if isinstance(term.balance, AutoWeight):
            raise WiringError(f"{term.name}: weight='auto' needs whole losses; set weight to a number, or {instead}")
    return transforms


def _teachers_in_chunks(student: Any, engine: Engine, what: str, instead: str) -> list[Teacher]:
    """Return the teachers whose output layers compute logits in chunks; check that they can, and that means over them exist.

    Args:
        student, engine: the student and its sources.
        what, instead: what asks for chunks and the way out, for messages.
    """
    for name, source in engine.sources.items():
        if not isinstance(source, (Teacher, Ensemble)) or isinstance(source, Specialists):
            raise WiringError(
                f"{what} computes the losses on logits of frozen teachers, and {name!r} is a {type(source).__name__}; {instead}, or take "
                "terms on layers with other sources"
            )
    teachers = [one for one in engine.sources.values() if isinstance(one, Teacher) and not isinstance(one, Absent)]
    sizes: dict[str, int] = {}
    own = head_of(student).weight.device
    for one in teachers:
        weight = head_of(one.model).weight
        sizes[one.name] = len(weight)
        if weight.device != own:
            raise WiringError(
                f"{what} needs the teacher's output layer on the student's device ({own}), and it is on "
                f"{'no device' if weight.device.type == 'meta' else weight.device}; change the device_map, or {instead}"
            )
    for source in engine.sources.values():
        if isinstance(source, Ensemble) and len({sizes[name] for name in source.members}) > 1:
            told = " and ".join(f"{sizes[name]} ({name})" for name in source.members)
            raise WiringError(
                f"the vocabularies of {source.name!r} have {told} entries; the members of an Ensemble must predict alike"
            )
    return teachers


def _without_labels(student: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch for the dry run: a decoder's inputs are made from the labels, which are removed."""
    found = {name: value for name, value in inputs.items() if name not in LABELS}
    if has_decoder(student) and "decoder_input_ids" not in found and "labels" in inputs:
        found["decoder_input_ids"] = decoder_inputs(student, inputs["labels"])
    return found
