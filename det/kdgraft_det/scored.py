"""Features of a dense detector, weighed by the teacher's class scores at each position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kdgraft.adapters import AdapterKind
from kdgraft.balance import Weight
from kdgraft.batch import Batch
from kdgraft.errors import WiringError
from kdgraft.losses import Ratio, weighted_ratio
from kdgraft.readers import Taps, paired
from kdgraft.taps import Recording, Tap
from kdgraft.terms.base import sum_of
from kdgraft.terms.features import FeatureImitation
from kdgraft.wiring import Wiring

from .dense import check_sigmoid
from .dense_heads import DenseHead, dense_head
from .registry import TERMS


@TERMS.register
class ScoredImitation(FeatureImitation):
    r"""Squared errors of the pyramid, weighed by the teacher's class scores (built into Ultralytics; pull request 24894).

    .. math:: \sum_l \frac{\sum_i p_{li} \frac1C \|r_l(s_{li}) - t_{li}\|^2}{\sum_i p_{li}}

    over the positions i of each level l, where :math:`p` is the teacher's highest class score at a position, of any anchor, and
    :math:`r` two 1×1 convolutions with a ReLU between them. The sums are taken over the whole batch and all processes, and padding
    is left out, which the authors' code counts in. Their weight of 6 stands beside a YOLO's losses of boxes (7.5), classes (0.5) and
    distances (1.5). They average the scores of the two heads of a YOLO26; here the teacher has one. A teacher of features has no
    scores: see the recipe ``ultralytics``.

    Only the teacher needs a dense head with a sigmoid for each class. Its classes may differ from the student's, as no class is
    compared.

    Args:
        tap, student_tap, teacher_tap: the maps that the teacher's head reads, one for each of its levels; the pyramid by default.
        adapter: ``"mlp"`` for the two convolutions; see :class:`~kdgraft.FeatureTerm` for others.
        loss: see :class:`~kdgraft.FeatureImitation`.
        region: see :class:`~kdgraft.FeatureTerm`; its weights multiply the scores.
    """

    reads = "features"
    hears_features = False
    head: DenseHead

    def __init__(
        self, tap: Taps | None = None, *, adapter: AdapterKind = "mlp", weight: Weight = 6.0, **settings: Any
    ) -> None:
        super().__init__(tap, adapter=adapter, weight=weight, **settings)

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        """Find the teacher's dense head, and refuse others, and softmax classes."""
        super().prepare(student, teacher)
        head = getattr(teacher, "bbox_head", None)
        found = None if head is None else dense_head(head, "bbox_head", "teacher", self.name)
        if not isinstance(found, DenseHead):
            raise WiringError(
                f"{self.name}: the teacher, a {type(teacher).__name__}, has no dense head that scores every position; use "
                "FeatureImitation with region='foreground'"
            )
        check_sigmoid(found, self.name)
        self.head, self._features = found, (list(self.student_taps), list(self.teacher_taps))
        self.teacher_taps = [*self.teacher_taps, *found.class_taps]

    def pairs(self, student: Recording, teacher: Recording) -> list[tuple[Tensor, Tensor, Tap, Tap]]:
        """Return the maps of both models in pairs, each with its tap."""
        return paired(self.reader, self._features, student, teacher)

    def wire(self, wiring: Wiring) -> None:
        """Build the adapters, and refuse maps that do not lie on the grids of the teacher's scores."""
        super().wire(wiring)
        maps = [tuple(t.shape[-2:]) for _, t, _, _ in self.pairs(wiring.student_recording, wiring.teacher_recording)]
        grids = [tuple(level.shape[-2:]) for level in wiring.teacher_recording.tensors(self.head.classes)]
        if maps != grids:
            raise WiringError(
                f"{self.name}: the teacher's maps {maps} must be those that its head scores, {grids}; tap neck[*]"
            )

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        """Return for each level the weighted sum of the errors, and the sum of the weights."""
        found = []
        for (s, t, weight), score in zip(self.aligned(student, teacher, batch), self.scores(teacher), strict=True):
            items = self.loss(s, t, dim=1, reduction="none")
            found.append(weighted_ratio(items, score if weight is None else score * weight))
        return sum_of(found)

    def scores(self, teacher: Recording) -> list[Tensor]:
        """Return the teacher's highest class score at each position ``(B, H, W)``, level by level."""
        levels, anchors = teacher.tensors(self.head.classes), self.head.num_priors
        counts = [level.shape[-2] * level.shape[-1] * anchors for level in levels]
        images = len(levels[0])
        chosen = torch.ones(images, sum(counts), dtype=torch.bool, device=levels[0].device)
        best = self.head.logits(teacher, chosen).detach().float().amax(1).sigmoid()
        by_level = best.split([images * count for count in counts])
        return [
            part.view(images, -1, anchors).amax(-1).view(images, *level.shape[-2:])
            for part, level in zip(by_level, levels, strict=True)
        ]
