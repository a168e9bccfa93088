"""Reader of the numbers that Hugging Face models regress, one or several for each sample."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kdgraft.batch import Batch
from kdgraft.errors import WiringError
from kdgraft.pairs import Compared, Numbers, Pairs
from kdgraft.readers import targets_of
from kdgraft.sources import combined
from kdgraft.taps import Recording, Tap
from kdgraft.wiring import Wiring

from .predictions import REGRESSION, problem_types_of
from .tasks import PER_SAMPLE, task_of
from .tokens import tokens_of

_LOGITS = Tap.parse("[logits]")


class OutputNumbers(Numbers):
    """The numbers ``(B, D)`` of two models for each sample, and the labels as their true values."""

    def __init__(self, student: nn.Module, teacher: nn.Module, term: str) -> None:
        self.name, self.taps = term, ([_LOGITS], [_LOGITS])
        for model in (student, teacher):
            task = task_of(model)
            if task not in PER_SAMPLE or task == "choice":
                raise WiringError(
                    f"{term} compares regressed numbers, and {type(model).__name__} predicts none; use SoftTargets"
                )
        self.problem = problem_types_of(term, student, teacher)
        if self.problem.named not in (None, REGRESSION):
            raise WiringError(
                f"{term} compares regressed numbers, and these models predict classes ({self.problem.named}); use SoftTargets"
            )

    def wire(self, wiring: Wiring) -> list[Compared]:
        s, t = wiring.student_recording[_LOGITS], wiring.teacher_recording[_LOGITS]
        if s.shape != t.shape:
            raise WiringError(
                f"{self.name}: outputs {tuple(s.shape)} and {tuple(t.shape)} cannot be compared number by number; use a teacher of "
                "the same targets"
            )
        # As in the models themselves, several outputs are classes unless a config says otherwise.
        if self.problem.named is None and s.shape[-1] != 1:
            raise WiringError(
                f"{self.name}: the {s.shape[-1]} outputs are class scores unless a config says otherwise; set "
                "problem_type='regression' in both configs, or use SoftTargets"
            )
        return [Compared(s, t, (_LOGITS, _LOGITS), "samples")]

    def count(self, batch: Batch) -> Tensor | None:
        return torch.tensor(float(tokens_of(batch).samples))

    def pairs(self, student: Recording, teacher: Recording, batch: Batch) -> list[Pairs]:
        s: Any = student[_LOGITS]
        t = combined(teacher, lambda member: member[_LOGITS], "value")
        target = targets_of(self.name, s, batch.labels) if self.needs_targets else None
        return [Pairs(s, t, target=None if target is None else target.view_as(s))]
