"""Terms whose learned tokens mark regions of the teacher's features, or of their frequency bands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..errors import DistillError, check_flag, check_number
from ..losses import Ratio, frequency_imitation, hint, masked_imitation, weighted_ratio
from ..losses.frequency import FrequencyPrompts
from ..losses.masking import image_means, images_present, inside
from ..losses.receptive_tokens import ReceptiveTokens
from ..losses.reduction import upcast
from ..registry import RECIPES, TERMS
from ..taps import Tap
from .base import Taps, check_choice, sum_of
from .pretrained import Level, PretrainedTerm


class TokenTerm(PretrainedTerm):
    """Base of terms with tokens for each map: the loss of an image's map, given its tokens, added up over maps.

    A subclass builds the tokens in :meth:`build_network` and compares an image in :meth:`per_image`.

    Args:
        objective: ``"task"`` trains the tokens as the authors do, on the teacher's own loss of the masked features, where the host
            can compute it (detectors and segmentors), and otherwise on the features; ``"features"`` on the features everywhere.
        lr: see :class:`PretrainedTerm`.
    """

    adapts_always = True

    def __init__(
        self,
        tap: Taps | None = None,
        *,
        objective: Literal["task", "features"] = "task",
        lr: float = 0.01,
        **settings: Any,
    ) -> None:
        super().__init__(tap, lr=lr, **settings)
        check_choice(self, "objective", objective, ("task", "features"))
        self.objective, self.examines = objective, objective == "task" and self.network_file is None

    def lessons(self, networks: Sequence[nn.Module], levels: Sequence[Level], count: int) -> dict[str, Tensor]:
        if self.examiner is None or not self.examines:
            return super().lessons(networks, levels, count)
        overlaps: dict[int, Tensor] = {}

        def masked(tap: Tap, number: int, features: Tensor) -> Tensor:
            place = self.places.get((tap, number), -1)
            if place < 0 or features.shape != levels[place][1].shape:
                return features
            weight = levels[place][2]
            kept, overlap = cast(Any, networks[place]).masked(upcast(features), weight)
            overlaps[place] = weighted_ratio(overlap, images_present(weight)).numerator
            if weight is not None:
                kept = torch.where((weight > 0)[:, None], kept, features)
            return kept.to(features.dtype).contiguous()  # some heads view it

        task = self.examiner(masked)
        if len(overlaps) != len(networks):
            raise DistillError(
                f"{self.name}: the teacher's own loss does not read {', '.join(map(str, self.teacher_taps))} as its predictions "
                "do; set objective='features'"
            )
        return {"overlap": torch.stack(list(overlaps.values())).sum(), "task": task.float() * count}

    def lesson(self, network: nn.Module, teacher: Tensor, valid: Tensor | None) -> Mapping[str, Tensor]:
        assert isinstance(network, (ReceptiveTokens, FrequencyPrompts))
        return network.errors(teacher, valid)

    def teach(self, networks: Sequence[nn.Module], levels: Sequence[Level], batch: Batch) -> Ratio:
        ratios = []
        for network, (s, t, weight) in zip(networks, levels, strict=True):
            items = self.per_image(network, upcast(s), upcast(t), weight)
            ratios.append(weighted_ratio(items, images_present(weight)))
        return sum_of(ratios)

    def per_image(self, network: Any, student: Tensor, teacher: Tensor, valid: Tensor | None) -> Tensor:
        """Compute the losses ``(B,)`` of the adapted student's and the teacher's maps ``(B, C, H, W)``; ``valid`` ``(B, H, W)``."""
        raise NotImplementedError


@TERMS.register
@RECIPES.register("maskd")
class MasKD(TokenTerm):
    """Masked distillation with receptive tokens (MasKD; Huang et al. 2023, arXiv 2205.14589).

    Tokens first learn to mark regions (masks) of the teacher's features that do not overlap (Dice) and that the task needs: the
    teacher's own loss of the masked features. Then the student imitates the features within each mask. The losses of several maps
    are added. In hosts that know no loss of the teacher (plain PyTorch and Hugging Face) the masked features must restore the
    features instead, which is not the authors' objective.

    Args:
        tap: maps ``(B, C, H, W)``; a detector's pyramid or a segmentor's last stage by default.
        tokens: number of tokens: 6 for detectors, 8 for class scores of segmentors in the authors' code.
        weigh_masks: learn the importance of each mask in an image; false in the authors' code for segmentors.
        student_masks_after: number of steps of teaching after which the masks are multiplied by those that the tokens find in the
            student's features (5000 to 8500 in the authors' configs, by detector); ``None`` for never.
        objective: ``"task"``, or ``"features"`` for tokens whose masked features restore the features in every host.
        adapter, region: see :class:`~kdgraft.FeatureTerm`; by default each map has a 1×1 convolution, as in the authors' code.
        weight: in the authors' configs 1 for Faster R-CNN and Cascade R-CNN, 7 for RetinaNet, 10 for FCOS and RepPoints on COCO,
            and 0.5 for class scores of segmentors. The loss is a mean over images, channels and marked positions: batch size and
            map size do not change its scale.
        pretrain, network, save_network, lr, betas, weight_decay: see :class:`~kdgraft.PretrainedTerm`. The authors train for 2000
            iterations of 16 images, FCOS' tokens with Adam at 0.01 and the others with SGD at 0.1.

    Example:
        >>> distiller = Distiller(student, teacher, [MasKD("conv", pretrain=1)], example=images)
        >>> sorted(distiller(images).losses)
        ['distill.mas_kd.loss', 'distill.mas_kd.overlap', 'distill.mas_kd.unmasked']
        >>> bool(distiller(images).loss > 0)
        True
    """

    def __init__(
        self,
        tap: Taps | None = None,
        *,
        tokens: int = 6,
        weigh_masks: bool = True,
        student_masks_after: int | None = 5000,
        **settings: Any,
    ) -> None:
        super().__init__(tap, **settings)
        check_number("MasKD", "tokens", tokens, 1, whole=True)
        check_flag("MasKD", "weigh_masks", weigh_masks)
        if student_masks_after is not None:
            check_number("MasKD", "student_masks_after", student_masks_after, whole=True)
        self.tokens, self.weigh_masks, self.student_masks_after = tokens, weigh_masks, student_masks_after

    def build_network(self, student: Tensor, teacher: Tensor) -> nn.Module:
        return ReceptiveTokens(teacher.shape[1], self.tokens, self.weigh_masks)

    def per_image(self, network: Any, student: Tensor, teacher: Tensor, valid: Tensor | None) -> Tensor:
        masks = network.masks(teacher, valid)
        if self.student_masks_after is not None and self.taught >= self.student_masks_after:
            masks = masks * network.masks(student.detach(), valid)
        shares = network.shares(teacher, valid)
        return masked_imitation(student, teacher, masks, shares=shares, valid=valid, reduction="none")


@TERMS.register
@RECIPES.register("freekd")
class FreeKD(TokenTerm):
    """Frequency distillation with semantic prompts (FreeKD; Zhang et al. 2024, arXiv 2311.12079).

    Prompts first learn to mark coefficients of a Haar transform of the teacher's features: masks that do not overlap (Dice) and
    that the task needs, as in :class:`MasKD`. Then the student's high bands follow the teacher's within the masks, beside a
    squared error of the features. The losses of several maps are added.

    The transform, the masks, the loss of the bands and the squared error are those of the authors' code (Gumpest/FreeKD@e0874f5),
    which has no low band in the loss and nothing of the paper's position-aware weights of channels; these are left out here, too.
    The authors' config for RetinaNet adds a smooth L1 error between the two models' box regressions.

    Args:
        tap: maps ``(B, C, H, W)``; a detector's pyramid or a segmentor's last stage by default.
        prompts: number of prompts of each level of bands.
        objective: see :class:`MasKD`.
        imitation: weight of the squared error of the features, a mean over channels and positions; 5 in the authors' code.
        adapter, region: see :class:`~kdgraft.FeatureTerm`; by default each map has a 1×1 convolution, as in the authors' code.
        weight: 1 in the authors' code, for RetinaNet on COCO. The loss is a mean over images, prompts, channels and coefficients:
            batch size and map size do not change its scale.
        pretrain, network, save_network, lr, betas, weight_decay: see :class:`~kdgraft.PretrainedTerm`.

    Example:
        >>> distiller = Distiller(student, teacher, [FreeKD("conv", pretrain=1)], example=images)
        >>> [bool(distiller(images).loss > 0) for step in range(2)]
        [False, True]
    """

    def __init__(self, tap: Taps | None = None, *, prompts: int = 6, imitation: float = 5.0, **settings: Any) -> None:
        super().__init__(tap, **settings)
        check_number("FreeKD", "prompts", prompts, 1, whole=True)
        check_number("FreeKD", "imitation", imitation)
        self.prompts, self.imitation = prompts, imitation

    def build_network(self, student: Tensor, teacher: Tensor) -> nn.Module:
        return FrequencyPrompts(teacher.shape[1], self.prompts)

    def per_image(self, network: Any, student: Tensor, teacher: Tensor, valid: Tensor | None) -> Tensor:
        masks = network.masks(teacher, valid)
        bands = frequency_imitation(student, teacher, masks, valid=valid, reduction="none")
        errors = hint(inside(student, valid), inside(teacher, valid), reduction="none")
        return bands + self.imitation * image_means(errors, valid)
