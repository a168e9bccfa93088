"""Segmentation's own terms and recipes, on top of the core's."""

from kdgraft.registry import RECIPES as CORE_RECIPES
from kdgraft.registry import TERMS as CORE_TERMS
from kdgraft.registry import Registry

TERMS = Registry("term", "kdgraft.seg.terms", parent=CORE_TERMS)
RECIPES = Registry("recipe", "kdgraft.seg.recipes", parent=CORE_RECIPES)
