"""Segmentation's own terms and recipes, on top of the core's."""

from kdgraft_hosts import SEG

TERMS, RECIPES = SEG.registries()
