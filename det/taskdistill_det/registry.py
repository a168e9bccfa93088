"""Detection's own terms and recipes, on top of the core's."""

from taskdistill.registry import RECIPES as CORE_RECIPES
from taskdistill.registry import TERMS as CORE_TERMS
from taskdistill.registry import Registry

TERMS = Registry(
    "term",
    "taskdistill.det.terms",
    parent=CORE_TERMS,
    refused={"LogitMatching": "dense class outputs need valid anchors and an order of classes: use SoftTargets"},
)
RECIPES = Registry("recipe", "taskdistill.det.recipes", parent=CORE_RECIPES)
