"""Small real detectors by object queries of transformers, built from configs, and images with labels in the host's own format."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from support import nlp as support

SIDE = 64
CLASSES = 3

_ATTENTION = dict(encoder_attention_heads=2, decoder_attention_heads=2, dropout=0.0)
_RT = dict(num_denoising=4, encoder_in_channels=[8, 16, 16], num_feature_levels=3)


def _resnet(kind: Any, *stages: str) -> Any:
    sizes = dict(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], layer_type="basic")
    return kind(**sizes, out_features=list(stages))


def _plain() -> Any:
    return _resnet(transformers.ResNetConfig, "stage4")


def _levels() -> Any:
    return _resnet(transformers.ResNetConfig, "stage2", "stage3", "stage4")


def _deep() -> Any:
    return _resnet(transformers.RTDetrResNetConfig, "stage2", "stage3", "stage4")


def _windows() -> Any:
    layers = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=16, num_windows=4)
    sides = dict(image_size=SIDE, pretrain_image_size=SIDE, window_block_indices=[0], out_indices=[1, 2])
    return transformers.LwDetrViTConfig(**layers, **sides)


FAMILIES: dict[str, tuple[str, Any]] = {
    "detr": ("DetrForObjectDetection", _plain),
    "table": ("TableTransformerForObjectDetection", _plain),
    "conditional": ("ConditionalDetrForObjectDetection", _plain),
    "dab": ("DabDetrForObjectDetection", _plain),
    "deformable": ("DeformableDetrForObjectDetection", _levels),
    "rtdetr": ("RTDetrForObjectDetection", _deep),
    "rtdetrv2": ("RTDetrV2ForObjectDetection", _deep),
    "d_fine": ("DFineForObjectDetection", _deep),
    "lw_detr": ("LwDetrForObjectDetection", None),
    "yolos": ("YolosForObjectDetection", None),
}
"""Family -> the class and the config of its backbone."""
SOFTMAX = ("detr", "table", "yolos")
"""The families whose classes share a softmax with "no object"."""


def detector(family: str, width: int = 16, seed: int = 0, queries: int = 6, **settings: Any) -> Any:
    """A small detector with random weights that say something."""
    name, backbone = FAMILIES[family]
    kind = getattr(transformers, name)
    sizes: dict[str, Any] = dict(num_labels=CLASSES, num_queries=queries, **_ATTENTION)
    if family == "lw_detr":
        sizes = dict(backbone_config=_windows(), num_labels=CLASSES, num_queries=queries, group_detr=3, d_model=width)
        sizes |= dict(decoder_layers=2, decoder_ffn_dim=width, decoder_n_points=2, projector_scale_factors=[1.0])
        sizes |= dict(decoder_self_attention_heads=2, decoder_cross_attention_heads=2, dropout=0.0)
    elif family == "yolos":
        sizes = dict(num_labels=CLASSES, num_detection_tokens=queries, image_size=[SIDE, SIDE], patch_size=16)
        sizes |= dict(hidden_size=width, num_hidden_layers=2, num_attention_heads=2, intermediate_size=width)
        sizes |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    else:
        sizes |= dict(encoder_layers=1, decoder_layers=2, encoder_ffn_dim=width, decoder_ffn_dim=width)
        sizes |= dict(backbone_config=backbone(), backbone=None, use_timm_backbone=False, use_pretrained_backbone=False)
        sizes |= {"hidden_size" if family == "dab" else "d_model": width}
    if family in ("rtdetr", "rtdetrv2", "d_fine"):
        sizes |= dict(encoder_hidden_dim=width, decoder_in_channels=[width] * 3, **_RT)
        sizes["decoder_n_points"] = [2, 2, 2] if family == "d_fine" else 2
    if family == "deformable":
        sizes["num_feature_levels"] = 3
    torch.manual_seed(seed)
    built = support.quiet(kind(kind.config_class(**{**sizes, **settings})))
    # Freshly initialised heads say the same of each query, and states of 0 have endless gradients.
    with torch.no_grad():
        for path, parameter in built.named_parameters():
            if path.endswith("proj.bias"):
                parameter.normal_()
            if any(word in path for word in ("class_embed", "class_labels_classifier", "bbox_")) and parameter.ndim > 1:
                parameter.mul_(6)
    return built


def scenes(count: int = 2, seed: int = 0, objects: int = 2, side: int = SIDE) -> list[dict[str, Any]]:
    """Images with bright rectangles on a dark ground, and their classes and boxes (centre and size, as fractions)."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        image = 0.1 * torch.rand(3, side, side, generator=generator)
        number = max(objects - i % 2, 0)
        size = 0.2 + 0.2 * torch.rand(number, 2, generator=generator)
        centre = 0.3 + 0.4 * torch.rand(number, 2, generator=generator)
        classes = torch.randint(CLASSES, (number,), generator=generator)
        for (x, y), (w, h), kind in zip(centre.tolist(), size.tolist(), classes.tolist(), strict=True):
            rows, columns = (slice(int((a - b / 2) * side), int((a + b / 2) * side)) for a, b in ((y, h), (x, w)))
            image[kind, rows, columns] = 1.0
        found.append(
            {"pixel_values": image, "labels": {"class_labels": classes, "boxes": torch.cat([centre, size], 1)}}
        )
    return found


def collate(features: list[dict[str, Any]], right: int = 0) -> dict[str, Any]:
    """A batch in the host's format, padded at the right; boxes are fractions of the padded image, as its processors give them."""
    images = torch.stack([feature["pixel_values"] for feature in features])
    height, width = images.shape[-2:]
    mask = torch.zeros(len(images), height, width + right, dtype=torch.long)
    mask[..., :width] = 1
    scale = torch.tensor([width / (width + right), 1.0] * 2)
    labels = [{**f["labels"], "boxes": f["labels"]["boxes"] * scale} for f in features]
    return {"pixel_values": torch.nn.functional.pad(images, (0, right)), "pixel_mask": mask, "labels": labels}


def outputs(model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The class logits and boxes of a model by itself, in inference."""
    mode = model.training
    takes = ("pixel_values",) if "Yolos" in type(model).__name__ else ("pixel_values", "pixel_mask")
    with torch.no_grad():
        found = model.eval()(**{name: batch[name] for name in takes})
    model.train(mode)
    return found.logits, found.pred_boxes


def training(student):
    """Training, without statistics of a batch in normalisation, so that the student predicts as it does in inference."""
    student.train()
    for module in student.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    return student


def losses(student, batch):
    student.zero_grad()
    output = student(**batch)
    found = {name: v for name, v in student.distill_link.last.losses.items() if name.endswith(".loss")}
    return {k.removeprefix("distill.").removesuffix(".loss"): v for k, v in found.items()}, output
