"""Language-model losses without stored logits: cross-entropy and divergences from hidden states, chunk by chunk.

A causal language model's logits are tokens × vocabulary numbers, and their gradients and the teacher's logits need as many again.
Here each chunk of tokens passes through both output layers, all losses and their gradients before the next chunk does; only the
gradients of the hidden states and of the output layer are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kdgraft.errors import WiringError
from kdgraft.topk import TopK

from .adapters import plain_layer
from .sharding import whole
from .tokens import IGNORED

Compare = Callable[[Tensor, Any, Tensor], Tensor]


class LogitTransform(NamedTuple):
    """The change of logits after the output layer: ``cap · tanh(scale · logits / cap)``, or ``scale · logits`` without a cap."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the transformed logits."""
        scaled = logits if self.scale == 1 else logits * self.scale
        return scaled if self.cap is None else torch.tanh(scaled / self.cap) * self.cap


AT_ONCE = 2**22
"""The logits of each model that a chunk has by default: 128 tokens of 32 768 entries. On CPUs smaller chunks are faster, too."""
IDENTITY = LogitTransform()


class Head(NamedTuple):
    """An output layer: weight ``(V, H)``, bias ``(V,)`` or ``None``, and the transform of its logits."""

    weight: Tensor
    bias: Tensor | None
    transform: LogitTransform = IDENTITY

    def to(self, dtype: torch.dtype) -> Head:
        """Return the layer in another precision, so that it is converted once and not for each chunk."""
        return Head(self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype), self.transform)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the logits of hidden states, before the transform."""
        bias = None if self.bias is None else self.bias.to(hidden.dtype)
        return F.linear(hidden, self.weight.to(hidden.dtype), bias)


def head_of(model: Any, transform: LogitTransform = IDENTITY, *, adapted: bool = True) -> Head:
    """Return the output layer of a language model; a :class:`WiringError` is raised unless it is linear.

    Args:
        model: the model.
        transform: the transform of its logits.
        adapted: false for the layer as it was before PEFT's adapters.
    """
    layer = plain_layer(model.get_output_embeddings(), adapted=adapted)
    if not isinstance(layer, nn.Linear):
        raise WiringError(
            f"losses from states need a linear output layer without adapters in it, and {type(model).__name__} has {type(layer).__name__}"
        )
    return Head(whole(layer.weight), whole(layer.bias), transform)


class Given(NamedTuple):
    """A teacher's logits as far as they are known: states ``(N, H_t)`` and an output layer.

    Without an output layer the rows are the logits ``(N, V)``, or the largest of the teacher's probabilities.
    """

    rows: Tensor | TopK
    head: Head | None = None

    def of(self, index: Tensor) -> Any:
        """Return the teacher's logits of some tokens, or what is known of its probabilities."""
        chosen = self.rows[index]
        if isinstance(chosen, TopK):
            return chosen
        return chosen.float() if self.head is None else self.head.transform(self.head(chosen).float())

    def ready(self) -> Given:
        """Return it with the output layer in the precision of the states."""
        if self.head is None or not isinstance(self.rows, Tensor):
            return self
        return Given(self.rows, self.head.to(self.rows.dtype))


class TokenLoss(NamedTuple):
    """A loss that is a sum over tokens.

    Attributes:
        compare: maps logits ``(n, V)`` of student and teacher, and the tokens ``(n,)`` that they predict, to losses ``(n,)``.
        counted: ``(N,)`` boolean: the tokens that count.
        factor: the factor of the sum over tokens in the total.
        sources: the names of the teachers with which it compares.
        mean: makes one teacher's logits of those of several.
        everywhere: true if all tokens count that any loss counts.
    """

    compare: Compare
    counted: Tensor
    factor: Tensor
    sources: tuple[str, ...] = ("teacher",)
    mean: Callable[[Sequence[Tensor]], Tensor] | None = None
    everywhere: bool = False

    def heard(self, given: Mapping[str, Any], index: Tensor | slice) -> Any:
        """Return what it compares with, of some tokens of a chunk."""
        found = [given[name][index] for name in self.sources]
        return found[0] if self.mean is None else self.mean(found)


