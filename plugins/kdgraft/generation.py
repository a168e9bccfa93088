"""Terms that have a trainable module per map and add up an image's squared errors, as MGD's and FGD's authors do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import AdapterKind
from .distributed import SharedRandom, rank
from .errors import WiringError, check_share
from .losses import Ratio, masked_generation, weighted_ratio
from .losses.masked_generation import FeatureGenerator
from .regions import Batch
from .registry import TERMS
from .taps import Recording
from .terms import AdaptedTerm, Taps, Wiring, adapter_where_channels_differ, check_maps, sum_of


class PerImageImitation(AdaptedTerm):
    """Base: a loss per image, divided by the number of images; several maps (the levels of a pyramid) add up.

    An image without a position that counts is not counted.

    A subclass builds its module for a map in :meth:`build_module` and computes in :meth:`per_image`.
    """

    def __init__(self, tap: Taps | None = None, **settings: Any) -> None:
        super().__init__(tap, **settings)
        self.parts = nn.ModuleList()

    def wire(self, wiring: Wiring) -> None:
        pairs = self.pairs(wiring.student_recording, wiring.teacher_recording)
        for pair in pairs:
            check_maps(self, *pair)
            if not wiring.in_image(pair[3]):
                raise WiringError(
                    f"{self.name}: {pair[3]} yields maps of proposals, and this loss is one of images; tap a stage or the neck, "
                    "or take FeatureImitation"
                )
        super().wire(wiring)
        for s, t, _, _ in pairs:
            self.parts.append(self.build_module(t.shape[1]).to(s.device))

    def adapter_for(self, student: Tensor, teacher: Tensor) -> AdapterKind:
        return adapter_where_channels_differ(self.adapter_kind, student, teacher)

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        ratios = []
        for module, (s, t, valid) in zip(self.parts, self.aligned(student, teacher, batch), strict=True):
            present = None if valid is None else (valid.flatten(1) > 0).any(1)
            ratios.append(weighted_ratio(self.per_image(module, s, t, valid, batch), present))
        return sum_of(ratios)

    def build_module(self, channels: int) -> nn.Module:
        """The trainable part for a map of so many teacher's channels."""
        raise NotImplementedError

    def per_image(
        self, module: nn.Module, student: Tensor, teacher: Tensor, valid: Tensor | None, batch: Batch
    ) -> Tensor:
        """``(B,)`` from the adapted student's map and the teacher's, both ``(B, C, H, W)``; ``valid`` ``(B, H, W)`` or ``None``."""
        raise NotImplementedError


@TERMS.register
class MaskedGeneration(PerImageImitation):
    """The student's features, some positions left out at random, must generate the teacher's (MGD; Yang et al. 2022, 2205.01529).

    Squared errors are summed over channels and positions, divided by the number of images, and added up over maps, as the
    authors do; their weights are 2e-5 at ``mask_ratio`` 0.65 for one-stage detectors, 5e-7 at 0.45 for two-stage ones and 2e-5 at
    0.75 for segmentation. What is left out is drawn from a random stream of the term's own, image by image in the order of ranks,
    so that two processes of two images leave out what one of four does.

    Args:
        tap: maps ``(B, C, H, W)``.
        mask_ratio: share of the positions that the generator does not see, in [0, 1].
        adapter: for channels that differ; ``"auto"`` is none where they agree and a 1×1 convolution where they do not.
        region: ``"all"`` (padding excluded) or another; positions at weight 0 take no part, the others all alike.
    """

    def __init__(
        self,
        tap: Taps | None = "neck[*]",
        *,
        mask_ratio: float = 0.65,
        adapter: AdapterKind = "auto",
        region: Any = "all",
        student_tap: Taps | None = None,
        teacher_tap: Taps | None = None,
        weight: float = 2e-5,
        schedule: Any = None,
        name: str | None = None,
        source: str = "teacher",
    ) -> None:
        super().__init__(
            tap,
            adapter=adapter,
            region=region,
            student_tap=student_tap,
            teacher_tap=teacher_tap,
            weight=weight,
            schedule=schedule,
            name=name,
            source=source,
        )
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
        """Where the generator sees the student's features, ``(B, H, W)``; each image's draw has a seed of its own."""
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
