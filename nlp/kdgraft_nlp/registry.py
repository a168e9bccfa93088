"""Names of terms and recipes for Hugging Face models; terms of the core are found too."""

from kdgraft_hosts import NLP

TERMS, RECIPES = NLP.registries()
