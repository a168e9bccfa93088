"""Detection's own terms and recipes, on top of the core's."""

from kdgraft_hosts import DET

TERMS, RECIPES = DET.registries()
