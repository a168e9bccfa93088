"""Settings and small models of Hugging Face for every term that they can use."""

from __future__ import annotations

from typing import Any

import torch
from transformers import ResNetConfig, ResNetForImageClassification

from kdgraft_nlp import TERMS, OnPolicy
from support import detectors, universal
from support import nlp as support

SETTINGS: dict[str, dict[str, Any]] = {
    "MarginMSE": dict(candidates=3),
    "Review": dict(tap=["resnet.encoder.stages[0]", "resnet.encoder.stages[1]"]),
    "BYOT": dict(tap=["resnet.encoder.stages[0]", "resnet.encoder.stages[1]"]),
    "ONE": dict(branch="resnet.encoder.stages.1"),
    "WeightMatching": dict(modules="bert.encoder.layer.1"),
}
"""Settings of a term for models of Hugging Face."""
FACTS = {"shared_tokens": torch.arange(support.VOCABULARY)[:, None].expand(-1, 2), "on_policy": OnPolicy()}
"""What a trainer knows of two tokenizers, and of the texts that its student writes."""
FAMILIES: dict[str, str] = {
    "UniversalLogits": "llama",
    "GOLD": "llama",
    "MiniLLM": "llama",
    "DSKD": "llama",
    "BoundedRegression": "regression",
    "MatchedBoxes": "detr",
    "MatchedMasks": "mask2former",
    "BYOT": "resnet",
    "ONE": "resnet",
}
"""A term's family of models, of ``support.TASKS``, where it is not BERT: ``"resnet"`` for maps, ``"regression"`` for numbers, ``"detr"`` for boxes, and so on."""


def family(kind: str) -> str:
    on_maps = {"maps", "images"} & set(TERMS.get(kind).needs)
    return FAMILIES.get(kind, "resnet" if on_maps else "bert")


def model(name: str, width: int, seed: int) -> Any:
    if name == "resnet":
        torch.manual_seed(seed)
        config = ResNetConfig(embedding_size=width, hidden_sizes=[width, 2 * width], depths=[1, 1], num_labels=3)
        return ResNetForImageClassification(config)
    if name == "mask2former":
        return universal.segmentor(name, 2 * width, seed)
    if name == "detr":
        return detectors.detector(name, width, seed)
    if name == "regression":
        return support.quiet(support.model("bert", width, 2, 4, seed=seed, num_labels=1, problem_type="regression"))
    return support.quiet(support.model(name, width, 2, 4, seed=seed))


def batch(name: str) -> dict[str, Any]:
    if name == "resnet":
        images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        return dict(pixel_values=images, labels=torch.tensor([0, 1, 2, 0]))
    if name == "mask2former":
        return universal.batch()
    if name == "detr":
        return detectors.collate(detectors.scenes(4))
    if name == "regression":
        return {**support.collate(support.samples(6)), "labels": torch.linspace(-1, 1, 6)}
    return support.collate(support.samples(6, support.TASKS[name][1]))
