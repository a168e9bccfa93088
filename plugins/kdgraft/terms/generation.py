"""Terms with a trainable module per map that add up the squared errors of an image, as the authors of MGD and FGD do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..balance import Weight
from ..batch import Batch
from ..distributed import SharedRandom, rank
from ..errors import DistillError, WiringError, check_number, check_share
from ..listing import NEEDS
from ..losses import Ratio, focal_attention, focal_features, masked_generation, weighted_ratio
from ..losses.focal_global import GlobalRelation, box_scales
from ..losses.masked_generation import FeatureGenerator
from ..losses.masking import images_present
from ..losses.soft_targets import check_temperature
from ..registry import TERMS
from ..taps import Recording, Tap
from .base import Taps, Wiring, sum_of
from .features import FeatureTerm, check_in_image


class PerImageTerm(FeatureTerm):
    """Base of terms with a loss per image: the mean over images, added up over maps such as the levels of a pyramid.

    Images without a position that counts are not included in the mean.

    A subclass builds its module for a map in :meth:`build_module` and computes the loss in :meth:`per_image`.

    Example:
        >>> class Scaled(PerImageTerm):
        ...     def build_module(self, channels):
        ...         return nn.Conv2d(channels, channels, 1)
        ...
        ...     def per_image(self, module, student, teacher, valid, batch):
        ...         return (module(student) - teacher).square().sum((1, 2, 3))
        >>> list(Distiller(student, teacher, [Scaled("conv")], example=images)(images).losses)
        ['distill.scaled.loss']
    """

    reads = "features"
    needs: ClassVar[tuple[str, ...]] = ("maps",)

    def __init__(self, tap: Taps | None = None, **settings: Any) -> None:
        super().__init__(tap, **settings)
        self.parts = nn.ModuleList()

    def check_pair(self, student: Tensor, teacher: Tensor, student_tap: Tap, teacher_tap: Tap, wiring: Wiring) -> None:
        check_in_image(self, teacher_tap, wiring)

    def wire(self, wiring: Wiring) -> None:
        super().wire(wiring)
        for s, t, _, _ in self.pairs(wiring.student_recording, wiring.teacher_recording):
            self.parts.append(self.build_module(t.shape[1]).to(s.device))

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        ratios = []
        for module, (s, t, valid) in zip(self.parts, self.aligned(student, teacher, batch), strict=True):
            ratios.append(weighted_ratio(self.per_image(module, s, t, valid, batch), images_present(valid)))
        return sum_of(ratios)

    def build_module(self, channels: int) -> nn.Module:
        """Build the trainable part for a map with this number of the teacher's channels."""
        raise NotImplementedError

    def per_image(
        self, module: nn.Module, student: Tensor, teacher: Tensor, valid: Tensor | None, batch: Batch
    ) -> Tensor:
        """Compute the losses ``(B,)`` of the adapted student's and the teacher's maps ``(B, C, H, W)``; ``valid`` ``(B, H, W)``."""
        raise NotImplementedError


