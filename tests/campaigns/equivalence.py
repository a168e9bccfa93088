"""What must change nothing, for every recipe of every host: terms that weigh nothing, how a batch is cut, padding, a stop."""

from __future__ import annotations

import io
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from campaigns.runner import Campaign, Case, Listed
from kdgraft import RECIPES, TERMS, Distiller, Itself, TapTerm
from kdgraft.hosts import hosts
from kdgraft.registry import Registry, expand_recipe
from support import methods, plain
from support.tensors import assert_same, gradients

Terms = list[dict[str, Any]]
SHARING = ("TaskShare",)
LACKING = {
    "det": ("dml", "kddetr"),
    "seg": ("dml",),
    "nlp": ("dml",),
    "torch": ("dml",),
}
"""Recipes of peers, and those that need a model of their own."""


def terms_of(host: str, recipe: str, settings: Mapping[str, dict[str, Any]], place: str) -> Terms:
    """A recipe's terms with the settings that small models need, and a tap for those that need one."""
    found = []
    for number, entry in enumerate(expand_recipe(recipe, hosts()[host].recipes or RECIPES)):
        entry = {"type": entry} if isinstance(entry, str) else dict(entry)
        kind = (hosts()[host].terms or TERMS).get(entry["type"])
        tapped = issubclass(kind, TapTerm) and not {"tap", "student_tap"} & set(entry)
        own = {**methods.SETTINGS.get(entry["type"], {}), **settings.get(entry["type"], {})}
        if host == "torch" and "model." in str(entry.get("tap")):  # the layers of the networks that the authors used
            entry["tap"] = [place]
        found.append({"name": f"term{number}", **({"tap": place} if tapped else {}), **entry, **own})
    return found


def weightless(terms: Terms) -> Terms:
    """Terms that weigh nothing, without those that only take a share of the host's loss."""
    return [{**term, "weight": 0.0} for term in terms if term["type"] not in SHARING]


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


def _plain(recipe: str, nothing: bool = False) -> tuple[Distiller, Tensor, Tensor]:
    torch.manual_seed(1)
    images, labels = torch.rand(8, 3, 8, 8), torch.arange(8) % 5
    terms = terms_of("torch", recipe, plain.SETTINGS, "conv")
    terms = weightless(terms) if nothing else terms
    kinds = [TERMS.get(term["type"]) for term in terms]
    student, teacher = plain.model(4), plain.model(8)
    if any("generators" in kind.needs for kind in kinds):
        student, teacher, labels = plain.generator(4), plain.generator(8), torch.rand(8, 3, 8, 8)
    source = Itself() if any(term["type"] in methods.OF_ITSELF for term in terms) else teacher
    return Distiller(student, source, terms, example=images), images, labels


def _task_loss(output: Tensor, labels: Tensor) -> Tensor:
    return (
        nn.functional.mse_loss(output, labels)
        if labels.is_floating_point()
        else nn.functional.cross_entropy(output, labels)
    )


def _step(distiller: Distiller, images: Tensor, labels: Tensor) -> Tensor:
    out = distiller(images, targets=labels)
    return out.total(_task_loss(out.student, labels))


def plain_nothing(recipe: str) -> None:
    """Terms of weight 0: weights, loss and gradients of the student are those of the student alone."""
    distiller, images, labels = _plain(recipe, nothing=True)
    torch.manual_seed(1)
    torch.rand(8, 3, 8, 8)
    alone = (plain.generator if labels.is_floating_point() else plain.model)(4)
    assert_same(distiller.student.state_dict(), alone.state_dict())
    _step(distiller, images, labels).backward()
    _task_loss(alone(images), labels).backward()
    assert_same(gradients(distiller.student), gradients(alone))


def plain_parts(recipe: str) -> None:
    """One batch of 8 is 2 parts of 4 and 8 of 1, for terms that are a mean over samples."""
    found = {}
    for size in (8, 4, 1):
        distiller, images, labels = _plain(recipe)
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


def plain_resume(recipe: str) -> None:
    """Four steps are two, a state written and read, and two."""
    ends = []
    for stop in (4, 2):
        distiller, images, labels = _plain(recipe)
        optimizer = torch.optim.Adam([p for p in distiller.parameters() if p.requires_grad], lr=1e-3)
        for step in range(4):
            if step == stop:
                saved = io.BytesIO()
                torch.save((distiller.state_dict(), optimizer.state_dict()), saved)
                saved.seek(0)
                state, own = torch.load(saved, weights_only=False)
                distiller, images, labels = _plain(recipe)
                distiller.load_state_dict(state)
                optimizer = torch.optim.Adam([p for p in distiller.parameters() if p.requires_grad], lr=1e-3)
                optimizer.load_state_dict(own)
            torch.manual_seed(step)
            optimizer.zero_grad()
            _step(distiller, images, labels).backward()
            optimizer.step()
        ends.append(distiller.student.state_dict())
    assert_same(*ends)


# --- Hugging Face


