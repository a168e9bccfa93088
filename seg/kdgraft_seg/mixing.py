"""Mixup in segmentation: student and teacher see the same mixture of two images."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import Tensor

from kdgraft.consistent import mixed
from kdgraft.errors import WiringError
from kdgraft.terms.share import silences_task

from .reader import scores_pixels
from .relations import LabelledTerm


def check_mixable(student: Any) -> None:
    """Raise a :class:`WiringError` unless the terms of a grafted student, without any labels, are all that trains it."""
    if student.distiller is None:
        student.distill_context.raise_problem()
        raise WiringError("mixup is for distillation, as mixed images have no labels; give terms or a recipe as well")
    if not scores_pixels(student):
        raise WiringError(f"mixup is for classes of pixels, and the student, a {type(student).__name__}, has none")
    terms = student.distiller.all_terms
    labelled = [term.name for term in terms if isinstance(term, LabelledTerm) or "labels" in term.needs]
    if labelled:
        raise WiringError(f"mixup: {', '.join(labelled)} needs labels, which mixed images have none of; leave one out")
    if not silences_task(terms):
        raise WiringError(
            "mixup: mixed images have no labels for the student's own loss; add dict(type='TaskShare') to terms, which leaves it out"
        )


def mixed_batch(inputs: Tensor, data_samples: Any, ignored: int) -> tuple[Tensor, list[SegDataSample]]:
    """Mix each image of a batch with the one before it; the larger share is that of the image itself.

    Args:
        inputs: images ``(B, 3, H, W)``, padded to one size.
        data_samples: their samples.
        ignored: the label of pixels that do not count.

    Returns:
        The mixed images, and samples with the labels of the image of the larger share. Pixels that do not count in one of the two
        images are ignored.
    """
    share = float(torch.rand(()))
    share = max(share, 1 - share)
    counts = [sample.gt_sem_seg.data != ignored for sample in data_samples]
    found = []
    for place, sample in enumerate(data_samples):
        label = torch.where(counts[place] & counts[place - 1], sample.gt_sem_seg.data, ignored)
        found.append(SegDataSample(metainfo=sample.metainfo, gt_sem_seg=PixelData(data=label)))
    return mixed(inputs, share), found
