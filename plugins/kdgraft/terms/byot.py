"""Be your own teacher: exits of shallow layers learn from the deepest layer of the same student."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..errors import DistillError, check_number, check_share
from ..losses import exit_imitation
from ..losses.byot import Exit
from ..pairs import Pairs
from ..readers import Reader, parse_taps
from ..registry import RECIPES, TERMS
from ..taps import Recording, Tap
from .base import Taps, Wiring
from .classifiers import ClassifierTerm


@TERMS.register
@RECIPES.register("byot")
class BYOT(ClassifierTerm):
    """Be your own teacher (BYOT): exits of shallow layers learn from labels and the deepest one (Zhang et al. 2019, arXiv 1905.08094).

    Each exit is a bottleneck of convolutions to the grid and width of the deepest layer, a pool and a classifier. It learns from
    the labels, from the student's own class probabilities and from the deepest features, both without gradient; see
    :func:`kdgraft.losses.exit_imitation`. The losses of the exits are added to the host's own loss of the student. The exits are
    trained with the student and are no part of it: a saved student is the plain model. The log has the accuracy of each exit, as
    ``distill.byot.accuracy_1`` and so on.

    The paper does not publish α and λ. The defaults are those of the authors' SCAN code, which trains the same three losses:
    α = 0.5 and λ = 5·10⁻⁷ times its 128 images, as it adds up images and here their mean counts. Their later code of the journal
    version has α = 0.3 without the factor T², equal to ``alpha=1/22, weight=11/15`` here, and compares norms through a linear map
    instead.

    Args:
        tap: two or more layers from shallow to deep: the exits, and last the deepest layer, whose features they imitate. Maps
            ``(B, C, H, W)``, or vectors ``(B, C)`` and states ``(B, L, C)``, whose mean over tokens is taken.
        alpha: α in [0, 1]: the share of the soft targets; that of the labels is 1 − α.
        feature_weight: λ, on the squared distance of the pooled features.
        temperature: T > 0, with the factor T².
        width: width inside the bottleneck of an exit.
        where: see :class:`ScoreTerm`.

    Example:
        >>> stages = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 3, stride=2, padding=1)]
        >>> net = nn.Sequential(*stages, nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))
        >>> distiller = Distiller(net, Itself(), [BYOT(["1", "3"])], example=images)
        >>> list(distiller(images, targets=labels).losses)
        ['distill.byot.loss', 'distill.byot.accuracy_1']
    """

    takes_average = True

    def __init__(
        self,
        tap: Taps | None = None,
        *,
        alpha: float = 0.5,
        feature_weight: float = 6.4e-5,
        temperature: float = 3.0,
        width: int = 128,
        **settings: Any,
    ) -> None:
        super().__init__(temperature, **settings)
        check_share("BYOT", "alpha", alpha)
        check_number("BYOT", "feature_weight", feature_weight)
        check_number("BYOT", "width", width, 1, whole=True)
        self.alpha, self.feature_weight, self.width = float(alpha), float(feature_weight), width
        self.layers = [] if tap is None else parse_taps(tap)
        self.exits = nn.ModuleList()

    def check_settings(self, reader: type[Reader]) -> None:
        super().check_settings(reader)
        if len(self.layers) < 2:
            raise DistillError(
                f"BYOT: tap two or more layers from shallow to deep, the exits and last the deepest one; got {len(self.layers)}"
            )

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        super().prepare(student, teacher)
        self.layers = [self.reader.settle(tap, student) for tap in self.layers]
        self.student_taps = [*self.student_taps, *self.layers[:-1]]
        self.teacher_taps = [*self.teacher_taps, self.layers[-1]]

    def wire(self, wiring: Wiring) -> None:
        super().wire(wiring)
        last = self.layers[-1]
        deepest = self._one(wiring.teacher_recording, last)
        self.check_samples(deepest, last, wiring)
        for tap in self.layers[:-1]:
            tensor = self._one(wiring.student_recording, tap)
            self.check_samples(tensor, tap, wiring)
            both = tensor.ndim == deepest.ndim == 4
            size = (
                [max(own // deep, 1) for own, deep in zip(tensor.shape[2:], deepest.shape[2:], strict=True)]
                if both
                else (1, 1)
            )
            channels, out_channels = (x.shape[1 if x.ndim == 4 else -1] for x in (tensor, deepest))
            exit_ = Exit(channels, out_channels, self.scores.width, size, self.width).to(tensor.device)
            self.exits.append(exit_)
            label = f"Exit {channels}→{out_channels}→{self.scores.width}"
            self.rows.append(self.row(tensor, deepest, taps=(tap, last), adapter=label, region="all"))

    def _one(self, recording: Recording, tap: Tap) -> Tensor:
        found = self.reader.tensors(recording, tap)
        if len(found) != 1:
            raise DistillError(f"{self.name}: {tap} gives {len(found)} tensors; tap a layer that gives one")
        return found[0]

    def items(self, pairs: Pairs, student: Recording, teacher: Recording, batch: Batch) -> Tensor:
        assert pairs.labels is not None
        last, found, logged = self.layers[-1], [], {}
        deepest = self.vectors(self._one(teacher, last), last, teacher, batch)
        for place, (exit_, tap) in enumerate(zip(self.exits, self.layers[:-1], strict=True), 1):
            scores, features = exit_(*self._entering(self._one(student, tap), tap, student, batch))
            logged[str(place)] = scores
            found.append(
                exit_imitation(
                    scores,
                    pairs.teacher,
                    pairs.labels,
                    features,
                    deepest.to(features.dtype),
                    self.temperature,
                    alpha=self.alpha,
                    feature_weight=self.feature_weight,
                    reduction="none",
                )
            )
        self.log_accuracies(logged, pairs)
        return torch.stack(found).sum(0)

    def _entering(self, tensor: Tensor, tap: Tap, student: Recording, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return the input of an exit: maps with the weights of their positions, or a vector for each sample."""
        if tensor.ndim == 4:
            return tensor, self.region(batch.at(tap, tensor, owner="student"), tensor, student.scale)
        return self.vectors(tensor, tap, student, batch), None
