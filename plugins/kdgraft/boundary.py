"""Samples near a classifier's decision boundary: which samples to start from, which class to go to, and the way there.

Heo, Lee, Yun, Choi, "Knowledge Distillation with Adversarial Samples Supporting Decision Boundary", AAAI 2019, arXiv 1805.05532,
sections 3 and 4, and the authors' code, bhheo/BSS_distillation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .distributed import gather_rows, rank
from .losses.reduction import upcast


def base_samples(student: Tensor, teacher: Tensor, labels: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Choose the samples that both models get right and in whose other probabilities they differ most. All processes must call this.

    Args:
        student, teacher: class scores ``(N, C)``.
        labels: the true classes ``(N,)``; samples with another number are left out.
        most: the number of samples to choose at most among those of all processes.

    Returns:
        The places of this process's chosen samples, in order, and the number of all chosen ones.
    """
    known = (labels >= 0) & (labels < student.shape[1])
    place = labels.masked_fill(~known, 0).long()
    ours, theirs = (upcast(scores).softmax(1) for scores in (student, teacher))
    right = known & (ours.argmax(1) == place) & (theirs.argmax(1) == place)
    differences = (theirs - ours).square().scatter(1, place[:, None], 0).sum(1).masked_fill(~right, -1)
    everyone = gather_rows(torch.stack([differences, torch.full_like(differences, rank())], 1))
    kept = torch.zeros(len(everyone), dtype=torch.bool, device=labels.device)
    kept[everyone[:, 0].argsort(descending=True, stable=True)[:most]] = True
    kept &= everyone[:, 0] >= 0
    return kept[everyone[:, 1] == rank()].nonzero()[:, 0], kept.sum()


def target_classes(teacher: Tensor, drawn: Tensor) -> Tensor:
    """Sample a class of each sample, other than the teacher's first, in proportion to the teacher's probabilities.

    Args:
        teacher: class scores ``(N, C)``.
        drawn: random numbers ``(N,)`` in [0, 1).

    Returns:
        The classes ``(N,)``.
    """
    probabilities, classes = upcast(teacher).softmax(1).sort(1, descending=True)
    steps = probabilities[:, 1:].cumsum(1)
    place = torch.searchsorted(steps, drawn[:, None].to(steps.dtype) * steps[:, -1:])
    return classes.gather(1, 1 + place.clamp(max=steps.shape[1] - 1))[:, 0]


def boundary_samples(
    scores: Callable[[Tensor], Tensor],
    images: Tensor,
    targets: Tensor,
    *,
    steps: int = 10,
    step_size: float = 0.3,
    bound: float | None = 2.5,
) -> Tensor:
    r"""Move samples from the class that the model gives them to another one, each until the model changes its mind.

    .. math:: x \leftarrow x + \eta\,(s_y - s_k + \epsilon)\,\frac{g}{\|g\|_2}, \qquad g = \nabla_x (s_k - s_y), \quad \epsilon = 10^{-4}

    Args:
        scores: maps samples to class scores ``(N, C)``, each of which depends on its own sample only.
        images: the samples ``(N, …)``.
        targets: the classes k ``(N,)`` to go to.
        steps: the largest number of steps.
        step_size: η.
        bound: the samples stay in [−bound, bound]; ``None`` for no bound.

    Returns:
        The moved samples, without a graph.
    """
    own: Tensor | None = None
    for _ in range(steps):
        images = images.detach().requires_grad_()
        with torch.enable_grad():
            found = upcast(scores(images))
        first = found.detach().argmax(1)
        own = first if own is None else own
        going = first == own
        if not going.any():
            break
        gap = (found.gather(1, own[:, None]) - found.gather(1, targets[:, None]))[:, 0]
        (slope,) = torch.autograd.grad(-gap.sum(), images)
        slope = upcast(slope)
        length = slope.flatten(1).norm(dim=1).clamp(min=torch.finfo(slope.dtype).tiny)
        size = step_size * (gap.detach() + 1e-4) * going / length
        images = images.detach() + (size.view(-1, *[1] * (slope.ndim - 1)) * slope).to(images.dtype)
        images = images if bound is None else images.clamp(-bound, bound)
    return images.detach()
