"""Auxiliary networks, which are trained beside the student: critics, discriminators, paraphrasers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .distributed import SharedRandom, copy_from_first_rank, sum_over_ranks
from .errors import DistillError, check_number, is_number

A = TypeVar("A", bound="Auxiliary")


class Auxiliary:
    """A network with its own optimizer, hidden from everything that traverses the student's modules.

    It is not an ``nn.Module``, so DDP, the student's optimizer, EMA and ``state_dict`` do not see it. It averages its gradients
    over the processes itself, computes in float32 under any autocast, and skips a step whose loss or gradient is not finite on
    any process. A deep copy (an EMA model) shares it. A term keeps it in ``auxiliaries``, and moves and saves it from there.

    Args:
        network: the network to train.
        lr, betas, weight_decay: settings of its Adam optimizer.

    Attributes:
        random: its own random number generator, which the checkpoint includes.
        skipped: number of steps that were skipped because they were not finite.
    """

    def __init__(
        self, network: nn.Module, lr: float = 4e-4, betas: Sequence[float] = (0.0, 0.9), weight_decay: float = 0.0
    ) -> None:
        self.network = network
        self.optimizer = torch.optim.Adam(network.parameters(), lr, (betas[0], betas[1]), weight_decay=weight_decay)
        self.random = SharedRandom()
        self.skipped = 0
        self._shared = False

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the network: float32, or float64 if the student has that."""
        return next(self.network.parameters()).dtype

    @contextmanager
    def learning(self, device_type: str) -> Iterator[None]:
        """Enter training mode with gradients in float32 for :meth:`step`; on first use, synchronise the weights over processes."""
        if not self._shared:
            copy_from_first_rank(self.network)
            self._shared = True
        self.network.train().requires_grad_(True)
        with torch.enable_grad(), torch.autocast(device_type, enabled=False):
            yield

    def step(self, loss: Tensor, count: int, figures: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take one step of the optimizer; every process must call it.

        Args:
            loss: the sum of the losses of this process's samples.
            count: the number of these samples.
            figures: further sums over the samples, to be logged.

        Returns:
            The means of ``figures`` over the samples of all processes; empty if the step was skipped.
        """
        parameters = list(self.network.parameters())
        gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        sums = torch.stack([*figures.values(), loss.new_tensor(float(count))]).detach()
        total = sum_over_ranks(torch.cat([*(g.flatten() for g in gradients), sums]))
        everyone = total[-1]
        if not bool(torch.isfinite(total).all()) or not bool(everyone > 0):
            self.skipped += int(bool(everyone != 0))
            return {}
        pieces = (total[: -len(sums)] / everyone).split([p.numel() for p in parameters])
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return dict(zip(figures, (total[-len(sums) : -1] / everyone).unbind(), strict=True))

    @contextmanager
    def frozen(self, device_type: str) -> Iterator[None]:
        """Enter eval mode without gradients to the parameters, in float32 even under autocast."""
        self.network.eval().requires_grad_(False)
        with torch.autocast(device_type, enabled=False):
            yield

    def judge(self, inputs: Tensor) -> Tensor:
        """Apply the network to ``inputs`` in its own precision, with gradients to the inputs only."""
        with self.frozen(inputs.device.type):
            return self.network(inputs.to(self.dtype))

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Move the network, as ``nn.Module._apply`` does, together with the optimizer's state.

        Where the student is converted to half precision, both keep theirs.
        """

        def move(tensor: Tensor) -> Tensor:
            moved = function(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        self.network._apply(move)
        for state in self.optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.ndim:
                    state[key] = move(value)

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint: network, optimizer, random state, number of skipped steps."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": self.random.state(),
            "skipped": self.skipped,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state`.

        Raises:
            DistillError: the state belongs to a different network.
        """
        own, given = self.network.state_dict(), state["network"]
        if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in given.items()}:
            kind = type(self.network).__name__.lower()
            raise DistillError(
                f"the checkpoint to resume holds another {kind}; resume with the settings it was made with"
            )
        self.network.load_state_dict(given)
        self.optimizer.load_state_dict(state["optimizer"])
        self.random.load(state["random"])
        self.skipped = int(state["skipped"])
        self._shared = True

    def __deepcopy__(self: A, memo: dict[int, Any]) -> A:
        return self


def check_optimizer(owner: str, lr: Any, betas: Any, weight_decay: Any) -> None:
    """Raise a :class:`DistillError` unless the settings of an auxiliary network's Adam make sense."""
    check_number(owner, "lr", lr, above=True)
    check_number(owner, "weight_decay", weight_decay)
    pair = list(betas) if isinstance(betas, (tuple, list)) else []
    if len(pair) != 2 or not all(is_number(beta) and 0 <= beta < 1 for beta in pair):
        raise DistillError(f"{owner}: betas must be two numbers in [0, 1), got {betas!r}")
