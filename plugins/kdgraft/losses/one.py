"""On-the-fly native ensemble (ONE): branches learn from labels and from their own gated ensemble.

Lan, Zhu, Gong, "Knowledge Distillation by On-the-Fly Native Ensemble", NeurIPS 2018, arXiv 1806.04606, section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DistillError
from .reduction import Reduction, reduce_loss, same_shape, upcast
from .review import ValidNorm
from .soft_targets import soft_targets


class Gate(nn.Module):
    """The gate: shares of the branches from the features before them (equation 3).

    A linear map, a normalisation over the batch, a ReLU and a softmax, as in the authors' code. It computes in float32 even under
    autocast.

    Args:
        channels: width of the features.
        branches: number of branches.
    """

    def __init__(self, channels: int, branches: int) -> None:
        super().__init__()
        self.project, self.norm = nn.Linear(channels, branches), ValidNorm(branches)

    def forward(self, vectors: Tensor) -> Tensor:
        """Return the shares ``(N, M)`` of M branches for the features ``(N, C)``; those of a sample add up to 1."""
        with torch.autocast(vectors.device.type, enabled=False):
            scores = self.project(vectors.to(self.project.weight.dtype))
            return self.norm(scores[:, :, None, None])[:, :, 0, 0].relu().softmax(1)


def gated_scores(scores: Tensor, shares: Tensor) -> Tensor:
    """Return the class scores ``(N, K)`` of the ensemble: the branches' scores ``(M, N, K)`` by their shares ``(N, M)`` (equation 3)."""
    if shares.shape != scores.shape[1::-1]:
        raise DistillError(
            f"gated_scores: shares {tuple(shares.shape)} must be one of each sample and branch of scores {tuple(scores.shape)}"
        )
    return (upcast(scores) * upcast(shares).T[:, :, None]).sum(0)


def native_ensemble(
    scores: Tensor, ensemble: Tensor, labels: Tensor, temperature: float = 3.0, *, reduction: Reduction = "mean"
) -> Tensor:
    r"""The loss of branches and their ensemble, without the cross-entropy of the first branch, the student's own (equation 8).

    .. math:: \sum_{i=2}^{M} \mathrm{CE}(y, p_i) + \mathrm{CE}(y, p_e) + T^2 \sum_{i=1}^{M} \mathrm{KL}(p_e^T \,\|\, p_i^T)

    The KL gives no gradient to the ensemble, and the cross-entropy of the ensemble gives one to every branch.

    Args:
        scores: logits ``(M, N, K)`` of the branches, the student's first.
        ensemble: logits ``(N, K)`` of the ensemble, see :func:`gated_scores`.
        labels: classes ``(N,)``; samples with a label outside 0 … K − 1 are left out.
        temperature: T > 0.
        reduction: over the samples that are not left out; ``"none"`` gives ``(N,)``.

    Raises:
        DistillError: the shapes differ.
    """
    same_shape(scores[0], ensemble, "native_ensemble")
    counted = (labels >= 0) & (labels < ensemble.shape[-1])
    # What is left out must not reach the gradient, not even with an infinity (0 · inf is NaN).
    branches, together = (upcast(x).masked_fill(~counted[:, None], 0) for x in (scores, ensemble))
    targets = labels.masked_fill(~counted, -100)
    hard = [F.cross_entropy(one, targets, ignore_index=-100, reduction="none") for one in (*branches[1:], together)]
    soft = [soft_targets(one, together.detach(), temperature, reduction="none") for one in branches]
    return reduce_loss(torch.stack([*hard, *soft]).sum(0), counted.to(together.dtype), reduction)
