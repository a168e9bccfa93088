"""Registries of terms, recipes and sources for Hugging Face models; they include those of the core."""

from kdgraft.registry import Registry
from kdgraft_hosts import NLP

TERMS, RECIPES = NLP.registries()
assert NLP.sources is not None
SOURCES: Registry = NLP.sources
