"""Small vision transformers of Transformers, made from their configs, and networks whose features are computed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

IMAGENET: dict[str, Any] = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
_SIZES = dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, patch_size=16, image_size=64
)
CONFIGS: dict[str, dict[str, Any]] = {
    "DINOv3": dict(model_type="dinov3_vit", num_register_tokens=4, **_SIZES),
    "SigLIP": dict(model_type="siglip_vision_model", **_SIZES),
    "ViT": dict(model_type="vit", **_SIZES),
}


def network(kind: str, seed: int = 3) -> Any:
    """A freshly initialised one of :data:`CONFIGS`."""
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(seed)
    return AutoModel.from_config(AutoConfig.for_model(**CONFIGS[kind])).eval()


def by_file(path: Path, kind: str = "DINOv3") -> dict[str, Any]:
    """``teacher=``: a config with the file of its weights, which it writes."""
    torch.save(network(kind).state_dict(), path)
    return dict(type="transformers", model=CONFIGS[kind], checkpoint=str(path), **IMAGENET)


def by_folder(folder: Path, kind: str = "DINOv3") -> dict[str, Any]:
    """``teacher=``: a folder with weights, config and image processor, which it writes."""
    network(kind).save_pretrained(folder)
    _write_processor(folder)
    return dict(type="transformers", model=str(folder))


def config_folder(folder: Path) -> None:
    """The folder of a DINOv3 of the smallest published size, without its weights."""
    from transformers import AutoConfig

    AutoConfig.for_model("dinov3_vit", num_register_tokens=4).save_pretrained(folder)
    _write_processor(folder)


def _write_processor(folder: Path) -> None:
    said = dict(do_normalize=True, do_rescale=True, image_mean=IMAGENET["mean"], image_std=IMAGENET["std"])
    (folder / "preprocessor_config.json").write_text(json.dumps(said))


def patch_means(side: int = 16) -> nn.Module:
    """A network whose feature is the mean of each patch of its image."""
    return nn.AvgPool2d(side)


class Tokens(nn.Module):
    """The mean of each patch as a token, behind tokens of -1, as a ViT gives them."""

    def __init__(self, side: int, prefix: int) -> None:
        super().__init__()
        self.pool, self.embed, self.prefix = nn.AvgPool2d(side), nn.Identity(), prefix

    def forward(self, images: Tensor) -> Tensor:
        patches = self.embed(self.pool(images).flatten(2).transpose(1, 2))
        return torch.cat([patches.new_full((len(patches), self.prefix, patches.shape[2]), -1.0), patches], 1)
