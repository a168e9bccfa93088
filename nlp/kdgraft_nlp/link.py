"""Between a student and whoever trains it: what a pass is given, and how each source sees the batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from kdgraft.batch import Batch
from kdgraft.errors import DistillError
from kdgraft.schedules import Step
from kdgraft.step import StepInProgress

from .chunked import IDENTITY
from .packing import marks_taken_by
from .placing import inputs_for
from .tasks import accepted, decoder_inputs, has_decoder
from .tokens import SAMPLE_IDS, TEACHER_INPUTS, TOKEN_PAIRS, FrameMask, read_batch

LABELS = frozenset({"labels", "start_positions", "end_positions", "next_sentence_label", "num_items_in_batch"})


@dataclass
class StudentStep:
    """One step that a trainer asks of the student, and what came of it; the student may run several times in it.

    Attributes:
        at: where training stands.
        inputs: the batch as the collator made it, of a trainer's step; a pass on other inputs is read by itself.
        totals, parts: of an accumulated batch; see :meth:`kdgraft.engine.Engine.step`.
        host_factor: what the Trainer multiplies the model's own loss by, relative to the terms'.
        passes: how often the student ran.
        losses: the terms' losses and figures; those of several passes add up.
        peers: the peers' own losses, likewise.
        host_share: what the terms leave to the host's own loss.
        without_loss: the model returned no loss: the batch has no labels.
    """

    at: Step
    inputs: Mapping[str, Any] | None = None
    totals: Mapping[str, Tensor] = field(default_factory=dict)
    parts: int = 1
    host_factor: float = 1.0
    passes: int = 0
    losses: dict[str, Tensor] = field(default_factory=dict)
    peers: dict[str, Tensor] = field(default_factory=dict)
    host_share: float = 1.0
    without_loss: bool = False

    def keep(self, step: StepInProgress, losses: Mapping[str, Tensor], peers: Mapping[str, Tensor]) -> None:
        """Takes in what came of a pass."""
        self.passes += 1
        for key, value in {**losses, **step.figures}.items():
            adds_up = key in self.losses and key.endswith((".loss", ".raw"))
            self.losses[key] = self.losses[key] + value if adds_up else value
        for name, value in peers.items():
            self.peers[name] = self.peers[name] + value if name in self.peers else value
        self.host_share = step.host_share()


class Link:
    """What a grafted student knows of its task, of its sources and of its trainer.

    Attributes:
        task: see :func:`~kdgraft_nlp.tasks.task_of`.
        takes: the arguments of the student's forward.
        sources: the arguments of each source's.
        frames: of student and teacher; see :func:`~kdgraft_nlp.tasks.frame_mask`.
        hosted: a trainer distils: passes that it does not ask for, another trainer's for instance, are plain ones.
        asked: the step that the trainer asks for.
        totals: the terms' denominators in steps that no trainer asks for, where a batch comes in parts.
        last: the latest step.
        chunk: tokens at a time, for losses in chunks.
        transforms: what student and teacher make of their output layers' logits, for losses in chunks.
        host_weight: what the host's own loss is multiplied by.
    """

    def __init__(self, task: str, takes: set[str]) -> None:
        self.task, self.takes = task, takes
        self.sources: dict[str, set[str]] = {}
        self.frames: tuple[FrameMask, FrameMask] = (None, None)
        self.hosted = False
        self.asked: StudentStep | None = None
        self.totals: dict[str, Tensor] = {}
        self.last = StudentStep(Step())
        self.steps = 0
        self.chunk: int | None = None
        self.transforms = (IDENTITY, IDENTITY)
        self.host_weight = 1.0

    def know(self, name: str, model: nn.Module) -> None:
        """Notes what a source's model takes."""
        self.sources[name] = accepted(model)

    @contextmanager
    def asking(self, step: StudentStep) -> Iterator[StudentStep]:
        """The passes in the body belong to one step of a trainer."""
        self.asked = step
        try:
            yield step
        finally:
            self.asked = None

    def next_step(self) -> StudentStep:
        """The step that a pass belongs to: the trainer's, or one of its own."""
        self.last = self.asked if self.asked is not None else StudentStep(Step(self.steps), totals=self.totals)
        self.steps += self.asked is None or self.asked.passes == 0
        return self.last

    def of_pass(self, inputs: Mapping[str, Any], step: StudentStep) -> tuple[Batch, Mapping[str, Tensor]]:
        """The batch that one pass of the student runs on, and the denominators that hold for it.

        A loss may run the student on each of several texts. The denominators were counted on the Trainer's batch and hold for a
        pass on that; another pass divides by its own. The Trainer's batch has the labels, which many losses take out before.
        """
        if step.inputs is None:
            return self.read(inputs), step.totals
        whole = step.inputs
        shared = [
            name for name, value in inputs.items() if isinstance(value, Tensor) and name in whole and name not in LABELS
        ]
        if shared and all(whole[name] is inputs[name] for name in shared):
            return self.read(whole), step.totals
        return self.read(inputs), {}

    def read(self, inputs: Mapping[str, Any]) -> Batch:
        """What terms know of a batch."""
        return read_batch(inputs, self.task, self.frames)

    def of_student(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Without what only sources take."""
        foreign = {TEACHER_INPUTS, TOKEN_PAIRS, SAMPLE_IDS} | (set().union(*self.sources.values()) - self.takes)
        return {name: value for name, value in inputs.items() if name not in foreign}

    def of_peer(self, inputs: Mapping[str, Any], name: str) -> dict[str, Any]:
        """What a peer takes of the batch, labels too."""
        known = self.sources[name] | (LABELS if "kwargs" in self.sources[name] else set())
        return {key: value for key, value in inputs.items() if key in known}

    def of_source(self, inputs: Mapping[str, Any], name: str, model: Any) -> Mapping[str, Any]:
        """What a source that does not train takes of the batch; no labels, so that it computes no loss."""
        own = inputs.get(TEACHER_INPUTS, {})
        found = {**inputs, **own}
        other = own.get("input_ids") is not None
        if other:  # another tokenizer: nothing of the student's tokens
            found = {**{k: v for k, v in inputs.items() if not _per_token(k)}, **own}
        if has_decoder(model) and found.get("decoder_input_ids") is None:
            labels = own.get("labels") if other else found.get("labels")
            if other and labels is None:
                raise DistillError(
                    "a teacher with a decoder and a tokenizer of its own needs its own target tokens; give the data set a column "
                    "teacher_decoder_input_ids or teacher_labels"
                )
            if labels is not None:
                found["decoder_input_ids"] = decoder_inputs(model, labels)
        keep = (self.sources[name] | marks_taken_by(model)) - LABELS
        found = {key: value for key, value in found.items() if key in keep}
        if "use_cache" in keep:
            found["use_cache"] = False
        return inputs_for(model, found)


def _per_token(name: str) -> bool:
    names = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "special_tokens_mask")
    return name in names or name.startswith("decoder_")


def tie(model: Any, link: Link) -> None:
    """Gives a student its link: an attribute that no ``state_dict`` has."""
    model.distill_link = link


def untie(model: Any) -> None:
    """Takes a student's link away."""
    del model.distill_link


def is_tied(model: Any) -> bool:
    """Whether a model has a link: is a grafted student."""
    return hasattr(model, "distill_link")


def link_of(model: Any) -> Link:
    """The link of a grafted student."""
    found: Link = model.distill_link
    return found
