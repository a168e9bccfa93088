"""Small real models of universal segmentation, MaskFormer and Mask2Former, and batches in the host's own format."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from support import detectors
from support import nlp as support

CLASSES = detectors.CLASSES


def _backbone() -> Any:
    sizes = dict(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic")
    return transformers.ResNetConfig(**sizes, out_features=["stage1", "stage2", "stage3", "stage4"])


def segmentor(family: str, width: int = 32, seed: int = 0, queries: int = 5) -> Any:
    """A small model with random weights that say something of each query."""
    torch.manual_seed(seed)
    if family == "maskformer":
        decoder = transformers.DetrConfig(
            d_model=width,
            decoder_layers=2,
            encoder_layers=1,
            decoder_attention_heads=2,
            encoder_attention_heads=2,
            decoder_ffn_dim=width,
            num_queries=queries,
            dropout=0.0,
            use_timm_backbone=False,
            backbone=None,
            backbone_config=_backbone(),
        )
        config: Any = transformers.MaskFormerConfig(
            fpn_feature_size=width,
            mask_feature_size=width,
            backbone_config=_backbone(),
            decoder_config=decoder,
            num_labels=CLASSES,
        )
        kind: Any = transformers.MaskFormerForInstanceSegmentation
    else:
        config = transformers.Mask2FormerConfig(
            backbone_config=_backbone(),
            feature_size=width,
            mask_feature_size=width,
            hidden_dim=width,
            encoder_feedforward_dim=width,
            dim_feedforward=width,
            encoder_layers=1,
            decoder_layers=2,
            num_attention_heads=2,
            num_queries=queries,
            train_num_points=64,
            num_labels=CLASSES,
        )
        kind = transformers.Mask2FormerForUniversalSegmentation
    built = support.quiet(kind(config))
    with torch.no_grad():
        for path, parameter in built.named_parameters():
            if path.endswith("proj.bias"):
                parameter.normal_()
            if "class_predictor" in path and parameter.ndim > 1:
                parameter.mul_(6)
    return built


def batch(count: int = 2, right: int = 0, seed: int = 0) -> dict[str, Any]:
    """Images with a class and a mask of each object, padded at the right."""
    return collate(detectors.scenes(count, seed), right)


def collate(scenes: list[dict[str, Any]], right: int = 0) -> dict[str, Any]:
    """A batch in the host's format; the masks are the boxes of the scenes."""
    found = detectors.collate(scenes, right)
    labels, (height, width) = found.pop("labels"), found["pixel_values"].shape[-2:]
    y, x = ((torch.arange(side) + 0.5) / side for side in (height, width))
    masks = []
    for label in labels:
        cx, cy, w, h = label["boxes"].unbind(1)
        rows = (y[None] - cy[:, None]).abs() < h[:, None] / 2
        columns = (x[None] - cx[:, None]).abs() < w[:, None] / 2
        masks.append((rows[:, :, None] & columns[:, None, :]).float())
    return {**found, "mask_labels": masks, "class_labels": [label["class_labels"] for label in labels]}
