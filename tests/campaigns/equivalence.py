"""What must change nothing, for every recipe of every host: terms that weigh nothing, how a batch is cut, padding, a stop."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from campaigns.recipes import (
    detectors,
    grafted,
    in_torch,
    recipes,
    segmentors,
    task_loss,
    texts,
    total_loss,
    weightless,
)
from campaigns.resumed import resumed_in_det, resumed_in_nlp, resumed_in_seg, resumed_in_torch
from campaigns.runner import Campaign, Case, Listed
from support import plain
from support.tensors import assert_same, gradients


def without_bias(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str, beside: float = 0.0, worst: float = 2e-3
) -> None:
    """Residuals are rounding: each is small, and their mean is 0 within its error, so that none is bias.

    Args:
        found, expected: tensors by name; one that is missing is 0.
        what: for messages.
        beside: the size of gradients to which these were added, which are rounded with them.
        worst: what a residual may be, of the largest entry.
    """
    sizes = [float(value.abs().max()) for name, value in expected.items() if name != "loss"]
    largest = max([beside, *sizes])
    for name in found.keys() | expected.keys():
        one, other = (side.get(name, torch.zeros(())).double() for side in (found, expected))
        # Of parameters whose gradient is 0 in arithmetic, such as the bias of keys, there is rounding alone.
        scale = max(float(other.abs().max()), 0.01 * largest if name != "loss" else 0.0) or 1.0
        residual = (one - other).flatten() / scale
        found_worst = float(residual.abs().max())
        assert found_worst < worst, f"{what}: {name} differs by {found_worst:.2g} of its largest entry"
        if found_worst > 1e-6 and len(residual) > 30:
            error = float(residual.std()) / math.sqrt(len(residual))
            # Rounding of sums of sums is not independent from entry to entry: ten standard errors.
            assert abs(float(residual.mean())) < 10 * error, f"{what}: {name} is biased by {float(residual.mean()):.2g}"


# --- plain PyTorch


def plain_nothing(recipe: str) -> None:
    """Terms of weight 0: weights, loss and gradients of the student are those of the student alone."""
    distiller, images, labels = in_torch(recipe, nothing=True)
    torch.manual_seed(1)
    torch.rand(8, 3, 8, 8)
    alone = (plain.generator if labels.is_floating_point() else plain.model)(4)
    assert_same(distiller.student.state_dict(), alone.state_dict())
    total_loss(distiller, images, labels).backward()
    task_loss(alone(images), labels).backward()
    assert_same(gradients(distiller.student), gradients(alone))


def plain_parts(recipe: str) -> None:
    """One batch of 8 is 2 parts of 4 and 8 of 1, for terms that are a mean over samples."""
    found = {}
    for size in (8, 4, 1):
        distiller, images, labels = in_torch(recipe)
        if any(
            {"samples", "batch"} & set(term.needs) or not _mean_over_samples(term) for term in distiller.terms.values()
        ):
            return
        for start in range(0, 8, size):
            with distiller.part(size / 8, last=start + size == 8):
                out = distiller(images[start : start + size], targets=labels[start : start + size])
                out.loss.backward()
        found[size] = gradients(distiller)
    for size in (4, 1):
        without_bias(found[size], found[8], f"8 as parts of {size}")


RELATING = (
    *(
        "PearsonImitation",
        "DIST",
        "CRD",
        "RKD",
        "PKT",
        "SimilarityPreserving",
        "CorrelationCongruence",
        "SampleEmbeddings",
    ),
    *(
        "Review",
        "BYOT",
        "ONE",
        "FactorTransfer",
        "MasKD",
        "FreeKD",
        "AdversarialScores",
        "AdversarialImages",
        "CWTM",
        "DKPP",
    ),
    *("BoundarySamples", "GradientTransfer", "MaskedGeneration"),
)
"""Terms that relate samples, draw for a batch, or normalise over it: not the mean of their parts."""
OTHER_TEXTS = ("GOLD", "MiniLLM")
"""Terms for two tokenizers, and for texts that the student writes."""


def _mean_over_samples(term: Any) -> bool:
    return type(term).__name__ not in RELATING and not term.alone


# --- Hugging Face


def nlp_nothing(recipe: str) -> None:
    from support.nlp_methods import batch, model

    name, terms = texts(recipe)
    built, given, alone = grafted(name, weightless(terms)), batch(name), model(name, 16, 1).train()
    torch.manual_seed(0)
    built(**given).loss.backward()
    torch.manual_seed(0)
    alone(**given).loss.backward()
    expected = gradients(alone)
    assert_same({key: value for key, value in gradients(built).items() if key in expected}, expected)


def nlp_padding(recipe: str) -> None:
    """Six more columns of padding, of any tokens, change neither loss nor gradient."""
    from support import nlp

    name, terms = texts(recipe)
    if name not in nlp.TASKS:
        return
    samples, found = nlp.samples(6, nlp.TASKS[name][1]), []
    for extra in (0, 6):
        given = nlp.collate(samples, extra)
        if extra:
            padding = given["attention_mask"] == 0
            given["input_ids"] = given["input_ids"].masked_fill(padding, 7)
        torch.manual_seed(0)
        built = grafted(name, terms)
        loss = nlp.loss_of(built, given)
        if loss.requires_grad:
            loss.backward()
        found.append({"loss": loss.detach()[None], **gradients(built)})
    without_bias(found[1], found[0], "padding")


def nlp_accumulation(recipe: str) -> None:
    """One batch of 8 is 8 accumulated ones of 1 and 4 of 2: what distilling adds to the host's gradient."""
    from support import nlp_ranks

    name, terms = texts(recipe)
    if name not in ("bert", "llama") or any(term["type"] in (*RELATING, *OTHER_TEXTS) for term in terms):
        return
    found, beside = {}, 0.0
    with tempfile.TemporaryDirectory() as folder:
        for batch, accumulation in ((8, 1), (2, 4), (1, 8)):
            whole = nlp_ranks.gradients(name, Path(folder), terms, batch, accumulation)
            host = nlp_ranks.gradients(name, Path(folder), [], batch, accumulation).found
            share = math.prod(term.host_share for term in whole.distiller.terms.values())
            found[batch] = {key: value - share * host.get(key, 0) for key, value in whole.found.items()}
            beside = max(beside, *(float(value.abs().max()) for value in host.values()))
    for batch in (2, 1):
        without_bias(found[batch], found[8], f"8 samples as batches of {batch}", beside)


