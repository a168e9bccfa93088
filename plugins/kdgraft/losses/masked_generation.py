"""Masked generation: a generator restores the teacher's features from the student's masked ones.

Yang, Li, Shao, Shi, Yuan, Yuan, "Masked Generative Distillation" (MGD), ECCV 2022, arXiv 2205.01529.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from .hint import hint
from .masking import inside
from .reduction import Reduction, reduce_loss, same_shape, upcast


class FeatureGenerator(nn.Module):
    """Generator of a 3×3 convolution, ReLU and a 3×3 convolution of equal width: ``(B, C, H, W) -> (B, C, H, W)``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(channels, channels, 3, padding=1)
        self.leave = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, features: Tensor, valid: Tensor | None = None) -> Tensor:
        """Generate features; both convolutions treat positions where ``valid`` ``(B, H, W)`` is 0 as zero padding."""
        hidden = self.enter(inside(features.to(self.enter.weight.dtype), valid)).relu()
        generated: Tensor = self.leave(inside(hidden, valid))
        return generated


def masked_generation(
    student: Tensor,
    teacher: Tensor,
    generator: Callable[[Tensor, Tensor | None], Tensor],
    keep: Tensor,
    *,
    valid: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Masked generation (MGD; Yang et al. 2022): squared error of the generated features, summed over an image.

    .. math:: \sum_{c,i} (t_{ci} - G(s \odot M)_{ci})^2

    over all positions, masked or not.

    Args:
        student, teacher: ``(B, C, H, W)``, the same shape.
        generator: G, a :class:`FeatureGenerator`; called with the masked map and ``valid``.
        keep: M, ``(B, H, W)``: true where the generator sees the student's features.
        valid: ``(B, H, W)``, > 0 for the positions to include; all by default.
        reduction: over images; ``"none"`` gives ``(B,)``.

    Raises:
        DistillError: the shapes differ.
    """
    same_shape(student, teacher, "masked_generation")
    generated = generator(student.masked_fill(~keep[:, None], 0), valid)
    items = hint(generated, inside(upcast(teacher), valid), weight=valid, reduction="none") * teacher.shape[1]
    return reduce_loss(items.flatten(1).sum(1), None, reduction)
