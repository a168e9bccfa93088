"""Recipes: lists of terms under one name. ``taskdistill list NAME`` prints one, to be edited in a config."""

from __future__ import annotations

from typing import Any

from .registry import RECIPES


@RECIPES.register
def localization(
    main: float = 0.25, vlr: float = 0.25, classes: float = 10.0, temperature: float = 10.0, schedule: Any = None
) -> list[dict[str, Any]]:
    """LD (CVPR 2022): box distributions on the main and the valuable region, class distillation on the positives.

    Args:
        main, vlr, classes: the weights of the three terms.
        temperature: of the box distributions; the classes' is 2.
        schedule: of all three weights.
    """
    terms: list[dict[str, Any]] = [
        dict(type="LocalizationDistillation", name="ld_main", region="main", temperature=temperature, weight=main),
        dict(type="LocalizationDistillation", name="ld_vlr", region="vlr", temperature=temperature, weight=vlr),
        dict(
            type="SoftTargets",
            name="class_main",
            region="main",
            activation="softmax",
            classes="mean",
            temperature=2,
            weight=classes,
        ),
    ]
    return terms if schedule is None else [{**term, "schedule": schedule} for term in terms]


@RECIPES.register
def imitation(
    weight: float = 1.0, tap: str = "neck[*]", region: str = "foreground", schedule: Any = None
) -> list[dict[str, Any]]:
    """Hint on the pyramid through 1×1 adapters (Chen et al., NeurIPS 2017), on the objects: every box weighs the same.

    Args:
        weight, tap, region, schedule: those of its one term.
    """
    return [dict(type="FeatureImitation", tap=tap, region=region, weight=weight, schedule=schedule)]


@RECIPES.register
def combined(
    main: float = 2.0, vlr: float = 2.0, classes: float = 5.0, features: float = 6.0, schedule: Any = None
) -> list[dict[str, Any]]:
    """``localization`` and ``imitation`` together, with weights tuned on the demo's validation scenes.

    Args:
        main, vlr, classes, features: the weights of the four terms.
        schedule: of all of them.
    """
    return [
        *localization(main=main, vlr=vlr, classes=classes, schedule=schedule),
        *imitation(weight=features, schedule=schedule),
    ]


@RECIPES.register
def cross_head(weight: float = 1.0, reused: int = 1, schedule: Any = None) -> list[dict[str, Any]]:
    """CrossKD (CVPR 2024, arXiv 2306.11369): the teacher's last convolutions read the student's head features.

    Args:
        weight, reused, schedule: those of its one term, in which boxes weigh 4 (distributions) or 1 and classes 1.
    """
    return [dict(type="CrossHead", weight=weight, reused=reused, schedule=schedule)]
