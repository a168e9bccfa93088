"""The recipes of every host, built with small models, for checks that each of them has to pass."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdgraft import RECIPES, TERMS, Distiller, Itself, TapTerm
from kdgraft.hosts import hosts
from kdgraft.registry import Registry, expand_recipe
from support import methods, plain

Terms = list[dict[str, Any]]
SHARING = ("TaskShare",)
LACKING = {
    "det": ("dml", "kddetr"),
    "seg": ("dml",),
    "nlp": ("dml",),
    "torch": ("dml",),
}
"""Recipes of peers, and those that need a model of their own."""


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


def terms_of(host: str, recipe: str, settings: Mapping[str, dict[str, Any]], place: str) -> Terms:
    """A recipe's terms with the settings that small models need, and a tap for those that need one."""
    found = []
    for number, entry in enumerate(expand_recipe(recipe, hosts()[host].recipes or RECIPES)):
        entry = {"type": entry} if isinstance(entry, str) else dict(entry)
        kind = (hosts()[host].terms or TERMS).get(entry["type"])
        tapped = issubclass(kind, TapTerm) and not {"tap", "student_tap"} & set(entry)
        own = {**methods.SETTINGS.get(entry["type"], {}), **settings.get(entry["type"], {})}
        for key in {"tap", "student_tap", "teacher_tap"} & set(entry):
            if host == "torch" and "model." in str(entry[key]):  # the layers of the networks that the authors used
                entry[key] = [place]
        found.append({"name": f"term{number}", **({"tap": place} if tapped else {}), **entry, **own})
    return found


def weightless(terms: Terms) -> Terms:
    """Terms that weigh nothing, without those that only take a share of the host's loss."""
    return [{**term, "weight": 0.0} for term in terms if term["type"] not in SHARING]


# --- plain PyTorch


def in_torch(recipe: str, nothing: bool = False) -> tuple[Distiller, Tensor, Tensor]:
    """A distiller, images and labels; with ``nothing``, terms that weigh nothing."""
    torch.manual_seed(1)
    images, labels = torch.rand(8, 3, 8, 8), torch.arange(8) % 5
    terms = terms_of("torch", recipe, plain.SETTINGS, "conv")
    terms = weightless(terms) if nothing else terms
    generating = any("generators" in TERMS.get(term["type"]).needs for term in terms)
    build = plain.generator if generating else plain.model
    student, teacher = build(4), build(8)
    if generating:
        labels = torch.rand(8, 3, 8, 8)
    source = Itself() if any(term["type"] in methods.OF_ITSELF for term in terms) else teacher
    return Distiller(student, source, terms, example=images), images, labels


def task_loss(output: Tensor, labels: Tensor) -> Tensor:
    """The loss of classes, or of the images that a generator is to return."""
    return (
        nn.functional.mse_loss(output, labels)
        if labels.is_floating_point()
        else nn.functional.cross_entropy(output, labels)
    )


def total_loss(distiller: Distiller, images: Tensor, labels: Tensor) -> Tensor:
    """The loss of a step: the task's and the distiller's."""
    out = distiller(images, targets=labels)
    return out.total(task_loss(out.student, labels))


# --- Hugging Face


def _family(terms: Terms) -> str:
    from support.nlp_methods import family

    families = [family(term["type"]) for term in terms]
    return next((name for name in families if name != "bert"), "bert")


def texts(recipe: str) -> tuple[str, Terms]:
    """The name of the model that a recipe of Hugging Face is for, and its terms."""
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


def grafted(name: str, terms: Terms) -> Any:
    """A student of this name, with a teacher and the terms."""
    from kdgraft_nlp.student import graft
    from support.nlp_methods import FACTS, model

    itself = any(term["type"] in methods.OF_ITSELF for term in terms)
    return graft(model(name, 16, 1).train(), Itself() if itself else model(name, 32, 2), terms, facts=FACTS)


# --- MMDetection and MMSegmentation


@cache
def _teacher(kind: str) -> str:
    from support.det import save_teacher
    from support.det_methods import model

    return save_teacher(Path(tempfile.mkdtemp()) / "teacher.pth", model(kind, width=6, channels=12))


def detectors(recipe: str, nothing: bool = False) -> tuple[Any, Any]:
    """A distilled detector and its student without the distiller."""
    from support.det import build, distilled
    from support.det_methods import MODELS, SETTINGS, model

    terms = terms_of("det", recipe, SETTINGS, "neck[*]")
    softmax = "DIST" if any(term.get("standardize") for term in terms) else "GFL"  # classes that depend on each other
    kind = next((term["type"] for term in terms if term["type"] in MODELS), softmax)
    student, teacher = model(kind), model(kind, width=6, channels=12)
    terms = weightless(terms) if nothing else terms
    return build(distilled(student, teacher, _teacher(kind), terms=terms)), build(student)


def segmentors(recipe: str, nothing: bool = False) -> tuple[Any, Any]:
    """A distilled segmentor and its student without the distiller."""
    from support.seg import build, distilled, save_teacher, segmentor
    from support.seg_methods import SETTINGS

    teacher = save_teacher(Path(tempfile.mkdtemp()) / "teacher.pth")
    terms = terms_of("seg", recipe, SETTINGS, "backbone[2]")
    student = segmentor(dropout=0.0)
    return build(distilled(student, teacher, terms=weightless(terms) if nothing else terms)), build(student)
