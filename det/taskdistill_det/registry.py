"""Detection's own terms and recipes, on top of the core's."""

from taskdistill.registry import RECIPES as CORE_RECIPES
from taskdistill.registry import TERMS as CORE_TERMS
from taskdistill.registry import Registry

TERMS = Registry("term", "taskdistill.det.terms", parent=CORE_TERMS)
RECIPES = Registry("recipe", "taskdistill.det.recipes", parent=CORE_RECIPES)
