"""Segmentation's own terms and recipes, on top of the core's."""

from taskdistill.registry import RECIPES as CORE_RECIPES
from taskdistill.registry import TERMS as CORE_TERMS
from taskdistill.registry import Registry

_USE = "ignored pixels, padding and the order of classes need care here: use PixelSoftTargets"
TERMS = Registry(
    "term",
    "taskdistill.seg.terms",
    parent=CORE_TERMS,
    refused={"SoftTargets": _USE, "LogitMatching": _USE},
)
RECIPES = Registry("recipe", "taskdistill.seg.recipes", parent=CORE_RECIPES)
