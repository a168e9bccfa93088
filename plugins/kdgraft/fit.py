"""A training loop for plain PyTorch, short enough to copy into a script; accelerate runs it on several processes."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from .distiller import Distiller
from .errors import DistillError, check_number
from .files import written_whole
from .sources.teacher import load_strictly, read_checkpoint
from .step import scaled
from .telling import announced

logger = logging.getLogger("kdgraft")

STATE = "fit.pt"
"""The name of the file in ``folder`` that a run resumes from."""

TaskLoss = Callable[[Any, Any], Tensor]
"""The task's own loss, called with ``(the model's output, the batch's targets)``."""


@dataclass
class Fitted:
    """The result of :func:`fit`.

    Attributes:
        model: the trained student, without its distiller.
        epochs: number of epochs that it was trained for in total.
        history: for each epoch the mean loss and the metrics that ``evaluate`` returned.
    """

    model: nn.Module
    epochs: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


def fit(
    model: nn.Module,
    loader: Iterable[Any],
    loss: TaskLoss,
    *,
    epochs: int,
    optimizer: torch.optim.Optimizer | None = None,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
) -> Fitted:
    """Train a distiller, or a plain model, on batches of ``(inputs, targets)``.

    After each epoch the full training state is written to ``folder``: weights, optimizer, the state of terms and sources, and the
    random state of every process. A run that is interrupted and resumed ends with the same weights, bit for bit, as one without
    interruption. Peers are trained on the same loss as the student.

    Args:
        model: a :class:`~kdgraft.Distiller`, or the plain student or teacher.
        loader: yields the batches; a ``DataLoader`` is sharded over the processes.
        loss: the task's own loss, a mean over the batch.
        epochs: total number of epochs, including those before resuming.
        optimizer: an optimizer of the parameters of ``model``; AdamW with its defaults if omitted.
        evaluate: computes metrics of the student, in eval mode, after each epoch on the first process.
        folder: the folder of the training state; nothing is written if omitted.
        resume: resume from the state in ``folder`` if there is one.

    Returns:
        The trained student with its history.

    Raises:
        DistillError: the state to resume belongs to another model or other terms.
    """
    check_number("fit", "epochs", epochs, 1, whole=True)
    accelerator = Accelerator()
    made = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    student = model.student if isinstance(model, Distiller) else model
    wrapped, made, batches = accelerator.prepare(model, made, loader)
    fitted = Fitted(student)
    file = None if folder is None else Path(folder) / STATE
    if resume and file is not None and file.is_file():
        _load(file, model, made, fitted)
    if isinstance(model, Distiller) and accelerator.is_main_process:
        logger.info(announced(model, student))
    while fitted.epochs < epochs:
        if isinstance(model, Distiller):
            model.epoch = fitted.epochs
        wrapped.train()
        sums = torch.zeros(2, dtype=torch.float64)
        for inputs, targets in batches:
            value = _loss(wrapped, inputs, targets, loss)
            accelerator.backward(value)
            made.step()
            made.zero_grad()
            sums += torch.tensor([value.item(), 1.0])
        total, steps = accelerator.reduce(sums.to(accelerator.device)).tolist()
        found = {"loss": total / max(steps, 1)}
        if evaluate is not None and accelerator.is_main_process:
            student.eval()
            with torch.no_grad():
                found |= {name: float(value) for name, value in evaluate(student).items()}
        fitted.epochs += 1
        fitted.history.append(found)
        if file is not None:
            _save(file, model, made, fitted, accelerator)
    return fitted


def _loss(model: nn.Module, inputs: Any, targets: Any, loss: TaskLoss) -> Tensor:
    """Compute the sum of the task's and the distillation losses of the student and of its peers."""
    plain = model.module if hasattr(model, "module") else model
    if not isinstance(plain, Distiller):
        return loss(model(inputs), targets)
    out = model(inputs, targets=targets)
    peers = [scaled(loss(output, targets), out.peer_shares[name]) for name, output in out.peers.items()]
    return out.total(loss(out.student, targets)) + sum(peers)


def _save(file: Path, model: nn.Module, optimizer: Any, fitted: Fitted, accelerator: Accelerator) -> None:
    """Write the state to a temporary file and replace the old one, which a run that is killed here keeps."""
    randoms = gather_object([_random_state()])
    if accelerator.is_main_process:
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "random": randoms,
            "epochs": fitted.epochs,
            "history": fitted.history,
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(file) as part:
            torch.save(state, part)
    accelerator.wait_for_everyone()


def _load(file: Path, model: nn.Module, optimizer: Any, fitted: Fitted) -> None:
    state = read_checkpoint(file)
    lacking = [key for key in ("model", "optimizer", "random", "epochs", "history") if key not in state]
    if lacking:
        raise DistillError(f"cannot resume from {file}: it lacks {', '.join(lacking)}; remove it to start again")
    randoms, rank = state["random"], torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    if rank >= len(randoms):
        raise DistillError(f"cannot resume from {file}: it was written by {len(randoms)} processes; start as many")
    load_strictly(model, state["model"], str(file))
    optimizer.load_state_dict(state["optimizer"])
    fitted.epochs, fitted.history = state["epochs"], state["history"]
    _set_random_state(randoms[rank])


def _random_state() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    found: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    found["numpy"] = (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest)
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
