"""Small real segmentors of transformers, and pictures some of whose pixels their own loss ignores."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from support.nlp import built, outputs


def segformers(**settings: Any) -> list[Any]:
    """A student and a wider teacher."""
    sizes = dict(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 8],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=8,
        image_size=16,
        num_labels=5,
        drop_path_rate=0.0,
    )
    return [
        built("SegformerForSemanticSegmentation", seed, **{**sizes, "decoder_hidden_size": 8 * seed, **settings})
        for seed in (1, 2)
    ]


def pictures(ignored: int = 255) -> dict[str, Tensor]:
    """Two pictures with classes of their pixels, some of them ignored."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (2, 24, 20), generator=generator)
    labels[0, :10] = ignored
    labels[1, :, 3] = ignored
    return {"pixel_values": torch.rand(2, 3, 24, 20, generator=generator), "labels": labels}


def resized(models: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """The scores of student and teacher at the labels' size."""
    found = (outputs(model, batch, train=train).logits for model, train in zip(models, (True, False), strict=True))
    return [F.interpolate(logits, size=batch["labels"].shape[-2:], mode="bilinear") for logits in found]
