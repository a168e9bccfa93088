"""Factor transfer (FT): the student's factors follow those into which a paraphraser condenses the teacher's features.

Kim, Park, Kwak, "Paraphrasing Complex Network: Network Compression via Factor Transfer", NeurIPS 2018, arXiv 1802.04977.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from ..errors import DistillError
from .hint import hint
from .masking import image_means, images_present, inside, present_positions
from .reduction import Reduction, reduce_loss, same_shape, upcast
from .scale import unit


class Translator(nn.Module):
    """Three 3×3 convolutions, each with LeakyReLU 0.1, from features to factors: ``(B, C, H, W) -> (B, K, H, W)``.

    Args:
        channels: C, the width of the features.
        factors: K, the number of factors.
    """

    def __init__(self, channels: int, factors: int) -> None:
        super().__init__()
        widths = (channels, channels, factors, factors)
        self.layers = nn.ModuleList(nn.Conv2d(*pair, 3, padding=1) for pair in pairwise(widths))
        self.activation = nn.LeakyReLU(0.1)

    def forward(self, features: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return the factors; all layers read positions where ``valid`` ``(B, H, W)`` is 0 as zero padding."""
        return _through(self.layers, self.activation, features, valid)


class Paraphraser(nn.Module):
    """An autoencoder of the teacher's features: a :class:`Translator`, and three transposed convolutions back (section 3.1).

    Args:
        channels: C, the width of the features.
        factors: K, the number of factors.
    """

    def __init__(self, channels: int, factors: int) -> None:
        super().__init__()
        self.encode = Translator(channels, factors)
        widths = (factors, factors, channels, channels)
        self.layers = nn.ModuleList(nn.ConvTranspose2d(*pair, 3, padding=1) for pair in pairwise(widths))
        self.activation = nn.LeakyReLU(0.1)

    def forward(self, features: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return the features restored from their factors."""
        return _through(self.layers, self.activation, self.encode(features, valid), valid)

    def errors(self, features: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return the mean absolute error ``(B,)`` of an image's restored features, which the paraphraser learns to reduce."""
        restored = self(features, valid)
        return image_means(hint(restored, inside(features, valid), norm="l1", reduction="none"), valid)


def factor_transfer(
    student: Tensor,
    teacher: Tensor,
    *,
    variant: Literal["code", "paper"] = "code",
    valid: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Factor transfer (FT): absolute difference of the normalised factors of an image (Kim et al. 2018, equation 3).

    .. math:: \frac{1}{D} \Big\| \frac{f_s}{\|f_s\|_2} - \frac{f_t}{\|f_t\|_2} \Big\|_1 \quad\text{(code)}, \qquad
              \Big\| \frac{f_s}{\|f_s\|_2} - \frac{f_t}{\|f_t\|_2} \Big\|_1 \quad\text{(paper, p = 1)}

    Args:
        student, teacher: factors ``(B, K, H, W)`` of the student's translator and of the teacher's paraphraser; the same shape.
        variant: ``"code"`` is the mean over the D numbers of an image, with weight 500 in the authors' code (D = 2048 there);
            ``"paper"`` is the sum.
        valid: ``(B, H, W)``, > 0 for the positions to include; all by default.
        reduction: over images (those without a valid position are excluded); ``"none"`` gives ``(B,)``.

    Raises:
        DistillError: the shapes differ, or the variant is unknown.
    """
    same_shape(student, teacher, "factor_transfer")
    if variant not in ("code", "paper"):
        raise DistillError(f"variant must be 'code' or 'paper', got {variant!r}")
    s, t = (unit(inside(upcast(factors), valid).flatten(1), 1) for factors in (student, teacher))
    items = (s - t).abs().sum(1)
    if variant == "code":
        numbers = present_positions(teacher, valid).flatten(1).sum(1) * teacher.shape[1]
        items = items / numbers.clamp(min=1)
    present = images_present(valid)
    return reduce_loss(items, None if present is None else present.to(items.dtype), reduction)


def _through(layers: nn.ModuleList, activation: nn.Module, features: Tensor, valid: Tensor | None) -> Tensor:
    features = features.to(next(layers.parameters()).dtype)
    for layer in layers:
        features = activation(layer(inside(features, valid)))
    return features
