"""Terms on generators, which make an image of an image: reconstruction, and a discriminator that learns beside the student."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..auxiliary import check_optimizer
from ..balance import Weight
from ..batch import Batch
from ..errors import DistillError, WiringError, check_flag, check_number
from ..losses import Ratio, hint, weighted_ratio
from ..opponents import PatchCritic, PatchOpponent
from ..readers import Taps
from ..registry import RECIPES, TERMS
from ..sources.teacher import load_strictly, read_checkpoint, weights_of
from ..taps import Recording, Tap
from ..wiring import Wiring
from .base import TapTerm, check_choice


@TERMS.register
class Reconstruction(TapTerm):
    """L1 distance of a generator's image to the true one, or to the teacher's (GAN compression; Li et al. 2020, arXiv 2003.08936).

    It is the mean over all numbers of the images. Published with weight 100 where the training images are paired with the true
    ones, and with weight 10 to the teacher's images where they are not.

    Args:
        to: ``"truth"``, the batch's targets, or ``"teacher"``.
        tap: the images ``(B, C, H, W)``; the models' outputs by default.
        weight: factor on the distance; by default the published one.

    Example:
        >>> student, teacher = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 5, padding=2)
        >>> distiller = Distiller(student, teacher, [Reconstruction()], example=images)
        >>> out = distiller(images, targets=images)
        >>> torch.allclose(out.loss, 100 * (out.student - images).abs().mean())
        True
    """

    reads = "output"
    needs = ("generators",)

    def __init__(
        self,
        tap: Taps | None = None,
        *,
        to: Literal["truth", "teacher"] = "truth",
        weight: Weight | None = None,
        **settings: Any,
    ) -> None:
        published = 100.0 if to == "truth" else 10.0
        super().__init__(tap, weight=published if weight is None else weight, **settings)
        check_choice(self, "to", to, ("truth", "teacher"))
        self.to = to  # type: ignore[assignment]

    def wire(self, wiring: Wiring) -> None:
        found = self.pairs(wiring.student_recording, wiring.teacher_recording)
        for s, t, s_tap, t_tap in found:
            check_images(self, s, s_tap, "student")
            if self.to == "teacher" and s.shape != t.shape:
                raise WiringError(
                    f"{self.name}: the student's {s_tap} {tuple(s.shape)} and the teacher's {t_tap} {tuple(t.shape)} must be images "
                    "of one shape"
                )
            self.rows.append(self.row(s, t if self.to == "teacher" else "truth", taps=(s_tap, t_tap)))
        if len(found) != 1:
            raise WiringError(
                f"{self.name} compares one image of each model, and its taps yield {len(found)}; give one tap"
            )

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        ((s, t, _, _),) = self.pairs(student, teacher)
        target = true_images(self, s, batch) if self.to == "truth" else t
        return weighted_ratio(hint(s, target, norm="l1", reduction="none"))


@TERMS.register
class AdversarialImages(TapTerm):
    """Discriminator of a generator's images, patch by patch, which learns beside the student (GAN compression; arXiv 2003.08936).

    It learns to tell the student's images from the batch's true images, and the student to pass. It judges an image together with
    the input of which it was made, where these belong together; else the image alone. The discriminator and its optimizer belong to
    no module: no ``state_dict`` contains them, and they travel in the checkpoint beside the student. In each step it learns
    before it judges (in the authors' code it judges first). The log has ``critic``, the discriminator's loss, twice that of the
    authors, who halve it, and ``gap``, how much higher it rates the true images.

    Args:
        tap: the student's images ``(B, C, H, W)``; its output by default.
        paired: the targets of the batch are the true images of its inputs. Where they are not, they are images of the kind
            that the student should make, as many as there are inputs.
        kind: ``"hinge"`` or ``"lsgan"``; by default the authors': hinge for pairs, LSGAN otherwise.
        width: the number of channels after the discriminator's first convolution.
        layers: the number of its convolutions with stride 2; with 3 a patch has 70×70 pixels.
        start: a file of the weights with which it starts, such as those of the discriminator that the teacher was trained with.
        lr, betas, weight_decay: settings of the discriminator's Adam.
        steps: steps of the discriminator per step of the student.

    Example:
        >>> student, teacher = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 5, padding=2)
        >>> distiller = Distiller(student, teacher, [AdversarialImages(layers=1)], example=images)
        >>> sorted(name.rpartition(".")[2] for name in distiller(images, targets=images).losses)
        ['critic', 'gap', 'loss']
    """

    reads = "output"
    needs = ("generators",)

    def __init__(
        self,
        tap: Taps | None = None,
        *,
        paired: bool = True,
        kind: Literal["hinge", "lsgan"] | None = None,
        width: int = 128,
        layers: int = 3,
        start: str | Path | None = None,
        lr: float = 2e-4,
        betas: Sequence[float] = (0.5, 0.999),
        weight_decay: float = 0.0,
        steps: int = 1,
        **settings: Any,
    ) -> None:
        super().__init__(tap, **settings)
        owner = type(self).__name__
        check_flag(owner, "paired", paired)
        self.kind: Literal["hinge", "lsgan"] = kind or ("hinge" if paired else "lsgan")
        check_choice(self, "kind", self.kind, ("hinge", "lsgan"))
        for name, value in dict(width=width, layers=layers, steps=steps).items():
            check_number(owner, name, value, 1, whole=True)
        check_optimizer(owner, lr, betas, weight_decay)
        self.paired, self.start, self._size = paired, start, (width, layers)
        self._optimization: dict[str, Any] = dict(lr=lr, betas=betas, weight_decay=weight_decay, steps=steps)

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        super().prepare(student, teacher)
        if len(self.student_taps) != 1:
            raise WiringError(
                f"{self.name} judges one image of the student, and has {len(self.student_taps)} taps; give one"
            )
        self.images = self.reader.images(student)
        self.student_taps = [self.student_taps[0], self.images]

    def wire(self, wiring: Wiring) -> None:
        recording, tap = wiring.student_recording, self.student_taps[0]
        made: Any = recording[tap]
        check_images(self, made, tap, "student")
        given = recording[self.images]
        if self.paired:
            check_images(self, given, self.images, "student")
            if given.shape[-2:] != made.shape[-2:]:
                raise WiringError(
                    f"{self.name}: inputs {tuple(given.shape)} and images {tuple(made.shape)} must have one size to be judged together; "
                    "use paired=False"
                )
        inputs = self._judged(made.detach(), given)
        critic = PatchCritic(inputs.shape[1], *self._size).to(inputs.device)
        try:
            critic(inputs.float())
        except (RuntimeError, ValueError):
            raise WiringError(
                f"{self.name}: images of {tuple(made.shape[-2:])} pixels are too small for a discriminator with layers={self._size[1]}; "
                "use fewer layers"
            ) from None
        if self.start is not None:
            state = weights_of(read_checkpoint(self.start))
            load_strictly(critic, state, str(self.start), f"discriminator of {self.name}")
        self.auxiliaries["critic"] = PatchOpponent(critic, self.kind, penalty=0.0, **self._optimization)
        size = sum(p.numel() for p in critic.parameters()) / 1e6
        label = f"discriminator {self.kind}, {size:.2g} M"
        self.rows.append(self.row(made, "truth", taps=(tap, self.teacher_taps[0]), adapter=label))

    @property
    def opponent(self) -> PatchOpponent:
        """The discriminator and its training."""
        opponent = self.auxiliaries["critic"]
        assert isinstance(opponent, PatchOpponent)
        return opponent

    def _judged(self, images: Tensor, given: Tensor) -> Tensor:
        """Return what the discriminator sees of an image: the input of which it was made, and the image."""
        return torch.cat([given.detach().to(images.dtype), images], 1) if self.paired else images

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        made, given = student[self.student_taps[0]], student[self.images]
        true = true_images(self, made, batch)
        fake = self._judged(made, given)
        self.monitor = self.opponent.learn(self._judged(true, given), fake)
        return weighted_ratio(self.opponent.verdict(fake))


def check_images(term: TapTerm, value: Any, tap: Tap, owner: str) -> None:
    """Raise a :class:`WiringError` unless a tapped value is images ``(B, C, H, W)``."""
    if not isinstance(value, Tensor) or value.ndim != 4 or not value.is_floating_point():
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise WiringError(
            f"{term.name} needs a generator, which makes images (B, C, H, W) of images, and '{tap}' of the {owner} gives {shape}; "
            "use terms on features or predictions"
        )


def true_images(term: TapTerm, made: Tensor, batch: Batch) -> Tensor:
    """Return the images in a batch's targets; raise a :class:`DistillError` unless they have the shape of those made."""
    found = batch.labels
    if not isinstance(found, Tensor) or found.shape != made.shape or not found.is_floating_point():
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise DistillError(
            f"{term.name} needs true images {tuple(made.shape)} as the batch's targets, and these are {shape}; pass targets=… to the "
            "distiller"
        )
    return found.to(made.device)


