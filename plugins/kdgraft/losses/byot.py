"""Be your own teacher (BYOT): exits of shallow layers learn from labels and from the deepest layer.

Zhang, Song, Gao, Chen, Bao, Ma, "Be Your Own Teacher: Improve the Performance of Convolutional Neural Networks via Self
Distillation", ICCV 2019, arXiv 1905.08094, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import check_number, check_share
from ..pooling import mean_of_each
from .masking import inside
from .reduction import Reduction, reduce_loss, same_shape, upcast
from .review import ValidNorm
from .soft_targets import mixed_targets


class Exit(nn.Module):
    """An exit of a shallow layer: a bottleneck of convolutions to the grid and width of the deepest layer, pool and classifier.

    Convolutions of 1×1, ``size`` with a stride of ``size``, and 1×1, each with a normalisation and a ReLU, as in the authors' code
    (``ScalaNet``). It computes in float32 even under autocast.

    Args:
        channels: width of the shallow layer.
        out_channels: width of the deepest layer.
        classes: number of classes.
        size: how many times larger the maps of the shallow layer are, as (height, width).
        width: width inside the bottleneck; 128 in the authors' code.
    """

    def __init__(
        self, channels: int, out_channels: int, classes: int, size: Sequence[int] = (1, 1), width: int = 128
    ) -> None:
        super().__init__()
        kernel = (size[0], size[1])
        self.enter, self.enter_norm = nn.Conv2d(channels, width, 1), ValidNorm(width)
        self.reduce, self.reduce_norm = nn.Conv2d(width, width, kernel, stride=kernel), ValidNorm(width)
        self.leave, self.leave_norm = nn.Conv2d(width, out_channels, 1), ValidNorm(out_channels)
        self.classifier = nn.Linear(out_channels, classes)
        for layer in (self.enter, self.reduce, self.leave):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, features: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the class scores ``(B, K)`` and the features ``(B, C)`` of the exit.

        Args:
            features: maps ``(B, C, H, W)``, or vectors ``(B, C)``.
            valid: ``(B, H, W)``, > 0 for the positions that count; ``None`` for all.
        """
        maps = features[:, :, None, None] if features.ndim == 2 else features
        with torch.autocast(features.device.type, enabled=False):
            maps = self.enter_norm(self.enter(inside(maps, valid).to(self.enter.weight.dtype)), valid).relu()
            kernel = self.reduce.kernel_size
            valid = None if valid is None else F.max_pool2d(valid[:, None].float(), kernel)[:, 0]  # type: ignore[arg-type]
            maps = self.reduce_norm(self.reduce(maps), valid).relu()
            maps = self.leave_norm(self.leave(maps), valid).relu()
            vectors, _ = mean_of_each(maps, valid)
            return self.classifier(vectors.to(self.classifier.weight.dtype)), vectors


def exit_imitation(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    student_features: Tensor,
    teacher_features: Tensor,
    temperature: float = 3.0,
    *,
    alpha: float = 0.5,
    feature_weight: float = 6.4e-5,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""The loss of one exit: labels, softened class probabilities and features of the deepest layer (equations 4 to 6).

    .. math:: (1 - \alpha)\,\mathrm{CE}(y, q) + \alpha\,T^2\,\mathrm{KL}(q_C^T \,\|\, q^T) + \lambda\,\|F - F_C\|_2^2

    Args:
        student_logits, teacher_logits: ``(N, K)`` of the exit and of the deepest layer.
        labels: classes ``(N,)``; samples with a label outside 0 … K − 1 are left out.
        student_features, teacher_features: ``(N, C)`` of the exit and of the deepest layer.
        temperature: T > 0.
        alpha: α in [0, 1].
        feature_weight: λ, on a sum over channels.
        reduction: over the samples that are not left out; ``"none"`` gives ``(N,)``.

    Raises:
        DistillError: shapes differ, or α or λ makes no sense.
    """
    check_share("exit_imitation", "alpha", alpha)
    check_number("exit_imitation", "feature_weight", feature_weight)
    same_shape(student_features, teacher_features, "exit_imitation")
    counted = (labels >= 0) & (labels < student_logits.shape[-1])
    # What is left out must not reach the gradient, not even with an infinity (0 · inf is NaN).
    s, t, own, deep = (
        upcast(x).masked_fill(~counted[:, None], 0)
        for x in (student_logits, teacher_logits, student_features, teacher_features)
    )
    settings = dict(temperature=temperature, hard_weight=1 - alpha)
    classes = mixed_targets(s, t, labels.masked_fill(~counted, -100), **settings, reduction="none")  # type: ignore[arg-type]
    return reduce_loss(classes + feature_weight * (own - deep).square().sum(1), counted.to(s.dtype), reduction)
