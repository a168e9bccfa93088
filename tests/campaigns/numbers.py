"""Extreme tensors in every term: what is added to the loss is finite, and so is its gradient, or the term is dropped and counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from campaigns.runner import Campaign, Case, Drawn, Listed
from kdgraft import TERMS, Reader
from kdgraft.errors import FLOAT32_MAX
from support.methods import split
from support.plain import Method, method

CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    **{f"times {size:g}": lambda x, size=size: x * size for size in (0, 1e-38, 1e-20, 1e4, 1e10, 1e18, 1e19, 1e30)},
    "plus 1e6": lambda x: x + 1e6,
    "plus 1e18": lambda x: x + 1e18,
    "one value": lambda x: torch.full_like(x, 2.0),
    "rows alike": lambda x: x[:1].expand_as(x),
    "channels alike": lambda x: x[:, :1].expand_as(x) if x.ndim > 1 else x,
    "one is 3e38": lambda x: _one(x, 3e38),
    "one is infinite": lambda x: _one(x, math.inf),
    "one is not a number": lambda x: _one(x, math.nan),
    "infinite": lambda x: torch.full_like(x, -math.inf),
    "not numbers": lambda x: torch.full_like(x, math.nan),
}
"""Changes of tensors, from the least."""
MILD = ("times 0", "times 1e-38", "times 1e-20", "times 1e+04")
"""Changes by which no student overflows that ran well, and outputs still depend on inputs."""
PRECISIONS = ("float32", "bfloat16 autocast", "float16 autocast", "bfloat16", "float16", "float64")


def _one(tensor: Tensor, value: float) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[len(changed.view(-1)) // 2] = value
    return changed


def changeable(layer: nn.Module, *, leaf: bool) -> None:
    """Let a layer's output be changed by ``layer.told``.

    Args:
        layer: the layer, whose class becomes a subclass of its own.
        leaf: the changed output is a parameter ``layer.held``, so that its gradient is that of the term and of nothing before it.
    """
    kind = type(layer)

    def forward(self: Any, x: Tensor) -> Tensor:
        output = kind.forward(self, x)
        told = vars(self).get("told")
        if told is None:
            return output
        if not leaf:
            return told(output)
        self.held = nn.Parameter(told(output.detach()))
        return self.held * 1

    layer.__class__ = type(kind.__name__, (kind,), {"forward": forward})


def strategy() -> st.SearchStrategy[Case]:
    return st.fixed_dictionaries(
        {
            "term": st.sampled_from(split(TERMS, Reader)[0]),
            "student": st.sampled_from(["as it is", *CHANGES]),
            "teacher": st.sampled_from(["as it is", *CHANGES]),
            "layer": st.sampled_from(["conv", "last", "every"]),
            "precision": st.sampled_from(PRECISIONS),
            "images": st.sampled_from([4, 1]),
        }
    )


def check(case: Case) -> None:
    """A few steps of one term on changed tensors; a gradient that float32 cannot hold is right to be infinite."""
    try:
        run(case)
    except AssertionError as error:
        exact = {**case, "precision": "float64"}
        if "gradient" not in str(error) or _largest(run(exact)) < FLOAT32_MAX:
            raise


def _largest(parameters: Mapping[str, nn.Parameter]) -> float:
    return max(float(p.grad.abs().max()) for p in parameters.values() if p.grad is not None and p.grad.numel())


def run(case: Case) -> dict[str, nn.Parameter]:
    """Take the steps and return the parameters with their last gradients."""
    dtype = getattr(torch, case["precision"].partition(" ")[0])
    autocast = case["precision"].endswith("autocast")
    kind = TERMS.get(case["term"])
    leaf = not (kind.takes_gradients or kind.runs_again)
    if not leaf and not {case["student"], case["teacher"]} <= {"as it is", *MILD}:
        return {}  # these need a gradient through the whole model, which overflows by itself
    built = method(case["term"], lambda model: [changeable(layer, leaf=leaf) for layer in _layers(model, "every")])
    if not autocast:
        built = Method(built.distiller.to(dtype), *(x.to(dtype) if x.is_floating_point() else x for x in built[1:]))
    built = Method(built.distiller, *(x[: case["images"]] for x in built[1:]))
    for owner, model in _models(built).items():
        for layer in _layers(model, case["layer"]):
            change = CHANGES.get(case[owner])
            if case["term"] == "WeightMatching" and change is not None:  # which reads weights
                for parameter in layer.parameters():
                    parameter.data = change(parameter.data).contiguous()
            else:
                layer.told = change
    for _ in range(3):  # some terms train a network of their own first
        built.distiller.zero_grad()
        with torch.autocast("cpu", dtype, enabled=autocast):
            losses = built.losses()
        parameters = dict(built.distiller.named_parameters())
        # In float16 gradients overflow by design: the gradient scaler then leaves the step out.
        check_step(case["term"], losses, {} if dtype is torch.float16 else parameters)
    return parameters


def _models(built: Method) -> Mapping[str, nn.Module]:
    teachers = {name: getattr(source, "model", None) for name, source in built.distiller.sources.items()}
    found = {"student": built.distiller.student, **teachers}
    return {name: model for name, model in found.items() if isinstance(model, nn.Module)}


def _layers(model: nn.Module, which: str) -> list[nn.Module]:
    """The layers with parameters: the one that terms tap, the last one, or every one."""
    found = {name: layer for name, layer in model.named_children() if [*layer.parameters()]}
    return [*found.values()] if which == "every" else [[*found.values()][-1] if which == "last" else found["conv"]]


def check_step(term: str, losses: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """The losses and their gradients are finite; a term that was dropped was counted, and adds 0."""
    added = {name: value for name, value in losses.items() if name.endswith(".loss")}
    for name, value in added.items():
        assert value.isfinite().all(), f"loss of {term}: {name} is {value.detach()}"
        dropped = losses.get(name.removesuffix("loss") + "dropped", torch.zeros(()))
        assert not dropped or dropped >= 1
    total = torch.stack([value.float().sum() for value in added.values()]).sum()
    if total.requires_grad:
        total.backward()
    for name, parameter in parameters.items():
        grad = parameter.grad
        assert grad is None or grad.isfinite().all(), (
            f"gradient of {term}: not finite at {name}, with the losses {added}"
        )


def critics() -> list[Case]:
    kinds = [("AdversarialScores", {"kind": kind}) for kind in ("ac", "lsgan", "hinge")]
    kinds += [("AdversarialImages", {"layers": 1, "lr": 2e-4, "kind": kind}) for kind in ("lsgan", "hinge")]
    cases = [dict(term=term, settings=settings, steps=10_000) for term, settings in kinds]
    return [{**case, "steps": 50} for case in cases] + cases


def check_critic(case: Case) -> None:
    """A student and its critic train against each other on new images in every step."""
    built = method(case["term"], **case["settings"])
    trained = [p for p in built.distiller.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-3)
    for step in range(case["steps"]):
        losses = Method(built.distiller, torch.rand_like(built.images), built.labels).losses()
        loss = losses["distill.term.loss"]
        skipped = {"distill.term.dropped", "distill.term.skipped"} & set(losses)
        assert loss.isfinite() and not skipped, f"loss of {case['term']}: {loss.detach()} {skipped} in step {step}"
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    networks = [one.network for term in built.distiller.terms.values() for one in term.auxiliaries.values()]
    for parameter in [*trained, *(p for network in networks for p in network.parameters())]:
        assert parameter.isfinite().all(), f"weights of {case['term']}: not finite after {case['steps']} steps"


NUMBERS = Campaign(
    "numbers",
    "terms of plain PyTorch on extreme tensors in six precisions: loss and gradient are finite, or the term is dropped and counted",
    Drawn(strategy),
    check,
    count=6000,
    sample=60,
    block=500,
)
CRITICS = Campaign(
    "critics",
    "critics beside a student for 10 000 steps: no loss and no weight that is not finite, no step left out",
    Listed(critics),
    check_critic,
    count=10,
    sample=2,
    seconds=600,
)
