"""The critic of adversarial distillation: a network that scores masks.

Liu et al., "Structured Knowledge Distillation for Semantic Segmentation", CVPR 2019, arXiv 1903.04197, section 3.3 and the
authors' code; the layers are those of SAGAN (Zhang et al. 2018, arXiv 1805.08318).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm as normalised

from kdgraft.errors import DistillError


class SelfAttention(nn.Module):
    """Self-attention over positions, added with a factor γ that starts at 0 (SAGAN).

    It maps ``(B, C, H, W)`` to the same shape and holds (H·W)² numbers an image.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(channels // 8, 1)
        self.query, self.key = nn.Conv2d(channels, inner, 1), nn.Conv2d(channels, inner, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, maps: Tensor) -> Tensor:
        """Return maps of the same shape ``(B, C, H, W)``."""
        query, key, value = (layer(maps).flatten(2) for layer in (self.query, self.key, self.value))
        attention = (query.transpose(1, 2) @ key).softmax(2)
        return maps + self.gamma * (value @ attention.transpose(1, 2)).view_as(maps)


class Critic(nn.Module):
    """Scores masks, each sample independently of the others (nothing is normalised over the batch).

    The layers are 4×4 convolutions of stride 2 with LeakyReLU 0.1, self-attention after the last two, a 3×3 convolution to one
    channel, and the mean over positions. (The authors' last convolution is 4×4 without padding and assumes masks of 65×65. Their
    batch normalisation of the input would make samples depend on each other, which the gradient penalty does not allow.) Masks
    with less than 2 ** len(channels) positions a side are padded with 0.

    Args:
        in_channels: the number of classes, plus 3 if the critic sees the image.
        channels: the width of each convolution.
        attention: the number of last convolutions that self-attention follows.
        spectral_norm: normalise the weights of the strided convolutions spectrally, as in the authors' code.
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int] = (64, 128, 256, 512),
        attention: int = 2,
        spectral_norm: bool = True,
    ) -> None:
        super().__init__()
        if not channels or not all(isinstance(width, int) and width > 0 for width in channels):
            raise DistillError(f"the critic's channels must be whole numbers > 0, got {channels!r}")
        if not 0 <= attention <= len(channels):
            raise DistillError(f"the critic's attention must be between 0 and {len(channels)}, got {attention!r}")
        layers: list[nn.Module] = []
        for number, width in enumerate(channels):
            strided = nn.Conv2d(in_channels, width, 4, 2, 1)
            layers += [normalised(strided) if spectral_norm else strided, nn.LeakyReLU(0.1)]
            if number >= len(channels) - attention:
                layers.append(SelfAttention(width))
            in_channels = width
        self.trunk = nn.Sequential(*layers)
        self.score = nn.Conv2d(in_channels, 1, 3, padding=1)
        self.smallest = 2 ** len(channels)

    def forward(self, masks: Tensor) -> Tensor:
        """Return the scores ``(B,)`` of masks ``(B, C, H, W)``."""
        height, width = masks.shape[-2:]
        if min(height, width) < self.smallest:
            masks = F.pad(masks, (0, max(self.smallest - width, 0), 0, max(self.smallest - height, 0)))
        return self.score(self.trunk(masks)).mean((1, 2, 3))
