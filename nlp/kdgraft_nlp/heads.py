"""The transform from states to logits of a causal model, found by running it: a config does not show the settings in use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdgraft.errors import WiringError
from kdgraft.isolation import eval_mode

from .attention import STUDENT_FORWARD
from .chunked import LogitTransform, head_of
from .tasks import accepted

SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
"""Settings of configs that multiply or divide logits (Cohere; Granite, HyperCLOVA X; Falcon-H1; Muse)."""
CAPS = ("final_logit_softcapping", "logits_soft_cap")
"""Settings of configs that cap logits (Gemma 2 and others; RecurrentGemma)."""
ROUTERS = ("router_aux_loss_coef", "aux_loss_coef")
"""Settings of models or configs that multiply the loss of the routers of a mixture of experts."""


def check_heads(model: Any, inputs: Mapping[str, Any]) -> LogitTransform:
    """Return the transform of logits that a causal model applies after its output layer.

    The model runs with logits of every magnitude in place of its output layer's, which shows a cap before training reaches it. A
    student also runs with the correct tokens' logits far above the others, which shows any addition to the cross-entropy.

    Args:
        model: the student, grafted, or the teacher.
        inputs: one small batch.

    Raises:
        WiringError: the model cannot return states without logits, changes its states or logits in an unknown way, or adds
            something other than the loss of its routers to the cross-entropy of the next token.
    """
    name = type(model).__name__
    if "logits_to_keep" not in accepted(model):
        raise WiringError(f"chunked=True needs a causal model with logits_to_keep, which {name} lacks; leave it out")
    head_of(model)
    run = getattr(model, STUDENT_FORWARD, model)
    with torch.no_grad(), eval_mode(model), _replaced_logits(model, _wide) as trial:
        logits = run(**inputs)["logits"]
        kept = run(**inputs, logits_to_keep=torch.zeros(0, dtype=torch.long, device=logits.device))
    if not trial.goes_straight():
        raise WiringError(
            f"chunked=True: {name} changes its states before the output layer, or bypasses its modules; leave out chunked"
        )
    transform = _find_transform(model, trial.given[0], logits)
    if transform is None:
        raise WiringError(
            f"chunked=True: {name} changes its logits after the output layer in an unknown way; leave out chunked"
        )
    if hasattr(model, STUDENT_FORWARD):
        _check_loss(model, inputs, transform, router_loss(model, kept))
    return transform


def router_loss(model: Any, output: Any) -> Tensor | None:
    """Return what a mixture of experts adds to its loss for its routers; ``None`` for other models, or where it is disabled."""
    aux = output.get("aux_loss")
    if not isinstance(aux, Tensor):
        return None
    holders = (model, model.config, model.config.get_text_config(decoder=True))
    factors = (getattr(holder, name, None) for holder in holders for name in ROUTERS)
    factor = next((factor for factor in factors if factor is not None), None)
    return None if factor is None else aux * factor


def _check_loss(model: Any, inputs: Mapping[str, Any], transform: LogitTransform, router: Tensor | None) -> None:
    labels = inputs["input_ids"]

    def right(plain: Tensor) -> Tensor:
        following = labels.roll(-1, 1).to(plain.device)
        return 1e3 * F.one_hot(following, plain.shape[-1]).to(plain.dtype)

    with torch.no_grad(), eval_mode(model), _replaced_logits(model, right) as trial:
        own = model.plain_forward(**inputs, labels=labels)["loss"].double()
    logits = transform(trial.given[0].float())
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).double()
    if router is not None:
        expected = expected + router.double()
    if not torch.allclose(own, expected, rtol=1e-4, atol=1e-9):
        raise WiringError(
            f"chunked=True supports cross-entropy and router losses, and {type(model).__name__} adds another loss; leave out chunked"
        )


def _find_transform(model: Any, given: Tensor, logits: Tensor) -> LogitTransform | None:
    text = model.config.get_text_config(decoder=True)
    scales, caps = ([float(v) for n in names if (v := getattr(text, n, None))] for names in (SCALES, CAPS))
    close = 4 * torch.finfo(logits.dtype).eps
    for cap, scale in product([*caps, None], [*scales, *(1 / value for value in scales), 1.0]):
        transform = LogitTransform(scale, cap)
        expected = transform(given.float())
        if expected.shape == logits.shape and torch.allclose(expected, logits.float(), rtol=close, atol=close * 1e-3):
            return transform
    return None


def transform_of(model: Any, states: Tensor, logits: Tensor) -> LogitTransform:
    """Return the transform of logits that a language model applies after its output layer, from one pass.

    Args:
        model: the model.
        states: the input of its output layer.
        logits: the logits that it returns.

    Raises:
        WiringError: the output layer is not linear, or the model changes its logits in an unknown way.
    """
    with torch.no_grad():
        found = _find_transform(model, head_of(model)(states), logits)
    if found is None:
        raise WiringError(f"{type(model).__name__} changes its logits after the output layer in an unknown way")
    return found


def _wide(plain: Tensor) -> Tensor:
    """Return logits of the same shape, of magnitudes 0.001 to 1000 and both signs at every position."""
    count = plain.shape[-1]
    sizes = torch.logspace(-3, 3, count, device=plain.device)
    signs = 1 - 2 * (torch.arange(count, device=plain.device) % 2)
    return (sizes * signs).to(plain.dtype).expand_as(plain).contiguous()


class _Trial:
    """The inputs of a model's output layer, and the logits that replaced its output."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []
        self.inputs: list[Tensor] = []
        self.given: list[Tensor] = []

    def goes_straight(self) -> bool:
        """Return whether the output layer gets the states unchanged, and they do not depend on the logits to keep."""
        if not self.inputs or len(self.states) != 2:
            return False
        first, second = self.states
        return all(
            one.shape == other.shape and torch.allclose(one.float(), other.float(), rtol=1e-5, atol=1e-6)
            for one, other in ((self.inputs[0], first), (first, second))
        )


@contextmanager
def _replaced_logits(model: Any, make: Any) -> Iterator[_Trial]:
    """Replace the output layer's logits by ``make(logits)`` while the body runs the model."""
    trial = _Trial()

    def instead(_: Any, args: tuple[Any, ...], plain: Tensor) -> Tensor:
        trial.inputs.append(args[0])
        trial.given.append(make(plain) if plain.numel() else plain)
        return trial.given[-1]

    hooks = [
        model.base_model.register_forward_hook(lambda _, args, output: trial.states.append(output[0])),
        model.get_output_embeddings().register_forward_hook(instead),
    ]
    try:
        yield trial
    finally:
        for hook in hooks:
            hook.remove()