# --- MMDetection and MMSegmentation


def _host_losses(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach() for key, value in found.items() if not key.startswith("distill.")}


def det_nothing(recipe: str) -> None:
    from support.det import losses, raw_batch

    _same_host(*detectors(recipe, nothing=True), lambda one: losses(one, raw_batch()))


def seg_nothing(recipe: str) -> None:
    from support.seg import batch, losses_of

    _same_host(*segmentors(recipe, nothing=True), lambda one: losses_of(one, *batch()))


def _same_host(built: Any, alone: Any, losses: Callable[[Any], Mapping[str, Tensor]]) -> None:
    """The same initial weights, host losses and gradients, bit for bit."""
    expected = alone.state_dict()
    assert_same(built.state_dict(), expected)
    results = []
    for one in (built, alone):
        torch.manual_seed(0)
        found = losses(one)
        host = {key: value for key, value in found.items() if not key.startswith("distill.")}
        torch.stack([value for key, value in host.items() if "loss" in key]).sum().backward()
        results.append(
            (_host_losses(host), {k: v for k, v in gradients(one).items() if not k.startswith("distiller.")})
        )
    for mine, theirs in zip(*results, strict=True):
        assert_same(mine, theirs)


CHECKS: dict[str, dict[str, Callable[[str], None]]] = {
    "torch": {"weighs nothing": plain_nothing, "in parts": plain_parts, "resumed": resumed_in_torch},
    "nlp": {
        "weighs nothing": nlp_nothing,
        "padded": nlp_padding,
        "accumulated": nlp_accumulation,
        "resumed": resumed_in_nlp,
    },
    "det": {"weighs nothing": det_nothing, "resumed": resumed_in_det},
    "seg": {"weighs nothing": seg_nothing, "resumed": resumed_in_seg},
}


def cases() -> list[Case]:
    """Every check of every recipe; some in plain PyTorch come first."""
    found = [
        dict(host=host, check=one, recipe=name) for host in CHECKS for one in CHECKS[host] for name in recipes(host)
    ]
    first = [case for place, case in enumerate(found) if case["host"] == "torch" and place % 11 == 0]
    return [*first, *(case for case in found if case not in first)]


def check(case: Case) -> None:
    CHECKS[case["host"]][case["check"]](case["recipe"])


EQUIVALENCE = Campaign(
    "equivalence",
    "every recipe of every host: with weight 0 it is the host bit for bit, a batch in parts is the whole batch, padding changes "
    "nothing, a resumed run ends like one that never stopped; residuals without bias",
    Listed(cases),
    check,
    count=360,
    sample=6,
    block=10,
    seconds=120,
    host="mmdet",
)
