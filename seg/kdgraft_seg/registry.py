"""Segmentation's own terms and recipes, on top of the core's."""

from kdgraft.registry import RECIPES as CORE_RECIPES
from kdgraft.registry import TERMS as CORE_TERMS
from kdgraft.registry import Registry

_USE = "ignored pixels, padding and the order of classes need care here: use PixelSoftTargets"
TERMS = Registry(
    "term",
    "kdgraft.seg.terms",
    parent=CORE_TERMS,
    refused={"SoftTargets": _USE, "LogitMatching": _USE},
)
RECIPES = Registry("recipe", "kdgraft.seg.recipes", parent=CORE_RECIPES)