@TERMS.register
class MaskedGeneration(PerImageTerm):
    """Generation of the teacher's features from the student's randomly masked ones (MGD; Yang et al. 2022, 2205.01529).

    Squared errors are summed over channels and positions, divided by the number of images, and added up over maps, as the
    authors do; their weights are 2e-5 at ``mask_ratio`` 0.65 for one-stage detectors, 5e-7 at 0.45 for two-stage ones and 2e-5 at
    0.75 for segmentation. The masks are drawn from a random stream of the term's own, image by image in the order of ranks, so
    that two processes with two images each use the same masks as one process with four.

    Args:
        tap: maps ``(B, C, H, W)``; a detector's pyramid (``"neck[*]"``) by default.
        mask_ratio: fraction of the positions that are masked, in [0, 1].
        adapter: adapter for channels that differ; ``"auto"`` builds a 1×1 convolution where they do, and none otherwise.
        region: see :class:`FeatureTerm`; positions with weight 0 are excluded, the others have equal weight.

    Example:
        >>> term = MaskedGeneration("conv", mask_ratio=0.5)
        >>> list(Distiller(student, teacher, [term], example=images)(images).losses)
        ['distill.masked_generation.loss']
    """

    def __init__(
        self, tap: Taps | None = None, *, mask_ratio: float = 0.65, weight: Weight = 2e-5, **settings: Any
    ) -> None:
        super().__init__(tap, weight=weight, **settings)
        check_share("MaskedGeneration", "mask_ratio", mask_ratio)
        self.mask_ratio = mask_ratio
        self._random = SharedRandom()

    def build_module(self, channels: int) -> nn.Module:
        return FeatureGenerator(channels)

    def per_image(
        self, module: nn.Module, student: Tensor, teacher: Tensor, valid: Tensor | None, batch: Batch
    ) -> Tensor:
        if valid is not None:
            valid = (valid > 0).to(torch.float32)
        return masked_generation(student, teacher, module, self._keep(teacher), valid=valid, reduction="none")

    def _keep(self, maps: Tensor) -> Tensor:
        """Draw the mask ``(B, H, W)``, true where the generator sees the student's features; each image has its own seed."""
        seed = int(torch.randint(2**31, (), generator=self._random.of_all_ranks()))
        first = rank() * len(maps)
        drawn = [
            torch.rand(maps.shape[-2:], generator=torch.Generator().manual_seed(seed + first + image))
            for image in range(len(maps))
        ]
        return (torch.stack(drawn) >= self.mask_ratio).to(maps.device)

    def hidden_state(self) -> dict[str, Any]:
        return {"random": self._random.state()}

    def load_hidden_state(self, state: Mapping[str, Any]) -> None:
        self._random.load(state["random"])


@TERMS.register
class FocalGlobal(PerImageTerm):
    """Attention-weighted features, with foreground and background separated, and their global relation (FGD; 2111.11837).

    Yang et al., CVPR 2022. Errors are summed over channels and positions, divided by the number of images and added up over the
    levels of the pyramid, as in the authors' code. The defaults are theirs for RetinaNet and GFL; for two-stage detectors they use
    ``alpha`` 5e-5, ``beta`` 2.5e-5, ``gamma`` 5e-5 and ``lambda_`` 5e-7. Padding is excluded (in their code it is background).

    Args:
        tap: maps ``(B, C, H, W)``; a detector's pyramid (``"neck[*]"``) by default.
        temperature: T > 0 of the attentions.
        alpha, beta: weights of the squared errors on foreground and background; see :func:`kdgraft.losses.focal_global.box_scales`.
        gamma: weight of the attentions' absolute errors.
        lambda_: weight of the global relation's squared errors; each model has a small trainable block for it on each map.
        adapter: adapter for channels that differ; ``"auto"`` builds a 1×1 convolution where they do, and none otherwise.
        weight: factor on the sum of the four parts.

    Example:
        >>> distiller = Distiller(student, teacher, [FocalGlobal("conv")], example=images)
        >>> boxes = [torch.tensor([[0.0, 0.0, 4.0, 4.0]]), torch.zeros(0, 4)]
        >>> list(distiller(images, batch=Batch(padded_size=(8, 8), boxes=boxes)).losses)
        ['distill.focal_global.loss']
    """

    needs = ("maps", "boxes")

    def __init__(
        self,
        tap: Taps | None = None,
        *,
        temperature: float = 0.5,
        alpha: float = 1e-3,
        beta: float = 5e-4,
        gamma: float = 5e-4,
        lambda_: float = 5e-6,
        **settings: Any,
    ) -> None:
        super().__init__(tap, region="all", **settings)
        check_temperature(temperature)
        for key, value in dict(alpha=alpha, beta=beta, gamma=gamma, lambda_=lambda_).items():
            check_number("FocalGlobal", key, value)
        self.temperature = temperature
        self.alpha, self.beta, self.gamma, self.lambda_ = alpha, beta, gamma, lambda_

    def wire(self, wiring: Wiring) -> None:
        if "boxes" not in wiring.fields:
            raise WiringError(f"{self.name} needs {NEEDS['boxes']}, not given here; use MaskedGeneration")
        super().wire(wiring)

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
