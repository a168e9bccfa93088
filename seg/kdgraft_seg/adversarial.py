"""``AdversarialMask``: a critic learns to distinguish the student's masks from the teacher's, and the student to prevent it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kdgraft.adapters import resize_to
from kdgraft.batch import Batch
from kdgraft.errors import DistillError, check_flag
from kdgraft.losses import Ratio, weighted_ratio
from kdgraft.losses.adversarial import Adversary
from kdgraft.registry import call
from kdgraft.taps import Recording
from kdgraft.terms import AdversarialTerm
from kdgraft.wiring import Wiring

from .critic import Critic
from .registry import TERMS


@TERMS.register
class AdversarialMask(AdversarialTerm):
    """Adversarial mask discriminator: holistic distillation of Structured KD (Liu et al. 2019, section 3.3), weight 0.1.

    In each training step the critic first learns, on detached class probabilities, to give the teacher's masks higher scores than
    the student's. Then the student's loss rewards high scores of its own masks. Positions that do not count are 0 in both masks;
    images without a position that counts are left out. The critic is not saved with the student; see
    :class:`kdgraft.AdversarialTerm`, also for what the log has.

    Self-attention needs (H·W)² numbers an image, where H and W are those of the masks divided by 8 and 16 (the default critic).
    This is little on the grid of the scores, but much with ``grid="labels"`` on large crops; use ``critic=dict(attention=0)``.

    Args:
        kind: ``"wgan-gp"``, ``"lsgan"`` or ``"hinge"``.
        penalty: factor on the gradient penalty; by default 10 for ``"wgan-gp"`` and 0 for the others.
        condition_on_image: give the critic the image too, resized to the masks' grid (as in the paper, but not in its code).
        critic: settings of :class:`~kdgraft_seg.critic.Critic`: ``channels``, ``attention``, ``spectral_norm``.
        lr, betas, weight_decay: settings of the critic's Adam (betas of Gulrajani et al. 2017).
        steps: critic steps per step of the student.
        tap, grid: see :meth:`kdgraft_seg.reader.SegReader.scores`.
    """

    def __init__(
        self,
        kind: Adversary = "wgan-gp",
        *,
        condition_on_image: bool = False,
        critic: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(kind, **settings)
        if not isinstance(critic, (Mapping, type(None))):
            raise DistillError(f"AdversarialMask: critic must be a dict of its settings, got {critic!r}")
        check_flag("AdversarialMask", "condition_on_image", condition_on_image)
        self.condition_on_image, self._critic = condition_on_image, dict(critic or {})

    def wire(self, wiring: Wiring) -> None:
        """Build the critic for the number of classes, and refuse more than one map."""
        super().wire(wiring)
        if len(self.rows) != 1:
            raise DistillError(f"{self.name}: takes one tap of one map, got {len(self.rows)}; add a term for each")
        (s,) = self.reader.tensors(wiring.student_recording, self.student_taps[0])
        settings = {"in_channels": s.shape[1] + 3 * self.condition_on_image, **self._critic}
        self.set_critic(call(Critic, settings, f"{self.name}: critic").to(s.device))

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        """Train the critic on detached masks, and return its judgement of the student's masks as the loss."""
        (pairs,) = self.pairs(student, teacher, batch)
        valid = pairs.weight
        assert valid is not None
        present = valid.flatten(1).any(1)
        fake, real = (self._masks(scores, valid, batch) for scores in (pairs.student, pairs.teacher))
        self.monitor = self.opponent.learn(real, fake, present)
        return weighted_ratio(self.opponent.verdict(fake), present)

    def _masks(self, scores: Tensor, valid: Tensor, batch: Batch) -> Tensor:
        """Return the class probabilities, with the image's channels if the critic sees them; 0 where a position does not count."""
        scores = scores.float()
        masks = scores.softmax(1) if scores.shape[1] > 1 else scores.sigmoid()
        if self.condition_on_image:
            images = batch.extra["images"].float()
            masks = torch.cat([masks, resize_to(images, masks.shape[-2:])], 1)
        return masks.masked_fill(~valid[:, None], 0)
