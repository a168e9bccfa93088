"""The link of a student to its trainer and sources: the current step, and the inputs of each model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from accelerate.utils import send_to_device
from torch import Tensor, nn

from kdgraft.batch import Batch
from kdgraft.errors import DistillError
from kdgraft.schedules import Step
from kdgraft.sources.teacher import is_placed
from kdgraft.step import StepInProgress

from .adapters import base_of
from .chunked import LogitTransform
from .packing import marks_taken_by
from .tasks import accepted, decoder_inputs, has_decoder
from .tokens import OUR_KEYS, TEACHER_INPUTS, FrameMask, read_batch

LABELS = frozenset(
    {
        *("labels", "start_positions", "end_positions", "next_sentence_label", "num_items_in_batch"),
        *("mask_labels", "class_labels"),  # of universal segmentation
    }
)


@dataclass
class StudentStep:
    """A training step of the student, in which it may run several times, and its results.

    Attributes:
        at: the step and the epoch.
        inputs: the collator's batch in a step of a trainer; passes on other inputs are read by themselves.
        totals, parts: see :meth:`kdgraft.engine.Engine.step`, for an accumulated batch.
        host_factor: the Trainer's factor of the model's own loss, relative to that of the terms' losses.
        passes: the number of passes of the student so far.
        losses: the terms' losses and figures; losses of several passes are summed.
        peers: the peers' own losses, summed likewise.
        host_share: the share that the terms leave to the host's own loss.
        without_loss: true where the model returned no loss, because the batch has no labels.
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
        """Add the results of a pass."""
        self.passes += 1
        for key, value in {**losses, **step.figures}.items():
            adds_up = key in self.losses and key.endswith((".loss", ".raw"))
            self.losses[key] = self.losses[key] + value if adds_up else value
        for name, value in peers.items():
            self.peers[name] = self.peers[name] + value if name in self.peers else value
        self.host_share = step.host_share()


class Link:
    """The task, sources and trainer of a grafted student.

    Attributes:
        task: see :func:`~kdgraft_nlp.tasks.task_of`.
        takes: the names of the arguments of the student's forward.
        sources: the same for the forward of each source.
        frames: the frame masks of student and teacher; see :func:`~kdgraft_nlp.tasks.frame_mask`.
        ignored: the label of pixels that the student's own loss ignores, for segmentors.
        hosted: true where a trainer distils; passes outside its steps, such as another trainer's, are plain ones.
        asked: the trainer's current step.
        totals: the terms' denominators in steps outside a trainer, where a batch comes in parts.
        last: the latest step.
        chunk: the number of tokens in a chunk, for losses in chunks.
        replaced: the forward that stood on the instance in place of its class's own, such as that of TRL's trainers.
        fused: true where the host computes its own loss without logits, in its replaced forward.
        transforms: the transforms of the student's and of each teacher's logits by name, for losses in chunks.
        host_weight: the factor of the host's own loss.
    """

    def __init__(self, task: str, takes: set[str]) -> None:
        self.task, self.takes = task, takes
        self.sources: dict[str, set[str]] = {}
        self.frames: tuple[FrameMask, FrameMask] = (None, None)
        self.ignored = 255
        self.hosted = False
        self.asked: StudentStep | None = None
        self.totals: dict[str, Tensor] = {}
        self.last = StudentStep(Step())
        self.steps = 0
        self.chunk: int | None = None
        self.replaced: Callable[..., Any] | None = None
        self.fused = False
        self.transforms: dict[str, LogitTransform] = {}
        self.host_weight = 1.0

    def know(self, name: str, model: nn.Module) -> None:
        """Record the arguments that a source's model takes."""
        self.sources[name] = accepted(model)

    @contextmanager
    def asking(self, step: StudentStep) -> Iterator[StudentStep]:
        """Assign the passes in the body to one step of a trainer."""
        self.asked = step
        try:
            yield step
        finally:
            self.asked = None

    def next_step(self) -> StudentStep:
        """Return the step of the next pass: the trainer's current step, or else a new one."""
        self.last = self.asked if self.asked is not None else StudentStep(Step(self.steps), totals=self.totals)
        self.steps += self.asked is None or self.asked.passes == 0
        return self.last

    def of_pass(self, inputs: Mapping[str, Any], step: StudentStep) -> tuple[Batch, Mapping[str, Tensor]]:
        """Return the batch of one pass of the student, and the denominators that apply to it.

        A loss may run the student on several texts in turn. The denominators were counted on the Trainer's batch and apply to a
        pass on it; other passes count their own. The Trainer's batch has the labels, which many losses remove from the inputs.
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
        """Return a batch as terms read it."""
        return read_batch(inputs, self.task, self.frames, self.ignored)

    def of_student(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the inputs without those that only sources take."""
        foreign = OUR_KEYS | (set().union(*self.sources.values()) - self.takes)
        return {name: value for name, value in inputs.items() if name not in foreign}

    def of_peer(self, inputs: Mapping[str, Any], name: str) -> dict[str, Any]:
        """Return the inputs of a peer, including labels."""
        known = self.sources[name] | (LABELS if "kwargs" in self.sources[name] else set())
        return {key: value for key, value in inputs.items() if key in known}

    def of_source(self, inputs: Mapping[str, Any], name: str, model: Any) -> Mapping[str, Any]:
        """Return the inputs of a source that does not train, without labels, so that it computes no loss."""
        own = inputs.get(TEACHER_INPUTS, {})
        found = {**inputs, **own}
        other = own.get("input_ids") is not None
        if other:  # another tokenizer: none of the inputs per student token
            found = {**{k: v for k, v in inputs.items() if not _per_token(k)}, **own}
        if has_decoder(model) and found.get("decoder_input_ids") is None:
            labels = own.get("labels") if other else found.get("labels")
            if other and labels is None:
                raise DistillError(
                    "the teacher's decoder needs its own tokens; add a column teacher_decoder_input_ids or teacher_labels to the data set"
                )
            if labels is not None:
                found["decoder_input_ids"] = decoder_inputs(model, labels)
        keep = (self.sources[name] | marks_taken_by(model)) - LABELS
        found = {key: value for key, value in found.items() if key in keep}
        if "use_cache" in keep:
            found["use_cache"] = False
        return moved(model, found)


def moved(model: Any, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Move inputs to a model that stays where it is; where it spans several devices, accelerate's hooks move them."""
    if not is_placed(model) or hasattr(model, "_hf_hook"):
        return inputs
    device = next(model.parameters()).device
    return inputs if device.type == "meta" else send_to_device(inputs, device)


def _per_token(name: str) -> bool:
    names = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "special_tokens_mask")
    return name in names or name.startswith("decoder_")


def tie(model: Any, link: Link) -> None:
    """Attach a link to a student, as an attribute that no ``state_dict`` contains."""
    model.distill_link = link


def untie(model: Any) -> None:
    """Remove the link of a student."""
    del model.distill_link


def is_tied(model: Any) -> bool:
    """Return whether a model, or the one under its wrapper, has a link, and so is a grafted student."""
    return hasattr(model, "distill_link") or hasattr(base_of(model), "distill_link")


def link_of(model: Any) -> Link:
    """Return the link of a grafted student, which may be under a wrapper."""
    holder = model if hasattr(model, "distill_link") else base_of(model)
    found: Link = holder.distill_link
    return found