def _family(terms: Terms) -> str:
    from support.nlp_methods import family

    families = [family(term["type"]) for term in terms]
    return next((name for name in families if name != "bert"), "bert")


def _texts(recipe: str) -> tuple[str, Terms]:
    from support.nlp_methods import SETTINGS

    terms = terms_of("nlp", recipe, SETTINGS, "")
    name = _family(terms)
    places = {
        "resnet": "resnet.encoder.stages[1]",
        "bert": "bert.encoder[last_hidden_state]",
        "llama": "model.layers.1",
    }
    terms = [{**term, **({"tap": places[name]} if term.get("tap") == "" else {})} for term in terms]
    return name, terms


def _grafted(name: str, terms: Terms) -> Any:
    from kdgraft_nlp.student import graft
    from support.nlp_methods import FACTS, model

    itself = any(term["type"] in methods.OF_ITSELF for term in terms)
    return graft(model(name, 16, 1).train(), Itself() if itself else model(name, 32, 2), terms, facts=FACTS)


def nlp_nothing(recipe: str) -> None:
    from support.nlp_methods import batch, model

    name, terms = _texts(recipe)
    built, given, alone = _grafted(name, weightless(terms)), batch(name), model(name, 16, 1).train()
    torch.manual_seed(0)
    built(**given).loss.backward()
    torch.manual_seed(0)
    alone(**given).loss.backward()
    expected = gradients(alone)
    assert_same({key: value for key, value in gradients(built).items() if key in expected}, expected)


def nlp_padding(recipe: str) -> None:
    """Six more columns of padding, of any tokens, change neither loss nor gradient."""
    from support import nlp

    name, terms = _texts(recipe)
    if name not in nlp.TASKS:
        return
    samples, found = nlp.samples(6, nlp.TASKS[name][1]), []
    for extra in (0, 6):
        given = nlp.collate(samples, extra)
        if extra:
            padding = given["attention_mask"] == 0
            given["input_ids"] = given["input_ids"].masked_fill(padding, 7)
        torch.manual_seed(0)
        built = _grafted(name, terms)
        loss = nlp.loss_of(built, given)
        if loss.requires_grad:
            loss.backward()
        found.append({"loss": loss.detach()[None], **gradients(built)})
    without_bias(found[1], found[0], "padding")


def nlp_accumulation(recipe: str) -> None:
    """One batch of 8 is 8 accumulated ones of 1 and 4 of 2: what distilling adds to the host's gradient."""
    from support import nlp_ranks

    name, terms = _texts(recipe)
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


@cache
def _teacher(kind: str) -> str:
    from support.det import save_teacher
    from support.det_methods import model

    return save_teacher(Path(tempfile.mkdtemp()) / "teacher.pth", model(kind, width=6, channels=12))


def _host_losses(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach() for key, value in found.items() if not key.startswith("distill.")}


def det_nothing(recipe: str) -> None:
    from support.det import build, distilled, losses, raw_batch
    from support.det_methods import MODELS, SETTINGS, model

    terms = terms_of("det", recipe, SETTINGS, "neck[*]")
    softmax = "DIST" if any(term.get("standardize") for term in terms) else "GFL"  # classes that depend on each other
    kind = next((term["type"] for term in terms if term["type"] in MODELS), softmax)
    student = model(kind)
    teacher = model(kind, width=6, channels=12)
    built, alone = build(distilled(student, teacher, _teacher(kind), terms=weightless(terms))), build(student)
    _same_host(built, alone, lambda one: losses(one, raw_batch()))


def seg_nothing(recipe: str) -> None:
    from support.seg import batch, build, distilled, losses_of, save_teacher, segmentor
    from support.seg_methods import SETTINGS

    teacher = save_teacher(Path(tempfile.mkdtemp()) / "teacher.pth")
    terms = weightless(terms_of("seg", recipe, SETTINGS, "backbone[2]"))
    plain_model = segmentor(dropout=0.0)
    built, alone = build(distilled(plain_model, teacher, terms=terms)), build(plain_model)
    _same_host(built, alone, lambda one: losses_of(one, *batch()))


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
    "torch": {"weighs nothing": plain_nothing, "in parts": plain_parts, "resumed": plain_resume},
    "nlp": {"weighs nothing": nlp_nothing, "padded": nlp_padding, "accumulated": nlp_accumulation},
    "det": {"weighs nothing": det_nothing},
    "seg": {"weighs nothing": seg_nothing},
}


def recipes(host: str) -> Sequence[str]:
    """The recipes of a host whose terms it can use."""
    found = hosts()[host]
    registry = found.recipes or RECIPES
    terms: Registry = found.terms or TERMS
    usable = []
    for name in registry:
        kinds = [entry if isinstance(entry, str) else entry["type"] for entry in expand_recipe(name, registry)]
        needs = {need for kind in kinds for need in terms.get(kind).needs}
        if name not in LACKING[host] and not needs & set(found.lacks):
            usable.append(name)
    return sorted(usable)


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
    count=260,
    sample=6,
    block=10,
    seconds=120,
    host="mmdet",
)
