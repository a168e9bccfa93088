"""The critic of adversarial distillation: a network that scores masks, and its training beside the student's.

Liu et al., "Structured Knowledge Distillation for Semantic Segmentation", CVPR 2019, arXiv 1903.04197, section 3.3 and the
authors' code; the layers are those of SAGAN (Zhang et al. 2018, arXiv 1805.08318).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm as normalised

from kdgraft.auxiliary import Auxiliary
from kdgraft.distributed import rank, world_size
from kdgraft.errors import DistillError
from kdgraft.losses.adversarial import Adversary, critic_loss, gradient_penalty


class SelfAttention(nn.Module):
    """Self-attention over positions, added with a factor γ that starts at 0 (SAGAN).

    It maps ``(B, C, H, W)`` to the same shape and holds (H·W)² numbers an image.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(channels // 8, 1)
        self.query, self.key = nn.Conv2d(channels, inner, 1), nn.Conv2d(channels, inner, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, maps: Tensor) -> Tensor:
        """Return maps of the same shape ``(B, C, H, W)``."""
        query, key, value = (layer(maps).flatten(2) for layer in (self.query, self.key, self.value))
        attention = (query.transpose(1, 2) @ key).softmax(2)
        return maps + self.gamma * (value @ attention.transpose(1, 2)).view_as(maps)


class Critic(nn.Module):
    """Scores masks, each sample independently of the others (nothing is normalised over the batch).

    The layers are 4×4 convolutions of stride 2 with LeakyReLU 0.1, self-attention after the last two, a 3×3 convolution to one
    channel, and the mean over positions. (The authors' last convolution is 4×4 without padding and assumes masks of 65×65. Their
    batch normalisation of the input would make samples depend on each other, which the gradient penalty does not allow.) Masks
    with less than 2 ** len(channels) positions a side are padded with 0.

    Args:
        in_channels: the number of classes, plus 3 if the critic sees the image.
        channels: the width of each convolution.
        attention: the number of last convolutions that self-attention follows.
        spectral_norm: normalise the weights of the strided convolutions spectrally, as in the authors' code.
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int] = (64, 128, 256, 512),
        attention: int = 2,
        spectral_norm: bool = True,
    ) -> None:
        super().__init__()
        if not channels or not all(isinstance(width, int) and width > 0 for width in channels):
            raise DistillError(f"the critic's channels must be whole numbers > 0, got {channels!r}")
        if not 0 <= attention <= len(channels):
            raise DistillError(f"the critic's attention must be between 0 and {len(channels)}, got {attention!r}")
        layers: list[nn.Module] = []
        for number, width in enumerate(channels):
            strided = nn.Conv2d(in_channels, width, 4, 2, 1)
            layers += [normalised(strided) if spectral_norm else strided, nn.LeakyReLU(0.1)]
            if number >= len(channels) - attention:
                layers.append(SelfAttention(width))
            in_channels = width
        self.trunk = nn.Sequential(*layers)
        self.score = nn.Conv2d(in_channels, 1, 3, padding=1)
        self.smallest = 2 ** len(channels)

    def forward(self, masks: Tensor) -> Tensor:
        """Return the scores ``(B,)`` of masks ``(B, C, H, W)``."""
        height, width = masks.shape[-2:]
        if min(height, width) < self.smallest:
            masks = F.pad(masks, (0, max(self.smallest - width, 0), 0, max(self.smallest - height, 0)))
        return self.score(self.trunk(masks)).mean((1, 2, 3))


class Opponent(Auxiliary):
    """A critic that learns to distinguish the teacher's masks from the student's.

    Args:
        critic: the network.
        kind: ``"wgan-gp"``, ``"lsgan"`` or ``"hinge"``.
        penalty: factor on the gradient penalty.
        steps: critic steps per step of the student.
        lr, betas, weight_decay: see :class:`kdgraft.auxiliary.Auxiliary`.
    """

    def __init__(
        self, critic: nn.Module, kind: Adversary = "wgan-gp", penalty: float = 10.0, steps: int = 1, **optimizer: Any
    ) -> None:
        super().__init__(critic, **optimizer)
        self.kind, self.penalty, self.steps = kind, penalty, steps

    @property
    def critic(self) -> nn.Module:
        """The network that scores masks."""
        return self.network

    def learn(self, real: Tensor, fake: Tensor, present: Tensor | None = None) -> dict[str, Tensor]:
        """Train the critic for ``steps`` steps on one batch. All processes must call this together.

        Args:
            real: the teacher's masks ``(B, C, H, W)``; B is the same on all processes.
            fake: the student's masks, of the same shape.
            present: ``(B,)`` mask of the samples to use; by default all.

        Returns:
            Figures to log, averaged over all samples.
        """
        if present is None:
            present = torch.ones(len(real), dtype=torch.bool, device=real.device)
        real, fake = real[present].detach().float(), fake[present].detach().float()
        shown: dict[str, Tensor] = {}
        with self.learning(real.device.type):
            for _ in range(self.steps):
                shown = self._step(real, fake, present)
        return {**shown, **({"skipped": torch.tensor(float(self.skipped))} if self.skipped else {})}

    def _step(self, real: Tensor, fake: Tensor, present: Tensor) -> dict[str, Tensor]:
        scores = self.network(torch.cat([real, fake]))
        on_real, on_fake = scores.split([len(real), len(fake)])
        loss = critic_loss(on_real, on_fake, self.kind, reduction="sum")
        figures = {"critic": loss, "gap": (on_real - on_fake).sum()}
        if self.penalty:
            figures["penalty"] = gradient_penalty(self.network, real, fake, self._mixing(present), reduction="sum")
            loss = loss + self.penalty * figures["penalty"]
        return self.step(loss, len(real), figures)

    def _mixing(self, present: Tensor) -> Tensor:
        """Return a random share in [0, 1) for each sample that is used; all processes take slices of one common draw."""
        count = len(present)
        everyone = torch.rand(count * world_size(), generator=self.random.of_all_ranks())
        return everyone[count * rank() : count * (rank() + 1)].to(present.device)[present]
