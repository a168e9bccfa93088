"""Networks that are trained beside the student: critics, discriminators, paraphrasers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .distributed import SharedRandom, copy_from_first_rank, sum_over_ranks
from .errors import DistillError

A = TypeVar("A", bound="Auxiliary")


class Auxiliary:
    """A network with its optimizer, out of sight of everything that walks the student's modules.

    It is no ``nn.Module``: DDP, the student's optimizer, EMA and ``state_dict`` never meet it. It averages its gradients over
    the processes itself, computes in float32 whatever the autocast, and skips a step whose loss or gradient is not finite on
    any process. A deep copy (an EMA model) shares it. A term keeps it in ``auxiliaries``, where it moves and is saved with it.

    Args:
        network: the network.
        lr, betas, weight_decay: of its Adam.

    Attributes:
        random: random numbers of its own, in the checkpoint too.
        skipped: how many steps were not finite.
    """

    def __init__(
        self, network: nn.Module, lr: float = 4e-4, betas: Sequence[float] = (0.0, 0.9), weight_decay: float = 0.0
    ) -> None:
        self.network = network
        self.optimizer = torch.optim.Adam(network.parameters(), lr, (betas[0], betas[1]), weight_decay=weight_decay)
        self.random = SharedRandom()
        self.skipped = 0
        self._shared = False

    @contextmanager
    def learning(self, device_type: str) -> Iterator[None]:
        """The context of :meth:`step`: training mode, with gradient, in float32; the first time all processes start alike."""
        if not self._shared:
            copy_from_first_rank(self.network)
            self._shared = True
        self.network.train().requires_grad_(True)
        with torch.enable_grad(), torch.autocast(device_type, enabled=False):
            yield

    def step(self, loss: Tensor, count: int, figures: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One step of the optimizer; every process must make it.

        Args:
            loss: summed over this process's samples.
            count: how many there are.
            figures: further sums over them.

        Returns:
            The means of ``figures`` over the samples of all processes; nothing where the step was skipped.
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

    def judge(self, inputs: Tensor) -> Tensor:
        """What the network makes of ``inputs``, in float32, with a gradient to them alone."""
        self.network.eval().requires_grad_(False)
        with torch.autocast(inputs.device.type, enabled=False):
            return self.network(inputs.float())

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Moves the network, as ``nn.Module._apply`` does, and the optimizer's state with it."""
        self.network._apply(function)
        for state in self.optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.ndim:
                    state[key] = function(value)

    def state(self) -> dict[str, Any]:
        """For a checkpoint: network, optimizer, random state, count of skipped steps."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": self.random.state(),
            "skipped": self.skipped,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state`.

        Raises:
            DistillError: the state is that of another network.
        """
        own, given = self.network.state_dict(), state["network"]
        if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in given.items()}:
            kind = type(self.network).__name__.lower()
            raise DistillError(f"the checkpoint to resume holds another {kind}; resume with the one it was made with")
        self.network.load_state_dict(given)
        self.optimizer.load_state_dict(state["optimizer"])
        self.random.load(state["random"])
        self.skipped = int(state["skipped"])
        self._shared = True

    def __deepcopy__(self: A, memo: dict[int, Any]) -> A:
        return self
