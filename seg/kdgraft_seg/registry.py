"""Registries of segmentation's own terms and recipes, which extend the core's."""

from kdgraft_hosts import SEG

TERMS, RECIPES = SEG.registries()
