"""Small sets of images with boxes, written in COCO's format, and recipes of small detectors on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NAMES = ("red", "green", "blue")
IDS = {"red": 7, "green": 3, "blue": 9}
"""The ids of the categories, which are neither in order nor without gaps."""
ORDER = ("green", "red", "blue")
"""The names in the order of their ids."""
_STAGES = dict(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic")
_LEVELS = dict(**_STAGES, out_features=["stage2", "stage3", "stage4"])


def rtdetr(width: int = 16, **settings: Any) -> dict[str, Any]:
    """The config of a small RT-DETR."""
    return dict(
        model_type="rt_detr",
        backbone_config=dict(model_type="rt_detr_resnet", **_LEVELS),
        encoder_in_channels=[8, 16, 16],
        decoder_in_channels=[width] * 3,
        num_queries=10,
        num_denoising=4,
        d_model=width,
        encoder_hidden_dim=width,
        encoder_ffn_dim=width,
        decoder_ffn_dim=width,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        **settings,
    )


def detr(width: int = 16, **settings: Any) -> dict[str, Any]:
    """The config of a small DETR, whose classes share a softmax."""
    return dict(
        model_type="detr",
        backbone_config=dict(model_type="resnet", **_STAGES, out_features=["stage4"]),
        num_queries=8,
        d_model=width,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=width,
        decoder_ffn_dim=width,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        dropout=0.0,
        **settings,
    )


FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "rt_detr": (rtdetr, dict(size=dict(height=64, width=64))),
    "detr": (detr, dict(size=dict(shortest_edge=48, longest_edge=80), do_pad=True)),
}
"""Family -> its config, and its processor: images of one size, or padded ones."""


def written(root: Path, *, train: int = 16, val: int = 6, names: tuple[str, ...] = NAMES, seed: int = 0) -> Path:
    """Write a set under ``annotations``, ``train`` and ``val``: bright rectangles on noise, in images of 80×48 and 64×64 by turns."""
    generator = np.random.default_rng(seed)
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("val", val)):
        (root / split).mkdir(exist_ok=True)
        images, objects = [], []
        for number in range(count):
            width, height = (64, 64) if number % 2 else (80, 48)
            pixels = (generator.random((height, width, 3)) * 25).astype("uint8")
            for _ in range(1 + number % 2):
                kind = int(generator.integers(3))
                x, y = generator.integers(2, 20, 2).tolist()
                w, h = generator.integers(12, 25, 2).tolist()
                pixels[y : y + h, x : x + w, kind] = 255
                about = dict(id=len(objects) + 1, image_id=100 + number, category_id=IDS[NAMES[kind]], iscrowd=0)
                objects.append({**about, "bbox": [x, y, w, h], "area": w * h})
            Image.fromarray(pixels).save(root / split / f"{number}.png")
            images.append(dict(id=100 + number, file_name=f"{number}.png", width=width, height=height))
        categories = [dict(id=IDS[name], name=name) for name in names]
        found = dict(images=images, annotations=objects, categories=categories)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(found))
    return root


def recipe(root: Path, out: Path, family: str = "rt_detr", width: int = 16, **entries: Any) -> dict[str, Any]:
    """A recipe's entries on a set that :func:`written` made."""
    config, processor = FAMILIES[family]
    files = {
        name: str(root / "annotations" / f"instances_{s}.json") for name, s in (("train", "train"), ("eval", "val"))
    }
    training = dict(use_cpu=True, max_steps=3, save_strategy="no", disable_tqdm=True, per_device_train_batch_size=4)
    return {
        "task": "detection",
        "data": {**files, **entries.pop("data", {})},
        "processor": processor,
        "student": config(width),
        "training": {**training, **entries.pop("training", {})},
        "output": str(out),
        **entries,
    }
