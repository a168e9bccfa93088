"""Receptive tokens (MasKD): learned tokens mark the regions of the teacher's features in which the student imitates them.

Huang, Zhang, You, Wang, Qian, Cao, Xu, "Masked Distillation with Receptive Tokens", ICLR 2023, arXiv 2205.14589.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .masking import images_present, inside, present_positions
from .reduction import Reduction, reduce_loss, same_shape, upcast

_SMALLEST_AREA = 1e-5


class ReceptiveTokens(nn.Module):
    """Tokens whose similarity to the features of a position is a soft mask, and the importance of each mask in an image.

    Args:
        channels: C, the width of the teacher's features.
        tokens: T, the number of tokens.
        weigh: build the layers that find the importance of the masks; otherwise all masks count alike.
    """

    def __init__(self, channels: int, tokens: int, weigh: bool = True) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(tokens, channels) * 0.01)
        self.spread = nn.Conv2d(channels, channels, 3, padding=1) if weigh else None
        self.rate = nn.Conv2d(channels, tokens, 1) if weigh else None
        for layer in (self.spread, self.rate):
            if layer is not None:
                nn.init.normal_(layer.weight, std=math.sqrt(2 / (layer.kernel_size[0] ** 2 * layer.out_channels)))
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def masks(self, features: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return the masks ``(B, T, H, W)`` in [0, 1] of features ``(B, C, H, W)``; 0 where ``valid`` ``(B, H, W)`` is 0."""
        return soft_masks(self.tokens, features, valid)

    def shares(self, features: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return the importance ``(B, T)`` of the masks in each image; its sum is 1."""
        if self.spread is None or self.rate is None:
            return features.new_full((len(features), len(self.tokens)), 1 / len(self.tokens))
        read = inside(features, valid).to(self.spread.weight.dtype)
        spread = inside(self.spread(read), valid).sum((2, 3), keepdim=True)
        count = present_positions(features, valid).flatten(1).sum(1).clamp(min=1)
        found: Tensor = self.rate(spread / count[:, None, None, None]).flatten(1).softmax(1)
        return found

    def masked(self, features: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the features times the sum of their masks, each times its share, and the overlap ``(B,)`` of the masks."""
        masks, shares = self.masks(features, valid), self.shares(features, valid)
        if self.spread is None:
            shares = torch.ones_like(shares)  # the authors' sum of the masks
        return features * (masks * shares[:, :, None, None]).sum(1, keepdim=True), mask_overlap(masks)

    def errors(self, features: Tensor, valid: Tensor | None = None) -> dict[str, Tensor]:
        """Return the errors ``(B,)`` that the tokens learn to reduce: see :func:`mask_overlap` and :func:`unmasked_share`."""
        masks, features = self.masks(features, valid), inside(features, valid)
        scale = self.shares(features, valid) * masks.shape[1]
        covered = (masks * scale[:, :, None, None]).sum(1)
        return {"overlap": mask_overlap(masks), "unmasked": unmasked_share([(features, covered)])}


def soft_masks(tokens: Tensor, features: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return sigmoids of the dot products of tokens ``(T, C)`` and features ``(B, C, H, W)``; 0 where ``valid`` is 0."""
    with torch.autocast(features.device.type, enabled=False):
        similar = torch.einsum("tc,bchw->bthw", tokens, inside(features, valid).to(tokens.dtype))
    return inside(similar.sigmoid(), valid)


def mask_overlap(masks: Tensor) -> Tensor:
    """Return the mean Dice coefficient ``(B,)`` of the pairs of an image's masks ``(B, T, H, W)``; 0 for a single mask."""
    flat = masks.flatten(2)
    products, count = flat @ flat.transpose(1, 2), masks.shape[1]
    sizes = products.diagonal(dim1=1, dim2=2)
    dice = 2 * products / (sizes[:, :, None] + sizes[:, None, :] + 2e-12)
    return (dice.sum((1, 2)) - dice.diagonal(dim1=1, dim2=2).sum(1)) / max(count * (count - 1), 1)


def unmasked_share(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the share ``(B,)`` of the features' energy by which the sum of an image's masked features misses the features.

    Args:
        parts: pairs of features ``(B, C, H, W)`` and the sum of their masks ``(B, H, W)``, such as one for each frequency band.
    """
    energies = [features.square().sum(1) for features, _ in parts]
    missed = [
        (energy * (masks - 1).square()).flatten(1).sum(1) for energy, (_, masks) in zip(energies, parts, strict=True)
    ]
    whole = torch.stack([energy.flatten(1).sum(1) for energy in energies]).sum(0)
    return torch.stack(missed).sum(0) / whole.clamp(min=torch.finfo(whole.dtype).tiny)


def masked_imitation(
    student: Tensor,
    teacher: Tensor,
    masks: Tensor,
    *,
    shares: Tensor | None = None,
    valid: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Masked distillation (MasKD): squared errors of an image's features within each mask (Huang et al. 2023, section 3.3).

    .. math:: \sum_t w_t \, \frac{\sum_i m_{ti}^2 \, \frac{1}{C} \sum_c (s_{ci} - t_{ci})^2}{\sum_i m_{ti}}

    Args:
        student, teacher: features ``(B, C, H, W)``, the same shape.
        masks: m, ``(B, T, H, W)`` in [0, 1].
        shares: w, the importance ``(B, T)`` of the masks, with sum 1; equal by default.
        valid: ``(B, H, W)``, > 0 for the positions to include; all by default.
        reduction: over images (those without a valid position are excluded); ``"none"`` gives ``(B,)``.

    Raises:
        DistillError: the shapes differ.
    """
    same_shape(student, teacher, "masked_imitation")
    present = present_positions(teacher, valid)
    errors = (upcast(student) - upcast(teacher)).masked_fill(~present[:, None], 0).square().mean(1)
    masks = inside(masks.to(errors.dtype), valid).flatten(2)
    items = (masks.square() * errors.flatten(1)[:, None]).sum(2) / masks.sum(2).clamp(min=_SMALLEST_AREA)
    items = items.mean(1) if shares is None else (items * shares).sum(1)
    some = images_present(valid)
    return reduce_loss(items, None if some is None else some.to(items.dtype), reduction)
