"""Names of terms and recipes for Hugging Face models; terms of the core are found too."""

from __future__ import annotations

from kdgraft.registry import RECIPES as CORE_RECIPES
from kdgraft.registry import TERMS as CORE_TERMS
from kdgraft.registry import Registry

TERMS = Registry(
    "term",
    "kdgraft.nlp.terms",
    parent=CORE_TERMS,
    refused={
        "ChannelWise": "it compares maps (B, C, H, W); use HiddenStates",
        "MaskedGeneration": "it generates maps (B, C, H, W); use HiddenStates",
    },
)
RECIPES = Registry("recipe", "kdgraft.nlp.recipes", parent=CORE_RECIPES)
