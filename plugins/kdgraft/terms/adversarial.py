"""Adversarial terms on class scores: a critic learns to distinguish both models' predictions, and the student to deceive it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..auxiliary import check_optimizer
from ..batch import Batch
from ..errors import DistillError, WiringError, check_number
from ..losses import Ratio, upcast
from ..losses.adversarial import ADVERSARIES
from ..opponents import ConditionalOpponent, Opponent, ScoreCritic
from ..pairs import Pairs
from ..registry import RECIPES, TERMS
from ..taps import Recording
from .base import Wiring, mean_of
from .pairs import ScoreTerm


class AdversarialTerm(ScoreTerm):
    """Base of terms with a critic, which is trained in each step before it judges the student.

    The critic and its optimizer belong to no module: no ``state_dict`` contains them, and they travel in the checkpoint beside the
    student. With gradient accumulation the critic makes its steps on each part of a batch. The log has, beside the loss,
    ``critic`` (the critic's loss without a penalty), ``gap`` (how much higher it rates the teacher), ``penalty``, and ``skipped``
    (the number of critic steps that were not finite and that all processes skipped) once there is one.

    Args:
        kind: the kind of adversary, one of :attr:`kinds`.
        penalty: factor on the gradient penalty; by default 10 for ``"wgan-gp"`` and 0 for the others.
        lr, betas, weight_decay: settings of the critic's Adam (betas of Gulrajani et al. 2017).
        steps: critic steps per step of the student.

    Example:
        >>> AdversarialTerm("lsgan", steps=2).optimization["steps"]
        2
    """

    in_chunks = False
    takes_independent = True
    kinds: ClassVar[Sequence[str]] = ADVERSARIES
    """The kinds of adversaries that the term knows."""

    def __init__(
        self,
        kind: str,
        *,
        penalty: float | None = None,
        lr: float = 4e-4,
        betas: Sequence[float] = (0.0, 0.9),
        weight_decay: float = 0.0,
        steps: int = 1,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        owner = type(self).__name__
        if kind not in self.kinds:
            raise DistillError(f"{owner}: kind must be one of {', '.join(self.kinds)}, got {kind!r}")
        if penalty is None:
            penalty = 10.0 if kind == "wgan-gp" else 0.0
        check_number(owner, "penalty", penalty)
        check_number(owner, "steps", steps, 1, whole=True)
        check_optimizer(owner, lr, betas, weight_decay)
        self.kind = kind
        self.optimization: dict[str, Any] = dict(
            penalty=penalty, lr=lr, betas=betas, weight_decay=weight_decay, steps=steps
        )

    def set_critic(self, critic: nn.Module, kind: type[Opponent] = Opponent) -> None:
        """Adopt a critic, and name it and its size in the rows for ``kdgraft check``; call it after :meth:`wire` of the base."""
        self.auxiliaries["critic"] = kind(critic, self.kind, **self.optimization)  # type: ignore[arg-type]
        size = sum(p.numel() for p in critic.parameters())
        self.rows = [row._replace(adapter=f"critic {self.kind}, {size / 1e6:.2g} M") for row in self.rows]

    @property
    def opponent(self) -> Opponent:
        """The critic and its training."""
        opponent = self.auxiliaries["critic"]
        assert isinstance(opponent, Opponent)
        return opponent


@TERMS.register
@RECIPES.register("akd")
class AdversarialScores(AdversarialTerm):
    """Conditional adversarial distillation (AKD): a critic of class scores, and their L1 distance (Xu et al. 2017, arXiv 1709.00513).

    The critic, a residual network on the scores of one item, distinguishes the teacher's from the student's and predicts the true
    class of both; the student learns to be taken for the teacher and to show the class, and to keep its scores near the
    teacher's. (The student's verdict is in the form that does not saturate. The authors have published no code, and neither
    factors of the parts nor the critic's learning rate are known, so that these are 1 and that of other critics here.)

    Published on CIFAR-10, CIFAR-100 and ImageNet 32×32, beside the hard loss of weight 1. The loss is a mean over items; the L1
    distance is a sum over classes and grows with their number and with the range of the logits.

    Args:
        kind: ``"ac"`` (the paper's, with classes), ``"lsgan"`` or ``"hinge"``; the latter two use no labels and take independent
            classes, too.
        l1: factor of the L1 distance; 0 leaves it out.
        blocks: the number of the critic's residual blocks.
        width: the width inside a block; by default the number of classes as in the paper, at most 512.
        lr, betas, weight_decay, steps: see :class:`AdversarialTerm`.
        where: see :class:`ScoreTerm`.

    Example:
        >>> distiller = Distiller(student, teacher, [AdversarialScores(l1=0.5)], example=images)
        >>> sorted(distiller(images, targets=labels).losses)
        ['distill.adversarial_scores.critic', 'distill.adversarial_scores.gap', 'distill.adversarial_scores.loss']
    """

    needs: ClassVar[tuple[str, ...]] = ("classes", "labels")
    kinds = ("ac", "lsgan", "hinge")

    def __init__(
        self,
        kind: Literal["ac", "lsgan", "hinge"] = "ac",
        *,
        l1: float = 1.0,
        blocks: int = 3,
        width: int | None = None,
        **settings: Any,
    ) -> None:
        # A gradient penalty would need equally many items on all processes.
        super().__init__(kind, penalty=0.0, **settings)
        check_number("AdversarialScores", "l1", l1)
        check_number("AdversarialScores", "blocks", blocks, 1, whole=True)
        if width is not None:
            check_number("AdversarialScores", "width", width, 1, whole=True)
        self.l1, self._blocks, self._width = l1, blocks, width
        self.takes_independent = kind != "ac"
        if kind != "ac":
            self.needs = ("classes",)  # type: ignore[misc]

    def wire(self, wiring: Wiring) -> None:
        super().wire(wiring)
        classes = self.scores.width
        if not classes:
            raise WiringError(
                f"{self.name}: its critic needs scores of one fixed number of classes, and these differ, as positions of a text do; "
                "use SoftTargets"
            )
        outputs, kind = (classes + 2, ConditionalOpponent) if self.kind == "ac" else (1, Opponent)
        critic = ScoreCritic(classes, outputs, self._blocks, self._width or min(classes, 512))
        self.set_critic(critic.to(next(wiring.student.parameters()).device), kind)

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        """Train the critic on detached scores, and return its verdict on the student's, with the L1 distance."""
        parts = [_rows(pairs) for pairs in self.pairs(student, teacher, batch)]
        labels = torch.cat([part.labels for part in parts]) if self.kind == "ac" else None  # type: ignore[misc]
        real, fake = (torch.cat([getattr(part, side) for part in parts]) for side in ("teacher", "student"))
        self.monitor = self.opponent.learn(real, fake, labels=labels)
        return mean_of([self.ratio(part) for part in parts])

    def compare(self, pairs: Pairs) -> Tensor:
        items = self.opponent.verdict(pairs.student, pairs.labels if self.kind == "ac" else None)
        return items + self.l1 * (pairs.student - pairs.teacher).abs().sum(-1) if self.l1 else items


def _rows(pairs: Pairs) -> Pairs:
    """Return the items that count, with class scores ``(N, C)``."""
    s, t = (upcast(scores).movedim(pairs.dim, -1) for scores in (pairs.student, pairs.teacher))
    keep = torch.ones_like(s[..., 0], dtype=torch.bool) if pairs.weight is None else pairs.weight > 0
    weight, labels = (None if x is None else x.expand_as(keep)[keep] for x in (pairs.weight, pairs.labels))
    return Pairs(
        s[keep], t[keep], weight, independent=pairs.independent, labels=None if labels is None else labels.long()
    )
