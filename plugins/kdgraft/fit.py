"""A training loop for plain PyTorch, short enough to copy into a script; accelerate runs it on several processes."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, convert_to_fp32, gather_object, send_to_device
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .engine import Engine
from .errors import DistillError, check_number
from .files import written_whole
from .sources.teacher import load_strictly, read_checkpoint
from .step import scaled
from .telling import announced
from .training import (
    Best,
    MakeOptimizer,
    Precision,
    Schedule,
    Updates,
    build_optimizer,
    grouped,
    join_processes,
    learning_rate,
    pair_of,
    precision_of,
    random_state,
    set_random_state,
    shares,
)
from .views import Views

logger = logging.getLogger("kdgraft")

STATE = "fit.pt"
"""The name of the file in ``folder`` that a run resumes from."""

TaskLoss = Callable[[Any, Any], Tensor]
"""The task's own loss, called with ``(the model's output, the batch's targets)``."""

MakeViews = Callable[[Any, Any], tuple[Any, Any]]
"""Turns the ``(inputs, targets)`` of a batch into others; the inputs may be :class:`~kdgraft.Views`."""


@dataclass
class Fitted:
    """The result of :func:`fit`.

    Attributes:
        model: the trained student, without its distiller; with ``best``, in its best epoch.
        epochs: number of epochs that it was trained for in total.
        history: for each epoch the mean loss and the metrics that ``evaluate`` returned.
        best_epoch: the epoch of the best model, from 0; ``None`` if the last one is kept.
    """

    model: nn.Module
    epochs: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """The entry of :attr:`history` that belongs to :attr:`model`."""
        return self.history[-1 if self.best_epoch is None else self.best_epoch]


def fit(
    model: nn.Module,
    loader: Iterable[Any],
    loss: TaskLoss,
    *,
    epochs: int,
    lr: float | None = None,
    weight_decay: float | None = None,
    optimizer: torch.optim.Optimizer | MakeOptimizer | None = None,
    schedule: Schedule = "constant",
    warmup: int = 0,
    accumulate: int = 1,
    precision: Precision | None = None,
    clip: float | None = None,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    best: str | None = None,
    views: MakeViews | None = None,
    stop: int | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    progress: bool = False,
) -> Fitted:
    """Train a distiller, or a plain model, on batches of ``(inputs, targets)``.

    After each epoch the full training state is written to ``folder``: weights, optimizer, the state of terms and sources, the best
    model, and the random state of every process. A run that is interrupted and resumed ends with the same weights, bit for bit, as
    one without interruption. Peers are trained on the same loss as the student.

    Args:
        model: a :class:`~kdgraft.Distiller`, or the plain student or teacher; or any module with a ``student`` whose call in
            training mode, ``model(inputs, targets=targets)``, returns a :class:`~kdgraft.DistillOutput`.
        loader: yields the batches; a ``DataLoader`` is sharded over the processes.
        loss: the task's own loss, a mean over the batch.
        epochs: total number of epochs, including those before resuming.
        lr, weight_decay: settings of the optimizer; its defaults if omitted.
        optimizer: an optimizer of the parameters of ``model``, or a function that builds one from parameters, such as
            ``torch.optim.SGD``; AdamW if omitted.
        schedule: the learning rate over training: ``"constant"``, ``"cosine"`` to 0, or a function of the share of the training
            done, in [0, 1), that returns a factor.
        warmup: number of updates in which the learning rate rises linearly to its full value, before the schedule.
        accumulate: number of batches of one update; the losses of terms and of the task are those of one large batch, as far as they
            are means over samples.
        precision: ``"bf16"`` or ``"fp16"`` for an autocast, with a scaler of the loss in fp16; ``"no"``; that of
            ``accelerate launch`` if omitted.
        clip: the largest norm of all gradients together; larger ones are scaled down to it.
        evaluate: computes metrics of the student, in eval mode, after each epoch on the first process.
        best: the name of a metric; the student of the epoch where it is largest, or with ``"-name"`` smallest, is returned.
        views: makes inputs and targets from those of each batch: an augmentation, mixup, or :class:`~kdgraft.Views` that differ by
            model.
        stop: end after so many epochs, with the schedule of all ``epochs``: an early-stopped teacher.
        folder: the folder of the training state; nothing is written if omitted.
        resume: resume from the state in ``folder`` if there is one.
        progress: show a progress bar with the time that is left.

    Returns:
        The trained student with its history.

    Raises:
        DistillError: a setting makes no sense, or the state to resume belongs to another model, other terms or settings.
    """
    check_number("fit", "epochs", epochs, 1, whole=True)
    check_number("fit", "accumulate", accumulate, 1, whole=True)
    end = epochs if stop is None else _checked_stop(stop, epochs)
    accelerator = join_processes()
    student = student_of(model)
    made = build_optimizer(optimizer, model, lr=lr, weight_decay=weight_decay)
    wrapped, batches = accelerator.prepare(model, loader)
    rate = learning_rate(schedule, warmup, epochs, batches, accumulate)
    updates = Updates(made, rate, clip, precision_of(precision, accelerator), accelerator.device.type)
    fitted, kept = Fitted(student), Best(best, ["loss"] if evaluate is None else None)
    file = None if folder is None else Path(folder) / STATE
    if resume and file is not None and file.is_file():
        _load(file, model, updates, kept, fitted)
    if isinstance(model, Engine) and accelerator.is_main_process:
        logger.info(announced(model, student))
    with _bar(batches, accumulate, end, updates.done, progress and accelerator.is_main_process) as bar:
        while fitted.epochs < end:
            if distils(model) and hasattr(model, "epoch"):
                model.epoch = fitted.epochs  # type: ignore[assignment]
            wrapped.train()
            losses = []
            for group in grouped(batches, accumulate):
                losses.append(_step(wrapped, group, loss, views, updates, accelerator))
                bar.update()
            found = _evaluated(losses, student, evaluate, accelerator)
            bar.set_postfix(found)
            kept.consider(found, student, fitted.epochs)
            fitted.epochs += 1
            fitted.history.append(found)
            if file is not None:
                _save(file, model, updates, kept, fitted, accelerator)
    accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
    fitted.best_epoch = kept.restore(student)
    return fitted


