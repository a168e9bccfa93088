"""Registries of detection's own terms and recipes, which extend the core's."""

from kdgraft_hosts import DET

TERMS, RECIPES = DET.registries()
