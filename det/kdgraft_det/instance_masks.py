"""Masks of instances: the teacher's mask of the same proposal, position or object is the student's target."""

from __future__ import annotations

from kdgraft.terms import MaskTerm

from .registry import TERMS


@TERMS.register
class InstanceMasks(MaskTerm):
    r"""Masks of instances: pixels and dice of the teacher's mask of the same object (as EdgeSAM's, arXiv 2312.06660).

    .. math:: \frac1K \sum_k \Big( \lambda_m \frac1P \sum_p \mathrm{KL}(t_{kp} \,\|\, s_{kp})
              + \lambda_d \big(1 - \mathrm{dice}(s_k, t_k)\big) \Big)

    over the K positives of the batch and all processes, each with P pixels whose probabilities are s and t; see
    :func:`~kdgraft.losses.mask_regression`. Zhou et al. compare the masks of two models at the same prompts by these two losses. Here
    the prompt is what the student's own training assigned to an object:

    * Mask R-CNN, Cascade Mask R-CNN: its positive proposals, on which the teacher's mask head runs too. A head with a mask for each
      class is read at the true class. The stages of a cascade have equal weights.
    * RTMDet-Ins: its positive positions. The kernels that the teacher predicts at the same positions draw the teacher's masks, on the
      whole image without its padding.
    * MaskFormer, Mask2Former: the queries of both models that the student's Hungarian matching assigns to the same object, on the
      whole image without its padding.

    Args:
        masks, dice: the weights λ of the two parts; those of Mask2Former by default. Mask R-CNN is trained with pixels alone, and
            RTMDet-Ins with dice alone.
    """

    pairs_from = "masks"