def distils(model: nn.Module) -> bool:
    """Return true for a module around a student, whose calls in training mode return a :class:`~kdgraft.DistillOutput`."""
    return isinstance(getattr(model, "student", None), nn.Module)


def student_of(model: nn.Module) -> nn.Module:
    """Return the student of a module around one, and any other model as it is."""
    return model.student if distils(model) else model  # type: ignore[return-value]


def _checked_stop(stop: int, epochs: int) -> int:
    check_number("fit", "stop", stop, 1, whole=True)
    if stop > epochs:
        raise DistillError(f"fit: stop must be at most the {epochs} epochs of the schedule, got {stop}")
    return stop


def _bar(batches: Any, accumulate: int, epochs: int, done: int, shown: bool) -> Any:
    """Return a progress bar over all updates, with the time that is left if the loader has a length."""
    from tqdm import tqdm

    total = epochs * math.ceil(len(batches) / accumulate) if hasattr(batches, "__len__") else None
    return tqdm(total=total, initial=done, disable=not shown)


def _step(
    wrapped: nn.Module,
    group: list[Any],
    loss: TaskLoss,
    views: MakeViews | None,
    updates: Updates,
    accelerator: Accelerator,
) -> Tensor:
    """Update the weights once from the batches of a group, each of which counts by its share of the samples; return the loss."""
    total = torch.zeros((), device=accelerator.device)
    for number, (batch, share) in enumerate(zip(group, shares(group), strict=True), 1):
        last = number == len(group)
        inputs, targets = send_to_device(pair_of(batch), accelerator.device)
        if views is not None:
            inputs, targets = views(inputs, targets)
        with nullcontext() if last else accelerator.no_sync(wrapped):
            value = training_loss(wrapped, inputs, targets, loss, autocast=updates.autocast(), share=share, last=last)
            updates.backward(value)
        total += value.detach()
    updates.step()
    return total


