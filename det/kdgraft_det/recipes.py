"""Recipes: lists of terms under one name. ``kdgraft list NAME`` prints a recipe, so that it can be edited in a config."""

from __future__ import annotations

from typing import Any

from kdgraft.balance import Weight
from kdgraft.errors import check_flag

from .registry import RECIPES


@RECIPES.register
def ld(
    main: float = 1.2, vlr: float = 2.6, classes: float = 0.125, temperature: float = 10.0, schedule: Any = None
) -> list[dict[str, Any]]:
    """LD (CVPR 2022, arXiv 2102.12252): box distributions on the main and the valuable region, class distillation on the positives.

    On COCO the default weights have the effect of the published ones. The published weights multiply sums over the three images of
    a GPU, divided by the numbers of bins (0.25 and 0.25 / 4), and a mean over 80 classes (10). The weights here multiply means over
    positions and sums over bins and classes, and do not depend on any of these numbers.

    Args:
        main: the weight of the distributions in the main region.
        vlr: the weight of the distributions in the valuable region.
        classes: the weight of the soft targets.
        temperature: the temperature of the distributions; that of the classes is 2.
        schedule: the schedule of all three weights.
    """
    edges = dict(type="LocalizationDistillation", temperature=temperature)
    terms: list[dict[str, Any]] = [
        dict(edges, name="ld_main", anchors="main", weight=main),
        dict(edges, name="ld_vlr", anchors="vlr", weight=vlr),
        dict(
            type="SoftTargets", name="class_main", anchors="main", activation="softmax", temperature=2, weight=classes
        ),
    ]
    return scheduled(terms, schedule)


@RECIPES.register
def imitation(
    weight: Weight = 1.0, tap: str = "neck[*]", region: str = "foreground", schedule: Any = None
) -> list[dict[str, Any]]:
    """Hint on the pyramid through 1×1 adapters (Chen et al., NeurIPS 2017), inside the objects: every box has the same weight."""
    return [dict(type="FeatureImitation", tap=tap, region=region, weight=weight, schedule=schedule)]


@RECIPES.register
def combined(
    main: float = 0.22, vlr: float = 0.22, classes: float = 0.5, features: float = 6.0, schedule: Any = None
) -> list[dict[str, Any]]:
    """``ld`` and ``imitation`` together, with the weights of the four terms tuned on the demo's validation scenes."""
    terms = ld(main=main, vlr=vlr, classes=classes, schedule=schedule)
    return [*terms, *imitation(weight=features, schedule=schedule)]


@RECIPES.register
def chen2017(
    features: float = 0.5,
    boxes: float = 0.5,
    hard_weight: float = 0.8,
    background_weight: float = 1.5,
    two_stage: bool = False,
    tap: str = "neck[*]",
    schedule: Any = None,
) -> list[dict[str, Any]]:
    """Chen et al. (NeurIPS 2017): hint at every position, weighted soft classes mixed with the hard ones, bounded boxes.

    Args:
        features: γ, the weight of the hint.
        boxes: ν, the weight of the bounded regression.
        hard_weight: μ of μ·hard + (1 − μ)·soft; not published, 0.8 in a re-implementation.
        background_weight: the weight of the background in the soft classes.
        two_stage: add the same terms on the region proposal network, as in the paper for Faster R-CNN.
        tap: the tap of the hint.
        schedule: the schedule of all terms.
    """
    heads = (("classes", "boxes", "auto"), ("rpn_classes", "rpn_boxes", "rpn_head"))
    terms: list[dict[str, Any]] = [dict(type="Hint", tap=tap, weight=features)]
    for class_name, box_name, head in heads[: 2 if two_stage else 1]:
        mixed = dict(background_weight=background_weight, hard_weight=hard_weight)
        terms.append(dict(type="SoftTargets", name=class_name, head=head, **mixed))
        terms.append(dict(type="BoundedRegression", name=box_name, head=head, weight=boxes))
    return scheduled(terms, schedule)


@RECIPES.register
def pkd(weight: Weight = 10.0, tap: str = "neck[*]", schedule: Any = None) -> list[dict[str, Any]]:
    """PKD (NeurIPS 2022, arXiv 2207.02039): the pyramid's channels correlate with the teacher's, whatever their scale.

    The losses of the levels add up. The published weight is 10 for one-stage detectors (RetinaNet) and 6 for two-stage ones. The
    authors' configs tap four of the pyramid's five levels; ``neck[*]`` taps all of them.
    """
    return [dict(type="PearsonImitation", name="pkd", tap=tap, weight=weight, schedule=schedule)]


@RECIPES.register
def fgd(
    temperature: float = 0.5,
    alpha: float = 1e-3,
    beta: float = 5e-4,
    gamma: float = 5e-4,
    lambda_: float = 5e-6,
    tap: str = "neck[*]",
    schedule: Any = None,
) -> list[dict[str, Any]]:
    """FGD (CVPR 2022, arXiv 2111.11837) on the pyramid, with the published weights for one-stage detectors.

    The published weights for two-stage detectors are alpha 5e-5, beta 2.5e-5, gamma 5e-5 and lambda_ 5e-7.
    """
    weights = dict(alpha=alpha, beta=beta, gamma=gamma, lambda_=lambda_)
    return [dict(type="FocalGlobal", name="fgd", tap=tap, temperature=temperature, **weights, schedule=schedule)]


