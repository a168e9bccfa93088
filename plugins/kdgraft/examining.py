"""Further runs of a step's models for terms: a teacher's own loss with changed features, and passes on other inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .errors import DistillError
from .isolation import loss_mode, own_random_stream
from .passes import Passes
from .recorder import Change, Recorder
from .sources import STUDENT, Source, Teacher
from .terms import Term
from .terms.base import Examiner

RunLoss = Callable[[Source], Tensor]
"""Runs a source's model on the host's own loss of the step's batch, and returns the loss."""


def examiners(
    terms: Sequence[Term],
    sources: Mapping[str, Source],
    recorders: Mapping[str, Recorder],
    run_loss: RunLoss,
    device: torch.device,
) -> dict[str, Examiner]:
    """Return for each term the function that runs its teacher on the host's own loss, with the tensors of its taps changed.

    Terms on other sources have none, nor those on a teacher with another order of classes, which the labels do not follow.

    Args:
        terms: the terms.
        sources: the sources by name.
        recorders: the recorder of each model by its name.
        run_loss: runs a source on the host's own loss.
        device: the device of the step.
    """
    found: dict[str, Examiner] = {}
    for term in terms:
        source = sources.get(term.source)
        if isinstance(source, Teacher) and source.class_order is None:
            found[term.name] = _examiner(term, source, recorders[source.name], run_loss, device)
    return found


def _examiner(term: Term, source: Teacher, recorder: Recorder, run_loss: RunLoss, device: torch.device) -> Examiner:
    def examine(change: Change) -> Tensor:
        model, taps = source.model, term.teacher_taps
        try:
            with (
                own_random_stream(),
                source.context(device.type),
                torch.enable_grad(),
                loss_mode(model),
                recorder.substituted(model, taps, change),
            ):
                return run_loss(source)
        except (DistillError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise DistillError(
                f"{term.name}: the teacher, a {type(model).__name__}, cannot compute its own loss on this batch "
                f"({type(error).__name__}: {error}), on which the term's network should learn; set objective='features'"
            ) from error

    return examine


def passes(
    terms: Sequence[Term],
    sources: Mapping[str, Source],
    recorders: Mapping[str, Recorder],
    student: nn.Module,
    device: torch.device,
) -> dict[str, Passes]:
    """Return the passes of each term that asks for them, by the term's name.

    Args:
        terms: the terms.
        sources: the sources by name.
        recorders: the recorder of each model by its name.
        student: the student.
        device: the device of the step.
    """
    return {
        term.name: Passes(
            term.reader.run, sources[term.source], student, (recorders[term.source], recorders[STUDENT]), device
        )
        for term in terms
        if term.runs_again
    }
