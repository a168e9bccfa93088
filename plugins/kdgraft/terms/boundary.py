"""A term on samples near the teacher's decision boundary, which it searches for in each step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..balance import Weight
from ..batch import Batch
from ..boundary import base_samples, boundary_samples, target_classes
from ..distributed import SharedRandom
from ..errors import WiringError, check_number
from ..isolation import eval_mode
from ..losses import Ratio, soft_targets, upcast, weighted_ratio
from ..pairs import Pairs
from ..readers import in_order
from ..registry import RECIPES, TERMS
from ..sources import Cached
from ..taps import Recording, Tap
from ..wiring import Wiring
from .pairs import TemperedTerm


@TERMS.register
class BoundarySamples(TemperedTerm):
    """Soft targets on samples near the teacher's decision boundary (BSS; Heo et al. 2019, arXiv 1805.05532).

    In each step samples that both models get right are moved, by gradients of the teacher's scores, towards another class until
    the teacher changes its mind; both models are then compared on the moved samples. Base samples are those in whose other
    probabilities the models differ most, chosen among the batches of all processes; the class to go to is drawn in proportion to
    the teacher's other probabilities. This follows the paper and the authors' code, where the teacher alone is attacked.

    A step costs up to ``steps`` further passes of the teacher, forward and backward, and one of the student, on the chosen samples.
    As in the authors' code the student runs on them in training mode: BatchNorm normalises them by their own statistics and adds
    these to its running statistics. A lone sample of a process, which BatchNorm cannot normalise, is left out.

    Published on CIFAR-10 with weight 2, which falls to 0 at 75 % of the training, on a loss without the factor T²; that is 2 ÷ 9
    here at T = 3. ``recipe="bss"`` has the schedule, and the soft targets beside it.

    Args:
        temperature: T > 0, with the factor T².
        samples: the largest number of samples that are moved in a step, over all processes.
        steps: the largest number of steps of each sample.
        step_size: η; see :func:`kdgraft.boundary.boundary_samples`.
        bound: moved samples stay in [−bound, bound], a range of normalised images; ``None`` for no bound.
        weight: factor on the mean over the moved samples.
        where: arguments of the host that select the class scores; see :class:`ScoreTerm`.

    Example:
        >>> distiller = Distiller(student, teacher, [BoundarySamples(steps=2)], example=images)
        >>> sorted(distiller(images, targets=labels).losses)
        ['distill.boundary_samples.loss', 'distill.boundary_samples.samples']
    """

    needs = ("classifiers", "images", "classes", "labels")
    in_chunks = False
    runs_again = True

    def __init__(
        self,
        temperature: float = 3.0,
        *,
        samples: int = 64,
        steps: int = 10,
        step_size: float = 0.3,
        bound: float | None = 2.5,
        weight: Weight = 2 / 9,
        **settings: Any,
    ) -> None:
        super().__init__(temperature, weight=weight, **settings)
        check_number("BoundarySamples", "samples", samples, 1, whole=True)
        check_number("BoundarySamples", "steps", steps, 1, whole=True)
        check_number("BoundarySamples", "step_size", step_size, above=True)
        if bound is not None:
            check_number("BoundarySamples", "bound", bound, above=True)
        self.samples, self.steps, self.step_size, self.bound = samples, steps, float(step_size), bound
        self._random = SharedRandom()

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        super().prepare(student, teacher)
        self.hears_ensembles = False
        self.images = tuple(self.reader.images(model) for model in (student, teacher))
        self._scores = tuple(self.predictions.taps[side][0] for side in (0, 1))
        # In plain PyTorch a student may get more than samples, on which it would not run in a further pass.
        self._given = Tap.parse(":inputs") if str(self.images[0]) == ":input" else None
        self.student_taps = [*self.student_taps, self.images[0], *([] if self._given is None else [self._given])]
        self.teacher_taps = [*self.teacher_taps, self.images[1]]

    def wire(self, wiring: Wiring) -> None:
        super().wire(wiring)
        holder = wiring.holder
        if holder is None or holder.trains or isinstance(holder, Cached):
            kind = "the student itself" if holder is None else f"a {type(holder).__name__}"
            raise WiringError(
                f"{self.name} attacks a frozen model on new samples, and its source is {kind}; use a Teacher without a cache"
            )
        if any(isinstance(module, nn.SyncBatchNorm) for module in wiring.student.modules()):
            raise WiringError(
                f"{self.name}: the student has SyncBatchNorm, which would wait for processes without samples; use BatchNorm"
            )
        images = self._images(wiring.student_recording, wiring.teacher_recording)
        for side, (recording, model) in enumerate(
            ((wiring.student_recording, wiring.student), (wiring.teacher_recording, wiring.teacher))
        ):
            scores = self._read(recording, side)
            if len(self.predictions.taps[side]) != 1 or scores.ndim != 2 or len(scores) != len(images):
                raise WiringError(
                    f"{self.name} needs one row of class scores for each sample {tuple(images.shape)}, and '{self._scores[side]}' "
                    f"of the {recording.owner} gives {tuple(scores.shape)}; use SoftTargets"
                )
            self._try(model, images, recording.owner)

    def _try(self, model: nn.Module, images: Tensor, owner: str) -> None:
        """Raise a :class:`WiringError` unless a model runs on samples alone."""
        try:
            with eval_mode(model), torch.no_grad():
                self.reader.run(model, images)
        except (TypeError, ValueError, RuntimeError, KeyError, AttributeError) as error:
            said = str(error).partition("\n")[0]
            raise WiringError(
                f"{self.name}: the {owner} cannot run on other samples alone ({type(error).__name__}: {said}); give it one input, or "
                "use SoftTargets"
            ) from None

    def _images(self, student: Recording, teacher: Recording) -> Tensor:
        """Return the samples of a pass, the same for both models."""
        ours, theirs = (recording[tap] for recording, tap in zip((student, teacher), self.images, strict=True))
        if not all(isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1 for x in (ours, theirs)):
            kind = type(ours).__name__ if not isinstance(ours, Tensor) else f"{tuple(ours.shape)} {ours.dtype}"
            raise WiringError(f"{self.name} moves samples of numbers (B, …), and the student's input is {kind}")
        more = [] if self._given is None else list(student[self._given])[1:]
        if more:
            raise WiringError(
                f"{self.name} runs models on samples alone, and the student also gets {', '.join(more)}; use SoftTargets"
            )
        if ours.shape != theirs.shape:
            raise WiringError(
                f"{self.name} moves samples that both models see, and the student sees {tuple(ours.shape)}, the teacher "
                f"{tuple(theirs.shape)}; give both models one size"
            )
        found: Tensor = ours.detach()
        return found

    def _read(self, recording: Recording, side: int) -> Tensor:
        """Return the class scores of the student (side 0) or the teacher (1), in the student's order of classes."""
        (scores,) = self.reader.tensors(recording, self._scores[side])
        return scores if side == 0 else in_order(scores, recording.class_order, -1)

    def count(self, batch: Batch) -> Tensor | None:
        return None  # the number of samples that were moved

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        images, passes = self._images(student, teacher), self.passes
        assert passes is not None
        (pairs,) = self.pairs(student, teacher, batch)
        assert pairs.labels is not None
        ours, theirs = self._read(student, 0).detach(), self._read(teacher, 1)
        chosen, everyone = base_samples(ours, theirs, pairs.labels, self.samples)
        drawn = self._random.of_rows((len(images), 1), images.device)[:, 0] / 2.0**62
        self.monitor = {"samples": everyone.float()}
        if len(chosen) < 1 + any(isinstance(module, _BatchNorm) for module in _training(student.root)):
            return weighted_ratio(upcast(pairs.student.flatten()[:0]))
        moved = boundary_samples(
            lambda samples: self._read(passes.of_source(samples), 1),
            images[chosen],
            target_classes(theirs[chosen], drawn[chosen]),
            steps=self.steps,
            step_size=self.step_size,
            bound=self.bound,
        )
        with torch.no_grad():
            theirs = self._read(passes.of_source(moved), 1)
        ours = self._read(passes.of_listener(moved), 0)
        return weighted_ratio(self.compare(self.ready(Pairs(ours, theirs, labels=pairs.labels[chosen]))))

    def compare(self, pairs: Pairs) -> Tensor:
        return soft_targets(pairs.student, pairs.teacher, self.temperature, dim=pairs.dim, reduction="none")

    def hidden_state(self) -> dict[str, Any]:
        return {"random": self._random.state()}

    def load_hidden_state(self, state: Mapping[str, Any]) -> None:
        self._random.load(state["random"])


