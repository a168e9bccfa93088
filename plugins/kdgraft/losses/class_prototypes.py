"""Intra-class feature variation: the similarity of each pixel's feature to the prototype of its class.

Wang, Zhou, Jiang, Bai, Xu, "Intra-class Feature Variation Distillation for Semantic Segmentation" (IFVD), ECCV 2020.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DistillError
from .reduction import Reduction, reduce_loss, upcast
from .scale import bounded


def class_prototypes(
    student: Tensor, teacher: Tensor, labels: Tensor, *, ignore_index: int = 255, reduction: Reduction = "mean"
) -> Tensor:
    r"""Class prototypes (IFVD): squared difference of each pixel's cosine to its class's mean feature.

    .. math:: \frac{1}{N} \sum_p \big(\cos(f^s_p, \bar f^s_{c(p)}) - \cos(f^t_p, \bar f^t_{c(p)})\big)^2

    A prototype is the mean over the pixels of one class in one image, as in the authors' code.

    Args:
        student, teacher: features ``(B, C, H, W)`` on one grid; the numbers of channels may differ.
        labels: classes ``(B, H, W)`` on the same grid.
        ignore_index: the label of pixels to exclude.
        reduction: over the pixels that are not ignored; ``"none"`` gives ``(B, H, W)``. (The authors divide by all pixels.)

    Raises:
        DistillError: features and labels do not lie on one grid.
    """
    grids = {tuple(x.shape[:1] + x.shape[-2:]) for x in (student, teacher, labels)}
    if len(grids) != 1 or labels.ndim != 3:
        raise DistillError(
            f"class_prototypes: student {tuple(student.shape)}, teacher {tuple(teacher.shape)} and labels "
            f"{tuple(labels.shape)} must lie on one grid"
        )
    valid = labels != ignore_index
    groups = _groups(labels, valid)
    items = (_cosines(upcast(student), groups, valid) - _cosines(upcast(teacher), groups, valid)).square()
    return reduce_loss(items, valid.to(items.dtype), reduction)


def _groups(labels: Tensor, valid: Tensor) -> Tensor:
    """Assign each pixel the number of its (image, class); ignored pixels form a group of their own."""
    classes = int(labels.masked_fill(~valid, 0).max()) + 2 if labels.numel() else 1
    own = labels.masked_fill(~valid, classes - 1)
    image = torch.arange(len(labels), device=labels.device).view(-1, 1, 1)
    return own + image * classes


def _cosines(maps: Tensor, groups: Tensor, valid: Tensor) -> Tensor:
    features = maps.masked_fill(~valid[:, None], 0).permute(0, 2, 3, 1).flatten(0, 2)
    index = groups.flatten()
    count = int(index.max()) + 1 if index.numel() else 0
    sums = features.new_zeros(count, features.shape[1]).index_add(0, index, features)
    sizes = features.new_zeros(count).index_add(0, index, torch.ones_like(features[:, 0]))
    prototypes = sums / sizes.clamp(min=1)[:, None]
    return F.cosine_similarity(bounded(features, 1), bounded(prototypes, 1)[index], dim=1, eps=1e-8).view(groups.shape)
