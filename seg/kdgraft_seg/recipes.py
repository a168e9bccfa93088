"""Recipes: lists of terms under one name. ``kdgraft list NAME`` prints a recipe, so that it can be edited in a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdgraft.balance import Weight

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
    """Structured KD (CVPR 2019, arXiv 1903.04197): soft targets of every pixel, pair-wise affinities, and a critic of whole masks.

    Args:
        pixel: the weight of the soft targets. A term with weight 0 is left out.
        pair: the weight of the affinities. (The authors' code has the weight 1, with other pooling.)
        adversarial: the weight of the critic's judgement.
        critic: settings of ``AdversarialMask``.
        schedule: the schedule of all three weights.
    """
    masks = {"type": "AdversarialMask", "weight": adversarial, **(critic or {})}
    terms = [dict(type="SoftTargets", weight=pixel), dict(type="PairwiseAffinity", weight=pair), masks]
    return _terms(terms, schedule)


@RECIPES.register
def cwd(weight: Weight = 3.0, temperature: float = 4.0, schedule: Any = None) -> list[dict[str, Any]]:
    """CWD (ICCV 2021, arXiv 2011.13256): the scores of each class as a distribution over positions."""
    return _terms([dict(type="ChannelWise", weight=weight, temperature=temperature)], schedule)


@RECIPES.register
def ifvd(
    pixel: float = 10.0,
    prototype: float = 200.0,
    adversarial: float = 0.1,
    critic: Mapping[str, Any] | None = None,
    schedule: Any = None,
) -> list[dict[str, Any]]:
    """IFVD (ECCV 2020): similarities of pixels to the prototypes of their classes, with soft targets and a critic.

    Args:
        pixel: the weight of the soft targets. A term with weight 0 is left out.
        prototype: the weight of the similarities.
        adversarial: the weight of the critic's judgement.
        critic: settings of ``AdversarialMask``.
        schedule: the schedule of all three weights.
    """
    masks = {"type": "AdversarialMask", "weight": adversarial, **(critic or {})}
    terms = [dict(type="SoftTargets", weight=pixel), dict(type="ClassPrototypes", weight=prototype), masks]
    return _terms(terms, schedule)


@RECIPES.register
def cirkd(
    soft: float = 1.0,
    pixel: float = 1.0,
    memory_pixel: float = 0.1,
    memory_region: float = 0.1,
    relations: Mapping[str, Any] | None = None,
    schedule: Any = None,
) -> list[dict[str, Any]]:
    """CIRKD (CVPR 2022, arXiv 2204.06986): relations to pixels of other images and to remembered pixels and regions, with soft targets.

    Args:
        soft: the weight of the soft targets (temperature 1).
        pixel: the weight of the relations to pixels of the batch.
        memory_pixel: the weight of the relations to remembered pixels.
        memory_region: the weight of the relations to remembered regions.
        relations: further settings of ``CrossImageRelations``.
        schedule: the schedule of all weights.
    """
    weights = dict(pixel=pixel, memory_pixel=memory_pixel, memory_region=memory_region)
    related = {"type": "CrossImageRelations", "weight": float(any(weights.values())), **weights, **(relations or {})}
    return _terms([dict(type="SoftTargets", weight=soft), related], schedule)


@RECIPES.register
def mgd(weight: Weight = 2e-5, mask_ratio: float = 0.75, schedule: Any = None) -> list[dict[str, Any]]:
    """MGD (ECCV 2022, arXiv 2205.01529) on the backbone's last map, with the published settings for segmentation."""
    return _terms([dict(type="MaskedGeneration", name="mgd", weight=weight, mask_ratio=mask_ratio)], schedule)


@RECIPES.register
def maskd(
    weight: Weight = 0.5, tokens: int = 8, tap: str = "decode_head", pretrain: int = 10000, schedule: Any = None
) -> list[dict[str, Any]]:
    """MasKD (ICLR 2023, 2205.14589) on the class scores, with the authors' settings for segmentation on Cityscapes.

    They train the tokens for 10 000 iterations first. Masks are of equal importance, and always those of the teacher's scores.
    """
    fixed: dict[str, Any] = dict(weigh_masks=False, student_masks_after=None, adapter="none")
    return _terms([dict(type="MasKD", weight=weight, tap=tap, tokens=tokens, pretrain=pretrain, **fixed)], schedule)
