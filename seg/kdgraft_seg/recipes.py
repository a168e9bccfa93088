"""Recipes: lists of terms under one name. ``kdgraft list NAME`` prints one, to be edited in a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .registry import RECIPES


def _terms(terms: list[dict[str, Any]], schedule: Any) -> list[dict[str, Any]]:
    terms = [term for term in terms if term["weight"]]
    return terms if schedule is None else [{**term, "schedule": schedule} for term in terms]


@RECIPES.register
def skd(
    pixel: float = 10.0,
    pair: float = 10.0,
    adversarial: float = 0.1,
    critic: Mapping[str, Any] | None = None,
    schedule: Any = None,
) -> list[dict[str, Any]]:
    """Structured KD (CVPR 2019): soft targets of every pixel, pair-wise affinities, and a critic of whole masks.

    Args:
        pixel, pair, adversarial: the weights of the three terms; a term at 0 is left out. (The authors' code takes 1 for the
            pair-wise term, with other pooling.)
        critic: settings of ``AdversarialMask``.
        schedule: of all three weights.
    """
    return _terms(
        [
            dict(type="SoftTargets", weight=pixel),
            dict(type="PairwiseAffinity", weight=pair),
            {"type": "AdversarialMask", "weight": adversarial, **(critic or {})},
        ],
        schedule,
    )


@RECIPES.register
def cwd(weight: float = 3.0, temperature: float = 4.0, schedule: Any = None) -> list[dict[str, Any]]:
    """CWD (ICCV 2021): each class's scores as a distribution over positions.

    Args:
        weight, temperature, schedule: those of its one term.
    """
    return _terms([dict(type="ChannelWise", weight=weight, temperature=temperature)], schedule)


@RECIPES.register
def ifvd(
    pixel: float = 10.0,
    prototype: float = 200.0,
    adversarial: float = 0.1,
    critic: Mapping[str, Any] | None = None,
    schedule: Any = None,
) -> list[dict[str, Any]]:
    """IFVD (ECCV 2020): how far pixels lie from their class's prototype, with soft targets and a critic.

    Args:
        pixel, prototype, adversarial: the weights of the three terms; a term at 0 is left out.
        critic: settings of ``AdversarialMask``.
        schedule: of all three.
    """
    return _terms(
        [
            dict(type="SoftTargets", weight=pixel),
            dict(type="ClassPrototypes", weight=prototype),
            {"type": "AdversarialMask", "weight": adversarial, **(critic or {})},
        ],
        schedule,
    )


@RECIPES.register
def cirkd(
    soft: float = 1.0,
    pixel: float = 1.0,
    memory_pixel: float = 0.1,
    memory_region: float = 0.1,
    relations: Mapping[str, Any] | None = None,
    schedule: Any = None,
) -> list[dict[str, Any]]:
    """CIRKD (CVPR 2022): relations to pixels of other images and to remembered pixels and regions, with soft targets.

    Args:
        soft: the weight of the soft targets (temperature 1).
        pixel, memory_pixel, memory_region: the weights of the three kinds of relations.
        relations: further settings of ``CrossImageRelations``.
        schedule: of all of them.
    """
    weights = dict(pixel=pixel, memory_pixel=memory_pixel, memory_region=memory_region)
    return _terms(
        [
            dict(type="SoftTargets", weight=soft),
            {"type": "CrossImageRelations", "weight": float(any(weights.values())), **weights, **(relations or {})},
        ],
        schedule,
    )


@RECIPES.register
def mgd(weight: float = 2e-5, mask_ratio: float = 0.75, schedule: Any = None) -> list[dict[str, Any]]:
    """MGD (ECCV 2022) on the backbone's last map, with the published settings for segmentation.

    Args:
        weight, mask_ratio, schedule: those of its one term.
    """
    return _terms([dict(type="MaskedGeneration", name="mgd", weight=weight, mask_ratio=mask_ratio)], schedule)
