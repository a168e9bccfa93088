"""Registries of terms and recipes for Hugging Face models; they include the terms of the core."""

from kdgraft_hosts import NLP

TERMS, RECIPES = NLP.registries()