@RECIPES.register
def mgd(
    weight: Weight = 2e-5, mask_ratio: float = 0.65, tap: str = "neck[*]", schedule: Any = None
) -> list[dict[str, Any]]:
    """MGD (ECCV 2022, arXiv 2205.01529) on the pyramid, with the weight for one-stage detectors.

    The published settings for two-stage detectors are weight 5e-7 and mask_ratio 0.45.
    """
    return [dict(type="MaskedGeneration", name="mgd", tap=tap, mask_ratio=mask_ratio, weight=weight, schedule=schedule)]


@RECIPES.register
def fgfi(
    weight: Weight = 1.28, threshold: float = 0.5, tap: str = "neck[*]", schedule: Any = None
) -> list[dict[str, Any]]:
    """FGFI (CVPR 2019, arXiv 1906.03609): imitation at the positions whose anchors are near an object (``threshold`` is ψ).

    The paper's loss is 0.01 · Σ I (r(s) - t)² / (2 ΣI), summed over channels. The loss here is the mean over channels, so that the
    paper's weight is 0.01 · C / 2: 1.28 for pyramids of 256 channels. Each level has its own ΣI, and all levels have equal weights.
    """
    region = dict(type="fine_grained", threshold=threshold)
    return [dict(type="FeatureImitation", tap=tap, region=region, weight=weight, name="fgfi", schedule=schedule)]


@RECIPES.register
def crosskd(weight: Weight = 1.0, reused: int = 1, schedule: Any = None) -> list[dict[str, Any]]:
    """CrossKD (CVPR 2024, arXiv 2306.11369): the student's head features pass through the teacher's last convolutions.

    Within the term boxes have the weight 4 (distributions) or 1, and classes 1.
    """
    return [dict(type="CrossHead", name="crosskd", weight=weight, reused=reused, schedule=schedule)]


@RECIPES.register
def rtdetrv4(
    weight: Weight = 5.0, tap: str = "backbone[-1]", teacher_tap: str | None = None, schedule: Any = None
) -> list[dict[str, Any]]:
    """RT-DETRv4 (arXiv 2510.25257): the deepest map points into the direction of the teacher's, through one linear layer.

    The paper teaches by a DINOv3 ViT, on the student's map of stride 32 after one layer of its encoder, with weights of 5 (S and M),
    15 (L) and 20 (X) that follow the gradient's share: ``weight=dict(type="auto", share=0.1, every=1000)``, see
    :class:`~kdgraft.balance.AutoWeight`. Such a ViT is ``teacher=dict(type="transformers", …)``, which teaches by its last map. A teacher
    of the same host does so by the last map of its backbone. Where the grids differ, the student's map is resized to the teacher's;
    the authors' code resizes the teacher's.

    Args:
        weight: the weight.
        tap: the tap of the map; of the student's alone if there is a ``teacher_tap`` or the teacher is one of features.
        teacher_tap: the tap of the teacher's map, where it differs.
        schedule: the schedule of the weight.
    """
    taps = dict(tap=tap) if teacher_tap is None else dict(student_tap=tap, teacher_tap=teacher_tap)
    return [dict(type="FeatureImitation", name="rtdetrv4", loss="cosine", **taps, weight=weight, schedule=schedule)]


@RECIPES.register
def ultralytics(scored: bool = True, weight: Weight | None = None, **settings: Any) -> list[dict[str, Any]]:
    """The pyramid by squared errors that the teacher's class scores weigh, or by cosines (Ultralytics; pull request 24894).

    The first is ``ScoredImitation``. With ``scored=False`` every position counts alike and directions are compared: the cosine of the same repository
    (``nn/distill_model.py`` at 037e048), for a teacher of features, whose one map then teaches each level. No weight was published for
    it; that of the squared errors, 6 before each level, is taken, which is 18 here, where three levels are averaged.

    Args:
        scored: weigh positions by the class scores of the teacher, which then has a dense head.
        weight: the weight; 6, or 18 without scores, by default.
        settings: those of ``ScoredImitation`` or, without scores, of ``FeatureImitation``, such as ``tap`` and ``schedule``.
    """
    check_flag("ultralytics", "scored", scored)
    if scored:
        return [dict(type="ScoredImitation", weight=6.0 if weight is None else weight, **settings)]
    plain: dict[str, Any] = dict(
        type="FeatureImitation", name="ultralytics", tap="neck[*]", loss="cosine", adapter="mlp"
    )
    return [{**plain, "weight": 18.0 if weight is None else weight, **settings}]


def scheduled(terms: list[dict[str, Any]], schedule: Any) -> list[dict[str, Any]]:
    """Return the terms, with the schedule in each of them if there is one."""
    return terms if schedule is None else [{**term, "schedule": schedule} for term in terms]
