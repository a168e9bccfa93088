"""The assignment of ground truth to the priors of a dense head, and the regions of priors that follow from it."""

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
    """Result of the student's own assigner, with the N priors (anchors or points) of all levels in one row.

    Attributes:
        labels: ``(B, N)`` classes; ``num_classes`` is the background.
        given: ``(B, N)`` mask of the priors that the host gives to its assigner. The host counts the padding up to the size
            divisor as image.
        assigned: ``(B, N)`` mask of those of them that are neither ignored (in RetinaNet between two thresholds) nor left out
            of the sample (in RPN).
        inside: ``(B, N)`` mask of the priors whose centre lies in the image itself.
        anchors: ``(N, 4)`` boxes in pixels; for a point its coordinates, twice.
        strides: ``(N,)`` distances between the positions of a level, in pixels.
        num_per_level: the number of priors of each level.
        num_classes: the number of foreground classes.
        targets: ``(B, N, 4)`` as returned by the host's ``get_targets``; only defined at positives.
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
        """``(B, N)`` mask of assigned priors whose centre lies in the image itself."""
        return self.assigned & self.inside

    @property
    def positive(self) -> Tensor:
        """``(B, N)`` mask of priors that are assigned to an object."""
        return (self.labels >= 0) & (self.labels < self.num_classes) & self.valid

    @property
    def counted(self) -> Tensor:
        """The number of priors that the student's assigner gave an object, at least 1 an image, as mmdet counts them."""
        return ((self.labels >= 0) & (self.labels < self.num_classes)).sum(1).clamp(min=1).sum()

    def weights(self, anchors: Anchors, batch: Batch, variant: Literal["paper", "code"] = "paper") -> Tensor:
        """Return weights ``(B, N)``: 1 at ``"all"`` valid priors or at the positives (``"main"``), the IoU in the ``"vlr"``.

        The ``"vlr"`` has lower IoUs than the positives, at which some assigners ignore priors. It is therefore chosen among all
        priors that the host gives to its assigner.
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
        # The thresholds are those of an assigner, so they are computed from the anchors that it gets, including the padding's.
        weights = self.anchors.new_zeros(len(self.anchors))
        counts = torch.stack([level.sum() for level in given.split(self.num_per_level)]).tolist()
        weights[given] = valuable_region(self.anchors[given], counts, boxes, variant=variant)
        return weights
