"""Critics that learn beside the student to tell its predictions from others, and critics of class scores and of images."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .auxiliary import Auxiliary
from .distributed import rank, world_size
from .losses import conditional_adversarial, conditional_critic_loss
from .losses.adversarial import Adversary, adversarial, critic_loss, gradient_penalty


class ScoreCritic(nn.Module):
    """Judges class scores, each item independently of the others: residual blocks on the scores, then a linear layer.

    Args:
        classes: the number of classes.
        outputs: the number of outputs.
        blocks: the number of residual blocks.
        width: the width inside a block.
    """

    def __init__(self, classes: int, outputs: int, blocks: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(classes, width), nn.ReLU(), nn.Linear(width, classes)) for _ in range(blocks)
        )
        self.last = nn.Linear(classes, outputs)

    def forward(self, scores: Tensor) -> Tensor:
        """Return the outputs ``(N, outputs)``, or ``(N,)`` for one output, of class scores ``(N, C)``."""
        for block in self.blocks:
            scores = F.relu(scores + block(scores))
        return self.last(scores).squeeze(1) if self.last.out_features == 1 else self.last(scores)


class PatchCritic(nn.Module):
    """Judges images patch by patch (PatchGAN; Isola et al. 2017, arXiv 1611.07004), normalising each image by itself.

    The modules are those of the discriminators of pix2pix and of GAN compression, under the same names.

    Args:
        channels: the number of channels of an image, with those of its condition.
        width: the number of channels after the first convolution.
        layers: the number of convolutions with stride 2; each doubles the channels, up to 8 times ``width``.
    """

    def __init__(self, channels: int, width: int, layers: int) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        widths = [width * min(2**depth, 8) for depth in range(layers + 1)]
        for depth, (before, after) in enumerate(pairwise(widths), 1):
            stride = 2 if depth < layers else 1
            parts += [
                nn.Conv2d(before, after, 4, stride=stride, padding=1),
                nn.InstanceNorm2d(after),
                nn.LeakyReLU(0.2),
            ]
        self.model = nn.Sequential(*parts, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for module in self.model:
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.normal_(module.weight, 0.0, 0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores ``(B, h, w)`` of the patches of images ``(B, C, H, W)``."""
        return self.model(images).squeeze(1)


class Opponent(Auxiliary):
    """A critic that learns to distinguish the teacher's samples from the student's.

    Args:
        critic: the network, which maps samples ``(B, …)`` to scores ``(B,)``.
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
        """The network that scores samples."""
        return self.network

    def learn(
        self, real: Tensor, fake: Tensor, present: Tensor | None = None, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Train the critic for ``steps`` steps on one batch. All processes must call this together.

        Args:
            real: the teacher's samples ``(B, …)``; with a gradient penalty B is the same on all processes.
            fake: the student's samples, of the same shape.
            present: ``(B,)`` mask of the samples to use; by default all.
            labels: the classes ``(B,)`` of the samples, for a :class:`ConditionalOpponent`.

        Returns:
            Figures to log, averaged over all samples.
        """
        if present is None:
            present = torch.ones(len(real), dtype=torch.bool, device=real.device)
        real, fake = (side[present].detach().to(self.dtype) for side in (real, fake))
        labels = None if labels is None else labels[present]
        shown: dict[str, Tensor] = {}
        with self.learning(real.device.type):
            for _ in range(self.steps):
                shown = self._step(real, fake, present, labels)
        return {**shown, **({"skipped": torch.tensor(float(self.skipped))} if self.skipped else {})}

    def told_apart(self, real: Tensor, fake: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the sum of the critic's losses, and the sum over samples of how far apart its verdicts are."""
        return critic_loss(real, fake, self.kind, reduction="sum"), (real - fake).sum()

    def verdict(self, fake: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the student's loss ``(B,)`` for its samples, with gradients to the samples only."""
        return adversarial(self.judge(fake), self.kind, reduction="none")

    def _step(self, real: Tensor, fake: Tensor, present: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        outputs = self.network(torch.cat([real, fake]))
        verdicts = outputs.split([len(real), len(fake)])
        loss, gap = self.told_apart(verdicts[0], verdicts[1], labels)
        figures = {"critic": loss, "gap": gap}
        if self.penalty:
            figures["penalty"] = gradient_penalty(self.network, real, fake, self._mixing(present), reduction="sum")
            loss = loss + self.penalty * figures["penalty"]
        return self.step(loss, len(real), figures)

    def _mixing(self, present: Tensor) -> Tensor:
        """Return a random share in [0, 1) for each sample that is used; all processes take slices of one common draw."""
        count = len(present)
        everyone = torch.rand(count * world_size(), generator=self.random.of_all_ranks())
        return everyone[count * rank() : count * (rank() + 1)].to(present.device)[present]


class PatchOpponent(Opponent):
    """A critic whose verdicts on the patches ``(B, h, w)`` of a sample are averaged after the loss of each."""

    def told_apart(self, real: Tensor, fake: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        items = critic_loss(real, fake, self.kind, reduction="none")
        return items.flatten(1).mean(1).sum(), (real - fake).flatten(1).mean(1).sum()

    def verdict(self, fake: Tensor, labels: Tensor | None = None) -> Tensor:
        return super().verdict(fake).flatten(1).mean(1)


class ConditionalOpponent(Opponent):
    """A critic that also predicts the classes of samples: C + 2 outputs, see :mod:`kdgraft.losses.conditional`."""

    def told_apart(self, real: Tensor, fake: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        assert labels is not None
        believed = [outputs[:, -2:].softmax(1)[:, 0].sum() for outputs in (real, fake)]
        return conditional_critic_loss(real, fake, labels, reduction="sum"), believed[0] - believed[1]

    def verdict(self, fake: Tensor, labels: Tensor | None = None) -> Tensor:
        assert labels is not None
        return conditional_adversarial(self.judge(fake), labels, reduction="none")
