"""Focal and global distillation of a detector's features."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from kdgraft.adapters import AdapterKind
from kdgraft.errors import DistillError, check_number
from kdgraft.generation import PerImageImitation
from kdgraft.losses import focal_attention, focal_features
from kdgraft.losses.focal_global import GlobalRelation, box_scales
from kdgraft.losses.soft_targets import check_temperature
from kdgraft.regions import Batch
from kdgraft.terms import Taps

from .registry import TERMS


@TERMS.register
class FocalGlobal(PerImageImitation):
    """Features of objects and background apart, under the teacher's attention, and their global relation (FGD; 2111.11837).

    Yang et al., CVPR 2022. Sums over channels and positions, divided by the number of images and added up over the levels of the
    pyramid, as in the authors' code. The defaults are theirs for RetinaNet and GFL. Their two-stage detectors have ``alpha`` 5e-5,
    ``beta`` 2.5e-5, ``gamma`` 5e-5 and ``lambda_`` 5e-7. Padding takes no part (in their code it is background).

    Args:
        tap: maps ``(B, C, H, W)``.
        temperature: T > 0 of the attentions.
        alpha, beta: of the squared errors on foreground and background; see :func:`kdgraft.losses.focal_global.box_scales`.
        gamma: of the attentions' absolute errors.
        lambda_: of the relation's squared errors, for which a small trainable block stands on either side of each map.
        adapter: for channels that differ; ``"auto"`` is none where they agree and a 1×1 convolution where they do not.
        weight: of all four.
    """

    def __init__(
        self,
        tap: Taps | None = "neck[*]",
        *,
        temperature: float = 0.5,
        alpha: float = 1e-3,
        beta: float = 5e-4,
        gamma: float = 5e-4,
        lambda_: float = 5e-6,
        adapter: AdapterKind = "auto",
        student_tap: Taps | None = None,
        teacher_tap: Taps | None = None,
        weight: float = 1.0,
        schedule: Any = None,
        name: str | None = None,
        source: str = "teacher",
    ) -> None:
        super().__init__(
            tap,
            adapter=adapter,
            student_tap=student_tap,
            teacher_tap=teacher_tap,
            weight=weight,
            schedule=schedule,
            name=name,
            source=source,
        )
        check_temperature(temperature)
        for key, value in dict(alpha=alpha, beta=beta, gamma=gamma, lambda_=lambda_).items():
            check_number("FocalGlobal", key, value)
        self.temperature = temperature
        self.alpha, self.beta, self.gamma, self.lambda_ = alpha, beta, gamma, lambda_

    def build_module(self, channels: int) -> nn.Module:
        return GlobalRelation(channels)

    def per_image(
        self, module: nn.Module, student: Tensor, teacher: Tensor, valid: Tensor | None, batch: Batch
    ) -> Tensor:
        if batch.boxes is None or batch.padded_size is None:
            raise DistillError(f"{self.name} needs a batch with boxes and the padded size")
        foreground, background = box_scales(batch.boxes, batch.padded_size, teacher, valid=valid)
        scale = self.alpha * foreground + self.beta * background
        focal = focal_features(student, teacher, scale, self.temperature, valid=valid, reduction="none")
        attention = focal_attention(student, teacher, self.temperature, valid=valid, reduction="none")
        relation: Tensor = module(student, teacher, valid=valid, reduction="none")
        return focal + self.gamma * attention + self.lambda_ * relation