@RECIPES.register("gan_compression")
def gan_compression(
    paired: bool = True,
    tap: Taps = ("model.9", "model.12", "model.15", "model.18"),
    *,
    student_tap: Taps | None = None,
    teacher_tap: Taps | None = None,
    reconstruction: float | None = None,
    distillation: float | None = None,
    adversarial: float = 1.0,
    **settings: Any,
) -> list[dict[str, Any]]:
    """GAN compression: a generator's reconstruction, features and discriminator (Li et al. 2020, arXiv 2003.08936).

    The terms are the whole loss of a student generator and replace the task's own. The weights are those of the authors' code.

    Args:
        paired: the targets of a batch are the true images of its inputs, and the reconstruction is compared with them; else they
            are other images of that kind, and the reconstruction is compared with the teacher's image.
        tap: layers whose features are compared, each through a 1×1 convolution; by default those of the authors' ResNet.
        student_tap, teacher_tap: the layers of each model, where they differ.
        reconstruction: λ of the L1 distance: 100 for pairs, else 10.
        distillation: λ of the squared errors of features, which are added up over layers: 1 for pairs, else 0.01.
        adversarial: λ of the discriminator's verdict.
        settings: see :class:`kdgraft.AdversarialImages`: ``kind``, ``start``, ``width``, ``layers``, ``lr`` …
    """
    check_flag("gan_compression", "paired", paired)
    sides = [tap if own is None else own for own in (student_tap, teacher_tap)]
    ours, theirs = ([one] if isinstance(one, str) else list(one) for one in sides)
    each = (1.0 if paired else 0.01) if distillation is None else distillation
    rebuilt: dict[str, Any] = dict(type="Reconstruction", to="truth" if paired else "teacher", weight=reconstruction)
    return [
        dict(type="TaskShare", share=0.0),
        rebuilt,
        dict(type="AdversarialImages", paired=paired, weight=adversarial, **settings),
        # The term is the mean over layers.
        dict(type="Hint", student_tap=ours, teacher_tap=theirs, weight=each * len(ours)),
    ]
