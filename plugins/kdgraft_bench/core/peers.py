"""Other packages' distillation of the small nets, as a reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdgraft import DistillError, DistillOutput
from kdgraft.isolation import isolated_rng
from kdgraft.plain import Task
from kdgraft.sources.teacher import load_strictly, read_checkpoint
from kdgraft_bench.core.tasks import task

TEMPERATURE, HARD = 4.0, 0.1
"""Temperature and share of the labels, as in the method ``soft_targets`` of the benchmark."""


class TorchdistillKD(nn.Module):
    """A student under torchdistill's ``KDLoss``, which has the cross-entropy to the labels in itself.

    Args:
        student: the net to train.
        teacher: the trained net, which stays as it is.

    Raises:
        DistillError: torchdistill is not installed.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        try:
            from torchdistill.losses.mid_level import KDLoss
        except ImportError as error:
            raise DistillError(
                f"torchdistill cannot be imported ({error}); pip install --no-deps torchdistill (its losses need no torchvision)"
            ) from error
        self.student = student
        self._teacher = [teacher.requires_grad_(False).eval()]  # in a list: neither trained nor saved
        self._loss = KDLoss("net", "output", "net", "output", temperature=TEMPERATURE, alpha=HARD)

    def forward(self, inputs: Tensor, targets: Tensor | None = None) -> Any:
        """Return the student's output; in training with the loss, which leaves no share to the task's own."""
        output = self.student(inputs)
        if targets is None:
            return output
        with torch.no_grad():
            taught = self._teacher[0](inputs)
        loss = self._loss({"net": {"output": output}}, {"net": {"output": taught}}, targets)
        return DistillOutput(output, {"torchdistill.loss": loss}, host_share=0.0)


def torchdistill_kd(*, teacher: Mapping[str, Any], teacher_weights: str, **student: Any) -> Task:
    """Return the training of a net under a finished one by torchdistill's loss.

    Args:
        teacher: the arguments of :func:`~kdgraft_bench.core.tasks.task` with which the teacher was trained.
        teacher_weights: its file.
        student: the arguments for the student.
    """
    made = task(**student)
    with isolated_rng():  # the same batches in the same order as by other methods
        large = task(**teacher).model
    load_strictly(large, read_checkpoint(teacher_weights), teacher_weights, "teacher")
    made.model = TorchdistillKD(made.model, large)
    return made
