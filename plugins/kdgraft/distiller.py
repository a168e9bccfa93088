"""The distiller: the one module that owns the terms, their trainable parts and the teacher.

One step, the same in every host: the teacher's forward on the same view of the batch; the student's own forward and loss,
recorded; each term: tap → adapter → region → loss × weight(step).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import sum_over_ranks, world_size
from .errors import DistillError, WiringError
from .isolation import eval_mode, isolated_rng, own_random_stream
from .losses.reduction import Ratio, divide
from .regions import Batch
from .registry import TERMS, Registry
from .schedules import Step
from .taps import NeverFired, Recorder, Recording, Tap
from .teacher import Teacher
from .terms import Term, Wiring, WiringRow, build_terms

logger = logging.getLogger("kdgraft")

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True)
class Replay:
    """A part of the teacher that runs on what the *student* drew (its proposals): after the student, on the same calls.

    Attributes:
        path: the module; the teacher's taps in it are recorded in the replay, not in the teacher's own pass.
        student_taps: what the replay needs of the student's pass.
        teacher_taps: what it needs of the teacher's own pass.
        run: ``(teacher's model, student's recording, teacher's recording, batch)``; calls the part.
    """

    path: str
    student_taps: Sequence[Tap]
    teacher_taps: Sequence[Tap]
    run: Callable[[nn.Module, Recording, Recording, Batch], None]


class HostDistiller(nn.Module):
    """A distiller beside a student that a host framework owns; :class:`Distiller` is the one for plain PyTorch.

    Args:
        teacher: the frozen teacher.
        terms: names, dicts or :class:`Term` instances.
        registry: where names are looked up.

    Call :meth:`wire` once, then in each step :meth:`record_teacher`, :meth:`record_student` and :meth:`losses`.
    """

    recorder: type[Recorder] = Recorder
    """What records the models; a host with taps of its own has a recorder of its own."""

    def __init__(self, teacher: Teacher, terms: Sequence[Any], registry: Registry = TERMS) -> None:
        super().__init__()
        self.teacher = teacher
        with isolated_rng():
            built = build_terms(terms, registry)
        self.terms = nn.ModuleDict({term.name: term for term in built})
        self.dropped = dict.fromkeys(self.terms, 0)
        self._dropped_last: set[str] = set()
        self._replay: tuple[Replay, Recorder] | None = None

    def wire(
        self,
        student: nn.Module,
        run_student: Callable[[], Any],
        run_teacher: Callable[[], Any],
        fields: frozenset[str] = frozenset(),
        facts: Mapping[str, Any] | None = None,
        replay: Replay | None = None,
    ) -> Wiring:
        """Sizes every adapter by one dry run of both models in eval mode, and checks every term.

        The student's modes, buffers and the random state are afterwards as they were.

        Args:
            run_student, run_teacher: run the two models on a small example.
            fields: which fields of :class:`Batch` the host fills.
            facts: what else the host's own terms ask for (see :class:`~kdgraft.terms.Wiring`).
            replay: the part of the teacher that runs on what the student drew, where some term taps it.

        Returns:
            What the terms were wired to, with both recordings of the dry run.

        Raises:
            WiringError: the first term that cannot be wired, with taps, shapes and what to do.
        """
        teacher = self.teacher.model
        for term in self._all_terms():
            if term.rows:
                raise WiringError(
                    f"{term.name} is wired to another student already; build a new term for each distiller"
                )
        for term in self._all_terms():
            term.prepare(student, teacher)
        with isolated_rng(), torch.no_grad(), self._naming_terms():
            recordings = self._rehearse(student, run_student, run_teacher, replay)
            self._tell_of_frozen(recordings[0])
            outside = () if replay is None else (replay.path,)
            wiring = Wiring(student, teacher, *recordings, fields, facts or {}, self.teacher, outside)
            with torch.enable_grad():
                for term in self._all_terms():
                    term.wire(wiring)
        return wiring

    def _rehearse(
        self, student: nn.Module, run_student: Callable[[], Any], run_teacher: Callable[[], Any], replay: Replay | None
    ) -> tuple[Recording, Recording]:
        """Makes the recorders and runs both models once: what was tapped of the student, and of the teacher."""
        teacher = self.teacher.model
        student_taps, teacher_taps, replayed = self._taps(replay)
        self._student_recorder = self._recorder(student, "student", student_taps)
        self._teacher_recorder = self._recorder(teacher, "teacher", teacher_taps)
        with eval_mode(student):
            for module in student.modules():
                # Overwrites what is tapped before it, but in training alone; the rehearsal has to see that.
                module.training = getattr(module, "inplace", False) and isinstance(module, DROPOUTS)
            with torch.enable_grad():
                drawn = self._student_recorder.rehearse(student, run_student)
        self.teacher.ensure_eval()
        seen = self._teacher_recorder.rehearse(teacher, run_teacher)
        if replay is None or not replayed:
            return drawn, seen
        self._replay = replay, self._recorder(teacher, "teacher", replayed)
        return drawn, seen.joined(self._replay[1].rehearse(teacher, lambda: replay.run(teacher, drawn, seen, Batch())))

    @contextmanager
    def _naming_terms(self) -> Iterator[None]:
        """Says whose tap never fired: recipes and defaults write taps that the user never saw."""
        try:
            yield
        except NeverFired as error:
            names = [term.name for term in self._all_terms() if error.tap in getattr(term, f"{error.owner}_taps")]
            raise WiringError(f"{', '.join(names)}: {error}") from None

    def _tell_of_frozen(self, student: Recording) -> None:
        """Warns of terms on what does not train: only their adapters would learn."""
        for term in self._all_terms():
            frozen = ", ".join(str(tap) for tap in term.student_taps if student.frozen(tap))
            if frozen:
                logger.warning(
                    "%s: no trained parameter of the student has a part in %s (frozen_stages?), so that it learns nothing there; "
                    "tap a later module",
                    term.name,
                    frozen,
                )

    def _taps(self, replay: Replay | None) -> tuple[list[Tap], list[Tap], list[Tap]]:
        """What to record of the student, of the teacher's own pass, and of the replay."""
        student = [tap for term in self._all_terms() for tap in term.student_taps]
        teacher = [tap for term in self._all_terms() for tap in term.teacher_taps]
        replayed = [tap for tap in teacher if replay is not None and tap.below(replay.path)]
        if replay is None or not replayed:
            return student, teacher, []
        first = [tap for tap in teacher if not tap.below(replay.path)]
        return [*student, *replay.student_taps], [*first, *replay.teacher_taps], replayed

    def _recorder(self, model: nn.Module, owner: str, taps: Sequence[Tap]) -> Recorder:
        for term in self._all_terms():
            try:
                self.recorder(model, getattr(term, f"{owner}_taps"), owner)
            except WiringError as error:
                raise WiringError(f"{term.name}: {error}") from None
        return self.recorder(model, taps, owner)

    def _all_terms(self) -> list[Term]:
        return [term for term in self.terms.values() if isinstance(term, Term)]

    @property
    def rows(self) -> list[WiringRow]:
        """The wiring, a row a tensor pair."""
        return [row for term in self._all_terms() for row in term.rows]

    def active(self, step: Step) -> list[Term]:
        """The terms whose weight is not 0 at this step."""
        return [term for term in self._all_terms() if term.weight_at(step) != 0]

    def record_teacher(self, run: Callable[[], Any], device_type: str = "cpu") -> Recording:
        """Runs the teacher without gradient, no further than the last tap, and returns what was tapped.

        What it draws at random comes from a stream of its own: the student draws what it would without a teacher.
        """
        self.teacher.ensure_eval()
        with own_random_stream(), self.teacher.context(device_type):
            return self._teacher_recorder.record_prefix(self.teacher.model, run)

    def replay_teacher(
        self, student: Recording, teacher: Recording, batch: Batch, device_type: str = "cpu"
    ) -> Recording:
        """Runs what of the teacher works on the student's proposals; both of the teacher's recordings as one."""
        if self._replay is None:
            return teacher
        replay, recorder = self._replay
        model = self.teacher.model
        with own_random_stream(), self.teacher.context(device_type):
            return teacher.joined(recorder.record_prefix(model, lambda: replay.run(model, student, teacher, batch)))

    @property
    def replays(self) -> bool:
        """Whether some term taps the part of the teacher that is replayed."""
        return self._replay is not None

    def record_student(self, student: nn.Module) -> AbstractContextManager[Recording]:
        """Context manager: records the student while the host runs it."""
        return self._student_recorder.record(student)

    def host_shares(self, step: Step) -> dict[str, float]:
        """The share that active terms leave to the host's losses, by their names; see :class:`Term`.

        A term that the last call of :meth:`losses` dropped takes none.
        """
        shares: dict[str, float] = {}
        for term in self.active(step):
            if term.name in self._dropped_last:
                continue
            # While a schedule keeps the term small, the host's loss keeps what the term does not take.
            share = 1 - (1 - term.host_share) * min(term.weight_at(step) / term.weight, 1)
            for name in term.host_losses if share != 1 else ():
                shares[name] = shares.get(name, 1.0) * share
        return shares

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Each term's denominator on this batch, of the terms that know it before the forward pass."""
        found = {term.name: term.count(batch) for term in self._all_terms()}
        return {name: count for name, count in found.items() if count is not None}

    def losses(
        self,
        student: Recording | None,
        teacher: Recording | None,
        batch: Batch,
        step: Step,
        device: torch.device | str,
        totals: Mapping[str, Tensor] | None = None,
        parts: int = 1,
    ) -> dict[str, Tensor]:
        """The weighted losses, ``{"distill.<term>.loss": scalar}``; on several processes call it on all of them.

        Each term's sum is divided by its count over *all* processes and multiplied by their number, so that the mean of
        gradients that DDP takes is the gradient of the one big batch. Terms at weight 0, and terms with a non-finite value
        (on any process: dropped by all, counted in ``dropped``, reported), give 0 and keep their parameters in the graph.

        Args:
            totals: for a batch that comes in parts (gradient accumulation), each term's denominator over all of them and over
                all processes, from :meth:`counts`; the parts' losses then add up to that of the whole batch.
            parts: how many there are; a term without a total weighs them alike.
        """
        active = self.active(step)
        ratios = {term.name: _flat(term(student, teacher, batch)) for term in active}
        dropped, denominators = self._agree(ratios)
        self._dropped_last = dropped
        totals = totals or {}
        result: dict[str, Tensor] = {}
        for term in self._all_terms():
            key = f"distill.{term.name}.loss"
            if term.name in ratios and term.name not in dropped:
                whole = totals.get(term.name)
                denominator = denominators[term.name] * parts if whole is None else whole.to(denominators[term.name])
                share = divide(ratios[term.name].numerator, denominator).sum()
                result[key] = share * (term.weight_at(step) * world_size())
            else:
                result[key] = _idle(term, device)
        for name in dropped:
            self._report(name)
        for term in active:
            result.update({f"distill.{term.name}.{key}": value.detach() for key, value in term.monitor.items()})
        result.update(
            {f"distill.{name}.dropped": torch.tensor(float(n), device=device) for name, n in self.dropped.items() if n}
        )
        return result

    def _agree(self, ratios: Mapping[str, Ratio]) -> tuple[set[str], dict[str, Tensor]]:
        """Over all ranks: which terms are not finite somewhere, and each term's denominator. One exchange for all terms."""
        if not ratios:
            return set(), {}
        parts = []
        for ratio in ratios.values():
            finite = torch.isfinite(ratio.numerator.detach()).all() & torch.isfinite(ratio.denominator).all()
            parts += [(~finite).double().reshape(1), torch.nan_to_num(ratio.denominator).double()]
        total = sum_over_ranks(torch.cat(parts))
        sizes = [size for ratio in ratios.values() for size in (1, ratio.denominator.numel())]
        pieces = total.split(sizes)
        bad = torch.cat(pieces[0::2]).tolist()
        dropped = {name for name, flag in zip(ratios, bad, strict=True) if flag}
        totals = {
            name: piece.to(ratio.denominator.dtype)
            for (name, ratio), piece in zip(ratios.items(), pieces[1::2], strict=True)
        }
        return dropped, totals

    def _report(self, name: str) -> None:
        self.dropped[name] += 1
        count = self.dropped[name]
        if count & (count - 1) == 0:  # the 1st, 2nd, 4th, 8th … time
            logger.warning(
                "distillation term %s was not finite and was dropped from this step (%d so far)", name, count
            )

    def live_state(self) -> dict[str, Any]:
        """What a resumed run needs beyond the student and the optimizer: the terms' parameters, buffers and counters."""
        return {"terms": dict(self.terms.state_dict()), "dropped": dict(self.dropped), "hidden": self._hidden()}

    def load_live_state(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`live_state`.

        Raises:
            DistillError: the state belongs to other terms.
        """
        self.check_live_state(state)
        self.terms.load_state_dict(dict(state["terms"]))
        self._load_hidden(state.get("hidden", {}))
        self.dropped.update({name: int(n) for name, n in state["dropped"].items() if name in self.dropped})

    def check_live_state(self, state: Mapping[str, Any]) -> None:
        """Raises a :class:`DistillError` unless a :meth:`live_state` is that of these terms."""
        own, given = self.terms.state_dict(), state["terms"]
        wrong = [k for k in own if k not in given or given[k].shape != own[k].shape] + [
            k for k in given if k not in own
        ]
        if wrong:
            raise DistillError(
                f"the checkpoint to resume was made with other distillation terms ({', '.join(wrong[:4])} do not fit); "
                "resume with the terms it was made with, or load it without resuming"
            )

    def _hidden(self) -> dict[str, Any]:
        return {term.name: state for term in self._all_terms() if (state := term.hidden_state())}

    def _load_hidden(self, states: Mapping[str, Any]) -> None:
        for term in self._all_terms():
            if term.name in states:
                term.load_hidden_state(states[term.name])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HostDistiller:
        super()._apply(fn, recurse)
        self.teacher.apply(fn)
        return self


@dataclass
class DistillOutput:
    """What :class:`Distiller` returns.

    Attributes:
        student: what the student returned.
        losses: the weighted distillation losses by name.
    """

    student: Any
    losses: dict[str, Tensor]

    @property
    def loss(self) -> Tensor:
        """The sum of the distillation losses, 0 where there are none; add the task's own loss to it."""
        values = [value for name, value in self.losses.items() if name.endswith(".loss")]
        return torch.stack(values).sum() if values else torch.zeros(())


class Distiller(HostDistiller):
    """Distillation in plain PyTorch: one module around student and teacher.

    Train ``distiller.parameters()`` (the student's and the adapters'), wrap the distiller in DDP or
    ``accelerator.prepare``, save ``distiller.student``. A call in eval mode runs the student alone. Iterations are counted and
    saved with ``state_dict``; for schedules by epoch set ``distiller.epoch``, also after resuming.

    Args:
        student: the model to train.
        teacher: the model to learn from; put in eval mode and frozen.
        terms: names, dicts or :class:`Term` instances.
        example: one small input for the dry run: a tensor, or a tuple or dict of arguments. Moved to nothing: it must be where
            the models are.

    Example::

        distiller = Distiller(student, teacher, terms=[SoftTargets(temperature=4), Hint("layer3")], example=x)
        out = distiller(x)
        (F.cross_entropy(out.student, y) + out.loss).backward()
    """

    def __init__(self, student: nn.Module, teacher: nn.Module | Teacher, terms: Sequence[Any], example: Any) -> None:
        if isinstance(teacher, nn.Module):
            trained = {id(p) for p in student.parameters() if p.requires_grad}
            if any(id(p) in trained for p in teacher.parameters()):
                raise WiringError(
                    "student and teacher share parameters, which the teacher would freeze; copy.deepcopy one"
                )
            teacher = Teacher(teacher)
        super().__init__(teacher, terms)
        self.student = student
        self.epoch = 0
        self.iteration = 0
        self.teacher.load()
        args, kwargs = _arguments(example)
        self.wire(
            student,
            lambda: student(*args, **kwargs),
            lambda: self.teacher.model(*args, **kwargs),
            frozenset({"labels", "boxes", "valid"}),
        )

    def forward(self, *args: Any, targets: Any = None, batch: Batch | None = None, **kwargs: Any) -> DistillOutput:
        """Runs teacher and student on the same input.

        Args:
            args, kwargs: go to both models.
            targets: labels, for terms that mix hard and soft targets.
            batch: sizes, boxes and so on, for terms with a region.
        """
        if not self.training:
            return DistillOutput(self.student(*args, **kwargs), {})
        device = next(self.student.parameters()).device
        step = Step(self.iteration, self.epoch)
        batch = batch if batch is not None else Batch()
        if targets is not None:
            batch.labels = targets
        teacher = None
        if self.active(step):
            teacher = self.record_teacher(lambda: self.teacher.model(*args, **kwargs), device.type)
        with self.record_student(self.student) as student:
            output = self.student(*args, **kwargs)
        self.iteration += 1
        return DistillOutput(output, self.losses(student, teacher, batch, step, device))

    def get_extra_state(self) -> dict[str, Any]:
        """The iterations done, for schedules, and what terms hide; a part of ``state_dict``."""
        hidden = self._hidden()
        return {"iteration": self.iteration, **({"hidden": hidden} if hidden else {})}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`get_extra_state`."""
        self.iteration = int(state["iteration"])
        self._load_hidden(state.get("hidden", {}))


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example), {}) if isinstance(example, (tuple, list)) else ((example,), {})


def _flat(ratio: Ratio) -> Ratio:
    return Ratio(ratio.numerator.reshape(-1), ratio.denominator.detach().reshape(-1).to(ratio.numerator.device))


def _idle(term: nn.Module, device: torch.device | str) -> Tensor:
    """0 that keeps the term's parameters in the graph, for DDP; also when they are infinite, so no ``0 *``."""
    parameters = [p for p in term.parameters() if p.requires_grad]
    if not parameters:
        return torch.zeros((), device=device)
    return torch.stack([p.flatten()[:0].sum() for p in parameters]).sum()
