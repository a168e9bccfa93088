"""Parts of :func:`kdgraft.fit.fit`: the updates of the weights, the best model, the random state that resuming restores."""

from __future__ import annotations

import copy
import inspect
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import find_batch_size
from torch import Tensor, nn

from .distributed import copy_from_first_rank
from .errors import DistillError, check_number, nearest

T = TypeVar("T")
Precision = Literal["no", "bf16", "fp16"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

MakeOptimizer = Callable[..., torch.optim.Optimizer]
"""Builds an optimizer from parameters, such as ``torch.optim.SGD``, and from ``lr`` and ``weight_decay`` where they are given."""

Schedule = Literal["constant", "cosine"] | Callable[[float], float]
"""A name, or the factor on the learning rate as a function of the share of the training done, in [0, 1)."""


def join_processes() -> Accelerator:
    """Return accelerate's, of all processes that were started together; on CPUs it joins them only if it is told of CPUs.

    Raises:
        DistillError: accelerate was set up before for one process alone.
    """
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    started = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if started > accelerator.num_processes:
        raise DistillError(
            f"fit: {started} processes were started, and accelerate was set up for {accelerator.num_processes} before; on CPUs "
            "build no Accelerator() of your own, or Accelerator(cpu=True)"
        )
    return accelerator


def precision_of(given: Precision | None, accelerator: Accelerator) -> Any:
    """Return the precision to train in; ``accelerate launch --mixed_precision`` has wrapped the model already.

    Args:
        given: the user's setting, if any.
        accelerator: accelerate's state.

    Raises:
        DistillError: the two differ.
    """
    launched = accelerator.mixed_precision
    if given is not None and launched not in ("no", given):
        raise DistillError(
            f"fit: precision={given!r}, but accelerate was launched with {launched!r}; leave one of them out"
        )
    return given or launched


class Updates:
    """The updates of the weights: the optimizer with its schedule, the scaler of fp16, and clipping.

    Args:
        optimizer: the optimizer.
        rate: the factor on the learning rates as a function of the number of updates done; ``None`` leaves them alone.
        clip: the largest norm of all gradients together; ``None`` does not clip.
        precision: ``"bf16"`` or ``"fp16"`` for an autocast; fp16 scales the loss, so that small gradients do not vanish.
        device: the kind of device, such as ``"cuda"``.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rate: Callable[[int], float] | None,
        clip: float | None,
        precision: Precision,
        device: str,
    ) -> None:
        if precision not in ("no", *DTYPES):
            raise DistillError(f"fit: precision must be 'no', 'bf16' or 'fp16', got {precision!r}")
        if clip is not None:
            check_number("fit", "clip", clip, above=True)
        self.optimizer, self.rate, self.clip, self.done = optimizer, rate, clip, 0
        self.precision, self.device = precision, device
        self.scaler = torch.amp.GradScaler(device, enabled=precision == "fp16")
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of the forward pass."""
        dtype = DTYPES.get(self.precision, torch.bfloat16)
        return torch.autocast(self.device, dtype=dtype, enabled=self.precision in DTYPES)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss."""
        self.scaler.scale(loss).backward()

    def step(self) -> None:
        """Update the weights, and clear the gradients; fp16 leaves out an update whose gradients overflow."""
        if self.rate is not None:
            factor = self.rate(self.done)
            for group in self.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
        if self.clip is not None:
            self.scaler.unscale_(self.optimizer)
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.done += 1

    def state(self) -> dict[str, Any]:
        """Return the state that a resumed run needs."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(), "updates": self.done}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state`.

        Raises:
            DistillError: the state is another optimizer's, or of another precision.
        """
        if bool(state["scaler"]) != self.scaler.is_enabled():
            raise DistillError("it was trained with another precision; resume with the same")
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except (ValueError, KeyError) as error:
            raise DistillError(f"its optimizer has other parameters ({error}); resume with the same") from error
        self.scaler.load_state_dict(state["scaler"])
        self.done = int(state["updates"])


def build_optimizer(
    given: torch.optim.Optimizer | MakeOptimizer | None, model: nn.Module, **settings: float | None
) -> torch.optim.Optimizer:
    """Return the optimizer of the trained parameters of a model.

    Args:
        given: an optimizer, or a function that builds one; AdamW if omitted.
        model: the model.
        settings: the learning rate ``lr`` and ``weight_decay``; ``None`` leaves them to the optimizer.

    Raises:
        DistillError: a setting is given beside an optimizer that is built already, or it does not take it.
    """
    told = {key: value for key, value in settings.items() if value is not None}
    for key, value in told.items():
        check_number("fit", key, value)
    if isinstance(given, torch.optim.Optimizer):
        if told:
            raise DistillError(f"fit: the optimizer is built already, with its own {', '.join(told)}; set it there")
        return given
    make: MakeOptimizer = torch.optim.AdamW if given is None else given
    takes = inspect.signature(make).parameters
    for key in told:
        if key not in takes and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
            raise DistillError(f"fit: the optimizer takes no {key}; set it where the optimizer is built")
    made = make([p for p in model.parameters() if p.requires_grad], **told)
    if not isinstance(made, torch.optim.Optimizer):
        raise DistillError(f"fit: optimizer must build an optimizer from parameters, got a {type(made).__name__}")
    return made


def learning_rate(
    schedule: Schedule, warmup: int, epochs: int, loader: Any, parts: int
) -> Callable[[int], float] | None:
    """Return the factor on the learning rate as a function of the number of updates done; ``None`` if it is always 1.

    Args:
        schedule: see :data:`Schedule`; it begins after the warm-up.
        warmup: number of updates in which the rate rises linearly to its full value.
        epochs: number of epochs of the schedule.
        loader: the batches of an epoch.
        parts: number of batches of one update.
    """
    if not callable(schedule) and schedule not in ("constant", "cosine"):
        raise DistillError(f"fit: schedule must be 'constant', 'cosine' or a function, got {schedule!r}")
    check_number("fit", "warmup", warmup, whole=True)
    if schedule == "constant":
        return None if warmup == 0 else lambda done: min(1.0, (done + 1) / warmup)
    if not hasattr(loader, "__len__"):
        raise DistillError("fit: a schedule needs a loader that has a length; give schedule='constant'")
    total = epochs * math.ceil(len(loader) / parts)
    if warmup >= total:
        raise DistillError(f"fit: warmup must be less than the {total} updates of the training, got {warmup}")
    shape = schedule if callable(schedule) else lambda done: 0.5 + 0.5 * math.cos(math.pi * done)

    def factor(done: int) -> float:
        return (done + 1) / warmup if done < warmup else float(shape((done - warmup) / (total - warmup)))

    return factor


def grouped(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield lists of ``size`` items; the last one may be shorter."""
    source = iter(items)
    while group := list(islice(source, size)):
        yield group


def pair_of(batch: Any) -> tuple[Any, Any]:
    """Return the inputs and the targets of a batch; raise a :class:`DistillError` for one that is not these two.

    A tensor of two samples is none, although it can be unpacked.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        many = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise DistillError(
            f"fit: the loader must yield (inputs, targets), got a {type(batch).__name__}{many}; targets may be None"
        )
    return batch[0], batch[1]


def shares(group: Sequence[Any]) -> list[float]:
    """Return the share of each batch in the samples of all; equal ones where the number of samples cannot be seen."""
    try:
        sizes = [find_batch_size(batch) for batch in group]
    except (TypeError, ValueError):
        sizes = [1] * len(group)
    return [size / max(sum(sizes), 1) for size in sizes]


class Best:
    """The student of the best epoch.

    Args:
        metric: the name of the metric that is best when it is largest, or ``"-name"`` when it is smallest; ``None`` keeps none.
        known: the only metrics there can be; ``None`` if they are not known yet.
    """

    def __init__(self, metric: str | None, known: Sequence[str] | None) -> None:
        self.metric, self.sign = (metric or "").removeprefix("-"), -1.0 if (metric or "").startswith("-") else 1.0
        self.epoch: int | None = None
        self.value, self.weights = math.nan, dict[str, Any]()
        if self.metric and known is not None:
            self._check(known)

    def _check(self, metrics: Sequence[str]) -> None:
        if self.metric not in metrics:
            raise DistillError(f"fit: best={self.metric!r} is no metric of evaluate{nearest(self.metric, metrics)}")

    def consider(self, metrics: Mapping[str, float], student: nn.Module, epoch: int) -> None:
        """Keep the student if its metric is better than that of all epochs before."""
        if not self.metric:
            return
        self._check(list(metrics))
        value = self.sign * metrics[self.metric]
        if value > self.value or (math.isnan(self.value) and not math.isnan(value)):
            self.value, self.epoch = value, epoch
            self.weights = {
                key: part.to("cpu", copy=True) if isinstance(part, Tensor) else copy.deepcopy(part)
                for key, part in student.state_dict().items()
            }

    def restore(self, student: nn.Module) -> int | None:
        """Load the best weights into the student, on all processes those of the first; return their epoch."""
        if self.epoch is not None:
            student.load_state_dict(self.weights)
            copy_from_first_rank(student)
        return self.epoch

    def state(self) -> dict[str, Any]:
        """Return the state that a resumed run needs."""
        return {
            "metric": self.metric,
            "sign": self.sign,
            "value": self.value,
            "epoch": self.epoch,
            "weights": self.weights,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state`, unless it is of another metric.

        Raises:
            DistillError: the run kept another best model before.
        """
        if (state["metric"], state["sign"]) != (self.metric, self.sign):
            before = "-" * (state["sign"] < 0) + state["metric"]
            raise DistillError(f"it was trained with best={before or None!r}; resume with the same")
        self.value, self.epoch, self.weights = state["value"], state["epoch"], dict(state["weights"])


def random_state(*, cuda: bool = True) -> dict[str, Any]:
    """Return the random state of this process, of types that ``torch.load`` reads with ``weights_only=True``.

    Args:
        cuda: with the state of the GPU, where there is one.
    """
    kind, keys, *rest = np.random.get_state()
    found: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    found["numpy"] = (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest)
    if cuda and torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore :func:`random_state`."""
    torch.set_rng_state(state["torch"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