def tokens_at_once(model: Any) -> int:
    """Return the number of tokens in a chunk by default: as many as make :data:`AT_ONCE` logits, 16 at least."""
    # Of a weight that is in parts (ZeRO-3) this process may have none.
    entries = getattr(model.get_output_embeddings(), "out_features", AT_ONCE)
    return max(AT_ONCE // entries, 16)


def chunked_losses(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    hard_factor: Tensor | None,
    given: Mapping[str, Given],
    parts: Sequence[TokenLoss],
    chunk: int = 128,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the weighted total of all losses, and the sum of each.

    Args:
        hidden: ``(N, H)``: the student's states before the output layer.
        head: the student's output layer.
        targets: ``(N,)``: the token that each state predicts; −100 for none.
        hard_factor: the factor of the sum of cross-entropies in the total, 0-dimensional; ``None`` leaves them out.
        given: what is known of each teacher's logits, by its name.
        parts: the divergences.
        chunk: the number of tokens in a chunk.
        weights: ``(N,)``: the weights of the tokens in all sums; ``None`` for equal ones.

    Returns:
        The total, a scalar with gradients to ``hidden`` and ``head``; and the sums over tokens without gradients: first that of
        the cross-entropy (0 where it is left out), then that of each divergence.
    """
    tensors = (hidden, head.weight, head.bias, head.transform)
    total, sums = _Chunked.apply(*tensors, targets, hard_factor, given, tuple(parts), chunk, weights)
    return total, sums


def _values(
    logits: Tensor,
    given: Mapping[str, Any],
    targets: Tensor,
    index: Tensor,
    hard: bool,
    parts: Sequence[TokenLoss],
    weights: Tensor | None,
) -> Tensor:
    """Return the losses of a chunk: the sum of cross-entropies, 0 where it is left out, and that of each divergence."""

    def summed(losses: Tensor, mine: Tensor | slice) -> Tensor:
        return (losses if weights is None else losses * weights[index][mine]).sum()

    found = [logits.new_zeros(())]
    if hard:
        losses = F.cross_entropy(logits, targets[index], ignore_index=IGNORED, reduction="none")
        found = [summed(losses, slice(None))]
    for part in parts:
        mine = slice(None) if part.everywhere else part.counted[index]
        found.append(summed(part.compare(logits[mine], part.heard(given, mine), targets[index][mine]), mine))
    return torch.stack([value.to(torch.float32) for value in found])


class _Chunked(torch.autograd.Function):
    """The losses with gradients that are computed in the forward pass, while each chunk's logits exist."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transform: LogitTransform,
        targets: Tensor,
        hard_factor: Tensor | None,
        given: Mapping[str, Given],
        parts: tuple[TokenLoss, ...],
        chunk: int,
        weights: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        needs = hidden.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if needs else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs and weight.requires_grad else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs and bias is not None else None
        sums = torch.zeros(1 + len(parts), dtype=torch.float64, device=hidden.device)
        first = torch.zeros(()) if hard_factor is None else hard_factor
        factors = torch.stack([first.to(hidden.device), *(part.factor.to(hidden.device) for part in parts)])
        counted = (targets != IGNORED) & (hard_factor is not None)
        for part in parts:
            counted = counted | part.counted
        wanted = counted.nonzero().flatten()
        # Asked once, so that no chunk waits for the device.
        parts = tuple(part._replace(everywhere=bool((part.counted == counted).all())) for part in parts)
        head = Head(weight, bias).to(hidden.dtype)
        given = {name: one.ready() for name, one in given.items()}
        for index in wanted.split(chunk):
            states = hidden[index]
            logits = head(states)
            theirs = {name: one.of(index) for name, one in given.items()}
            with torch.enable_grad():
                # Float32 under any autocast: small gradients would underflow before the loss scaler's factor is applied.
                leaf = logits.detach().float().requires_grad_()
                stacked = _values(transform(leaf), theirs, targets, index, hard_factor is not None, parts, weights)
                if needs:
                    (grad_logits,) = torch.autograd.grad((stacked * factors.to(stacked.dtype)).sum(), leaf)
            sums += stacked.detach().double()
            if grad_hidden is not None:  # in the model's precision: its weight is never copied
                grad_hidden[index] = (grad_logits.to(head.weight.dtype) @ head.weight).float()
            if grad_weight is not None:
                grad_weight.addmm_(grad_logits.t(), states.float())
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
        ctx.mark_non_differentiable(sums)
        return (sums * factors.double()).sum().float(), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> Any:
        grads = [
            None if grad is None else (grad * grad_total.float()).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*grads, *[None] * 7)