def _training(model: nn.Module | None) -> list[nn.Module]:
    return [] if model is None else [module for module in model.modules() if module.training]


@RECIPES.register("bss")
def boundary_supporting_samples(epochs: int = 80, temperature: float = 3.0, **settings: Any) -> list[dict[str, Any]]:
    """Boundary supporting samples (BSS): soft targets, also on samples near the teacher's boundary (AAAI 2019, arXiv 1805.05532).

    The weights are those of the authors' code beside the hard loss of weight 1, divided by T²: that of the soft targets falls from
    4 to 1 over the training, and that of the samples near the boundary from 2 to 0 over its first three quarters.

    Args:
        epochs: the number of epochs of the training, over which the weights fall.
        temperature: T > 0.
        settings: see :class:`kdgraft.BoundarySamples`.

    Raises:
        DistillError: the number of epochs is not a whole number of at least 1.
    """
    check_number("bss", "epochs", epochs, 1, whole=True)
    falling = dict(type="Decay", end=epochs, final=0.25, by="epoch")
    soft = dict(type="SoftTargets", temperature=temperature, weight=4 / 9, schedule=falling)
    ending = dict(type="Decay", end=max(round(0.75 * epochs), 1), by="epoch")
    return [soft, dict(type="BoundarySamples", temperature=temperature, schedule=ending, **settings)]