def training_loss(
    model: nn.Module,
    inputs: Any,
    targets: Any,
    loss: TaskLoss,
    *,
    autocast: AbstractContextManager[Any] | None = None,
    share: float = 1.0,
    last: bool = True,
) -> Tensor:
    """Compute the sum of the task's and the distillation losses of the student and of its peers, as :func:`fit` minimises it.

    Args:
        model: a plain model, or a module around a student.
        inputs, targets: a batch, or a view of it.
        loss: the task's own loss of (output, targets).
        autocast: the context of the model's forward.
        share: the share of the samples of an update that the batch has.
        last: false for a batch after which others of the same update follow.
    """
    autocast = autocast or nullcontext()
    plain = model.module if isinstance(model, DistributedDataParallel) else model

    def own(output: Any) -> Tensor:
        return share * loss(convert_to_fp32(output), targets)

    if not distils(plain):
        with autocast:
            output = model(inputs.student if isinstance(inputs, Views) else inputs)
        return own(output)
    part = getattr(plain, "part", None)
    with autocast, nullcontext() if part is None else part(share, last=last):
        out = model(inputs, targets=targets)
    if targets is None:  # unlabelled data, from which the terms alone learn
        dropped = any(name.endswith(".dropped") for name in out.losses)
        if not dropped and (out.host_share or any(out.peer_shares.values())):
            raise DistillError(
                "fit: a batch without targets needs terms that leave nothing to the task's own loss; add TaskShare()"
            )
        if out.settle is not None:
            raise DistillError(
                "fit: weight='auto' compares with the task's own loss, which a batch without targets lacks"
            )
        return out.loss
    peers = [scaled(own(output), out.peer_shares[name]) for name, output in out.peers.items()]
    return out.total(own(out.student)) + sum(peers)


def _evaluated(
    losses: list[Tensor],
    student: nn.Module,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Return the mean loss of all processes and the metrics that the first one computes, on all of them."""
    sums = torch.tensor([sum(value.item() for value in losses), len(losses)], dtype=torch.float64)
    total, steps = accelerator.reduce(sums.to(accelerator.device)).tolist()
    found = {"loss": total / max(steps, 1)}
    if evaluate is not None and accelerator.is_main_process:
        student.eval()
        with torch.no_grad():
            found |= {name: float(value) for name, value in evaluate(student).items()}
    return broadcast_object_list([found])[0]


def _save(file: Path, model: nn.Module, updates: Updates, kept: Best, fitted: Fitted, accelerator: Accelerator) -> None:
    """Write the state to a temporary file and replace the old one, which a run that is killed here keeps."""
    randoms = gather_object([random_state()])
    if accelerator.is_main_process:
        state = {
            "model": model.state_dict(),
            **updates.state(),
            "random": randoms,
            "epochs": fitted.epochs,
            "history": fitted.history,
            "best": kept.state(),
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(file) as part:
            torch.save(state, part)
    accelerator.wait_for_everyone()


def _load(file: Path, model: nn.Module, updates: Updates, kept: Best, fitted: Fitted) -> None:
    state = read_checkpoint(file)
    keys = ("model", "optimizer", "random", "epochs", "history", "scaler", "updates", "best")
    lacking = [key for key in keys if key not in state]
    if lacking:
        raise DistillError(f"cannot resume from {file}: it lacks {', '.join(lacking)}; remove it to start again")
    randoms, rank = state["random"], torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    if rank >= len(randoms):
        raise DistillError(f"cannot resume from {file}: it was written by {len(randoms)} processes; start as many")
    load_strictly(model, state["model"], str(file))
    try:
        updates.load(state)
        kept.load(state["best"])
    except DistillError as error:
        raise DistillError(f"cannot resume from {file}: {error}") from error
    fitted.epochs, fitted.history = state["epochs"], state["history"]
    set_random_state(randoms[rank])
