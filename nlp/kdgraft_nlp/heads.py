"""What a causal model makes of its states: found by trying, because a config alone does not tell which of its figures are used."""

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
"""Figures of configs that logits are multiplied or divided by (Cohere; Granite, HyperCLOVA X; Falcon-H1; Muse)."""
CAPS = ("final_logit_softcapping", "logits_soft_cap")
"""Figures of configs that logits are capped by (Gemma 2 and others; RecurrentGemma)."""
ROUTERS = ("router_aux_loss_coef", "aux_loss_coef")
"""Figures of models or configs that the loss of the routers of a mixture of experts is multiplied by."""


def check_heads(model: Any, inputs: Mapping[str, Any]) -> LogitTransform:
    """What a causal model makes of its output layer's logits.

    The model runs with logits of every size put in place of those of its output layer, so that a cap is seen before training
    reaches it, and a student with the right tokens' logits far above the others, so that whatever is added to the cross-entropy
    is seen, however little it is.

    Args:
        model: the student, grafted, or the teacher.
        inputs: one small batch.

    Raises:
        WiringError: it cannot give states without logits, changes its states or logits in a way that is not known, or adds something
            to the cross-entropy of the next token other than the loss of its routers.
    """
    name = type(model).__name__
    if "logits_to_keep" not in accepted(model):
        raise WiringError(f"chunked=True needs a causal model that takes logits_to_keep, which {name} does not")
    head_of(model)
    run = getattr(model, STUDENT_FORWARD, model)
    with torch.no_grad(), eval_mode(model), _replaced_logits(model, _wide) as trial:
        logits = run(**inputs)["logits"]
        kept = run(**inputs, logits_to_keep=torch.zeros(0, dtype=torch.long, device=logits.device))
    if not trial.goes_straight():
        raise WiringError(
            f"chunked=True: {name} changes its states before the output layer, or does not run its base model and output layer as "
            "modules; leave chunked out"
        )
    transform = _find_transform(model, trial.given[0], logits)
    if transform is None:
        raise WiringError(
            f"chunked=True: {name} changes its logits after the output layer in a way that is not known here; leave chunked out"
        )
    if hasattr(model, STUDENT_FORWARD):
        _check_loss(model, inputs, transform, router_loss(model, kept))
    return transform


def router_loss(model: Any, output: Any) -> Tensor | None:
    """What a mixture of experts adds to its loss for its routers; ``None`` for other models and with that switched off."""
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
            f"chunked=True computes the cross-entropy of the next token and the loss of routers, and {type(model).__name__} adds "
            "something of its own to it; leave chunked out"
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


def _wide(plain: Tensor) -> Tensor:
    """Logits of the same shape, from a thousandth to a thousand at every position, of both signs."""
    count = plain.shape[-1]
    sizes = torch.logspace(-3, 3, count, device=plain.device)
    signs = 1 - 2 * (torch.arange(count, device=plain.device) % 2)
    return (sizes * signs).to(plain.dtype).expand_as(plain).contiguous()


class _Trial:
    """What a model's output layer was given, and what was put in place of its logits."""

    def __init__(self) -> None:
        self.states: list[Tensor] = []
        self.inputs: list[Tensor] = []
        self.given: list[Tensor] = []

    def goes_straight(self) -> bool:
        """Whether the output layer is given the states as they are, and they do not depend on which logits are kept."""
        if not self.inputs or len(self.states) != 2:
            return False
        first, second = self.states
        return all(
            one.shape == other.shape and torch.allclose(one.float(), other.float(), rtol=1e-5, atol=1e-6)
            for one, other in ((self.inputs[0], first), (first, second))
        )


@contextmanager
def _replaced_logits(model: Any, make: Any) -> Iterator[_Trial]:
    """While the body runs the model, its output layer gives what ``make`` makes of its logits."""
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
