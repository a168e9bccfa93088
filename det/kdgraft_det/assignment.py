"""Where the ground truth puts the positives of a dense head, and the regions of priors around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kdgraft.batch import Batch

from .heads import Anchors
from .regions import valuable_region


@dataclass
class Assignment:
    """Where the student's own assigner put the ground truth; all levels in one row of N priors (anchors or points).

    Attributes:
        labels: ``(B, N)``, the background being ``num_classes``.
        given: ``(B, N)`` priors that the host gave its assigner, which counts an image's padding up to the size divisor
            as image.
        assigned: ``(B, N)`` those of them that were neither ignored (RetinaNet's between two thresholds) nor left out
            of a sample (RPN's).
        inside: ``(B, N)`` priors whose centre lies in the image itself.
        anchors: ``(N, 4)`` in pixels; of a point the point itself, twice.
        strides: ``(N,)`` pixels between the positions of a level.
        num_per_level: how many of the N each level has.
        num_classes: number of foreground classes.
        targets: ``(B, N, 4)`` as the host's ``get_targets`` has them; they mean something at positives alone.
    """

    labels: Tensor
    given: Tensor
    assigned: Tensor
    inside: Tensor
    anchors: Tensor
    strides: Tensor
    num_per_level: list[int]
    num_classes: int
    targets: Tensor

    @property
    def valid(self) -> Tensor:
        """``(B, N)`` assigned priors whose centre lies in the image itself."""
        return self.assigned & self.inside

    @property
    def positive(self) -> Tensor:
        """``(B, N)`` priors that hold an object."""
        return (self.labels >= 0) & (self.labels < self.num_classes) & self.valid

    def weights(self, anchors: Anchors, batch: Batch, variant: Literal["paper", "code"] = "paper") -> Tensor:
        """``(B, N)``: 1 on ``"all"`` valid priors or on the positives (``"main"``), the IoU in the ``"vlr"``.

        The last lies below the positives, where some assigners ignore: it is taken from all priors that the host gave.
        """
        if anchors == "all":
            return self.valid.float()
        if anchors == "main":
            return self.positive.float()

        def find() -> Tensor:
            assert batch.boxes is not None
            images = zip(self.given, batch.boxes, strict=True)
            found = torch.stack([self._valuable(given, b.to(self.anchors), variant) for given, b in images])
            return found * self.inside

        return batch.once(("vlr", variant, id(self)), find)

    def _valuable(self, given: Tensor, boxes: Tensor, variant: Literal["paper", "code"]) -> Tensor:
        # The thresholds are an assigner's, so they are taken from the anchors that it gets, padding and all.
        weights = self.anchors.new_zeros(len(self.anchors))
        counts = torch.stack([level.sum() for level in given.split(self.num_per_level)]).tolist()
        weights[given] = valuable_region(self.anchors[given], counts, boxes, variant=variant)
        return weights
