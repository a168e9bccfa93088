"""Terms with a network that first learns from the teacher alone, in a stage of its own, and then teaches the student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..auxiliary import Auxiliary, check_optimizer
from ..balance import Weight
from ..batch import Batch
from ..distributed import kept_in_graph, rank
from ..errors import WiringError, check_number
from ..files import written_whole
from ..losses import Ratio, factor_transfer, weighted_ratio
from ..losses.factor_transfer import Paraphraser, Translator
from ..losses.masking import images_present
from ..losses.reduction import upcast
from ..registry import RECIPES, TERMS
from ..sources.teacher import Teacher, load_strictly, read_checkpoint, weights_of
from ..taps import Recording, Tap
from .base import Taps, Wiring, check_choice, mean_of
from .features import FeatureTerm, check_in_image

Level = tuple[Tensor, Tensor, Tensor | None]
"""A map of the adapted student and of the teacher ``(B, C, H, W)``, and the weights of its positions ``(B, H, W)``."""


class PretrainedTerm(FeatureTerm):
    """Base of terms with a network for each map that learns from the frozen teacher's features first.

    During the first ``pretrain`` training steps in which the term is active (micro-batches count) the network learns, and the
    term's loss is 0. Then the network is frozen, and the term teaches the student. The network has its own Adam, hidden from the
    student; the network, its optimizer and the number of steps are resumed exactly, and all processes train it as one. The log
    has the network's own losses during its stage.

    A subclass builds the network of a map in :meth:`build_network`, returns its losses in :meth:`lesson`, and compares the two
    models in :meth:`teach`.

    Args:
        tap, student_tap, teacher_tap, adapter, region: maps ``(B, C, H, W)``; see :class:`FeatureTerm`.
        pretrain: number of steps of the first stage, >= 1.
        network: a file with the trained network from an earlier run, which skips the first stage.
        save_network: a file to which the first process writes the network when the first stage ends.
        lr, betas, weight_decay: settings of the network's Adam.

    Example:
        >>> class Restored(PretrainedTerm):
        ...     def build_network(self, student, teacher):
        ...         return nn.Conv2d(teacher.shape[1], teacher.shape[1], 1)
        ...
        ...     def lesson(self, network, teacher, valid):
        ...         return {"restored": (network(teacher) - teacher).square().mean((1, 2, 3))}
        ...
        ...     def teach(self, networks, levels, batch):
        ...         ((s, t, weight),) = levels
        ...         return weighted_ratio((s - networks[0](t)).square().mean(1), weight)
        >>> distiller = Distiller(student, teacher, [Restored("conv", pretrain=1)], example=images)
        >>> [bool(distiller(images).loss > 0) for step in range(2)]
        [False, True]
    """

    reads = "features"
    needs = ("maps",)

    def __init__(
        self,
        tap: Taps | None = None,
        *,
        pretrain: int = 2000,
        network: str | Path | None = None,
        save_network: str | Path | None = None,
        lr: float = 1e-3,
        betas: Sequence[float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        **settings: Any,
    ) -> None:
        super().__init__(tap, **settings)
        kind = type(self).__name__
        check_number(kind, "pretrain", pretrain, 1, whole=True)
        check_optimizer(kind, lr, betas, weight_decay)
        self.pretrain, self.network_file, self.save_network = pretrain, network, save_network
        self._optimization: dict[str, Any] = dict(lr=lr, betas=betas, weight_decay=weight_decay)
        self.steps = 0
        """Number of steps so far, those of both stages."""
        self._unread = network is not None
        self.places: dict[tuple[Tap, int], int] = {}
        """The number of a map, from the teacher's tap and the number of the tensor among those of this tap."""

    def check_pair(self, student: Tensor, teacher: Tensor, student_tap: Tap, teacher_tap: Tap, wiring: Wiring) -> None:
        check_in_image(self, teacher_tap, wiring)

    def wire(self, wiring: Wiring) -> None:
        if not isinstance(wiring.holder, Teacher):
            raise WiringError(
                f"{self.name}: its network learns from a frozen teacher first, and this source changes; use a Teacher"
            )
        super().wire(wiring)
        networks = nn.ModuleList()
        for s, t, _, tap in self.pairs(wiring.student_recording, wiring.teacher_recording):
            self.places[tap, sum(other == tap for other, _ in self.places)] = len(networks)
            networks.append(self.build_network(s, t).to(t.device))
        self.auxiliaries["network"] = Auxiliary(networks, **self._optimization)
        if self.network_file is not None and Path(self.network_file).expanduser().is_file():
            self._read()

    def _read(self) -> None:
        """Read the network's file; a model that is built for inference does not need the file."""
        assert self.network_file is not None
        state = weights_of(read_checkpoint(self.network_file))
        load_strictly(self.auxiliaries["network"].network, state, str(self.network_file), f"network of {self.name}")
        self._unread = False

    @property
    def taught(self) -> int:
        """The number of steps in which the term taught the student."""
        return self.steps if self.network_file is not None else max(self.steps - self.pretrain, 0)

    @property
    def learning(self) -> bool:
        """True during the first stage, in which the network learns."""
        return self.network_file is None and self.steps < self.pretrain

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        if self._unread:
            self._read()
        levels: list[Level] = list(self.aligned(student, teacher, batch))
        auxiliary = self.auxiliaries["network"]
        if self.learning:
            self._learn(auxiliary, levels)
            self.steps += 1
            if not self.learning and self.save_network is not None and rank() == 0:
                with written_whole(Path(self.save_network).expanduser()) as file:
                    torch.save(auxiliary.network.state_dict(), file)
            # The tapped maps, not the adapted ones: where these are infinite, adapters would get 0 · inf for a gradient.
            maps = [s for s, *_ in self.pairs(student, teacher)]
            zero = kept_in_graph([*maps, *self.parameters()], maps[0].device)
            return Ratio(zero, zero.new_ones(()))
        self.monitor = {}
        with auxiliary.frozen(levels[0][1].device.type):
            found = self.teach(list(auxiliary.network.children()), levels, batch)
        self.steps += 1
        return found

    def _learn(self, auxiliary: Auxiliary, levels: Sequence[Level]) -> None:
        """Take one step of the networks of all maps, on the images with a position that counts."""
        present = [images_present(weight) for _, _, weight in levels]
        images = [
            torch.ones(len(t)) if some is None else some.float().cpu()
            for some, (_, t, _) in zip(present, levels, strict=True)
        ]
        count = int(torch.stack(images).amax(0).sum())
        with auxiliary.learning(levels[0][1].device.type):
            sums = self.lessons(list(auxiliary.network.children()), levels, count)
            self.monitor = auxiliary.step(torch.stack(list(sums.values())).sum(), count, sums)
        if auxiliary.skipped:
            self.monitor = {**self.monitor, "skipped": torch.tensor(float(auxiliary.skipped))}

    def lessons(self, networks: Sequence[nn.Module], levels: Sequence[Level], count: int) -> dict[str, Tensor]:
        """Return the losses of all networks by name, summed over the images with a position that counts.

        Args:
            networks: the networks of the maps, in training mode.
            levels: the maps.
            count: the number of these images.
        """
        sums: dict[str, Tensor] = {}
        for network, (_, t, weight) in zip(networks, levels, strict=True):
            valid = None if weight is None else weight > 0
            for name, items in self.lesson(network, upcast(t.detach()), valid).items():
                value = weighted_ratio(items, images_present(weight)).numerator
                sums[name] = sums[name] + value if name in sums else value
        return sums

    def build_network(self, student: Tensor, teacher: Tensor) -> nn.Module:
        """Build the network of a map from the two tensors of the dry run."""
        raise NotImplementedError

    def lesson(self, network: nn.Module, teacher: Tensor, valid: Tensor | None) -> Mapping[str, Tensor]:
        """Return the network's losses ``(B,)`` by name; the network learns to reduce their sum.

        Args:
            network: the network of a map, in training mode.
            teacher: the teacher's map ``(B, C, H, W)``, 0 where it is left out.
            valid: ``(B, H, W)``, true for the positions to include; ``None`` for all.
        """
        raise NotImplementedError

    def teach(self, networks: Sequence[nn.Module], levels: Sequence[Level], batch: Batch) -> Ratio:
        """Return the student's loss of all maps, given their frozen networks; called outside autocast."""
        raise NotImplementedError

    def hidden_state(self) -> dict[str, Any]:
        return {**super().hidden_state(), "steps": self.steps}

    def load_hidden_state(self, state: Mapping[str, Any]) -> None:
        super().load_hidden_state(state)
        self.steps, self._unread = int(state["steps"]), False


@TERMS.register
@RECIPES.register("ft")
class FactorTransfer(PretrainedTerm):
    """Factor transfer (FT): factors of a paraphraser of the teacher's features (Kim et al. 2018, arXiv 1802.04977).

    A paraphraser, an autoencoder, first learns to restore the teacher's features. Then a translator, which is trained with the
    student, turns the student's features into factors that follow the paraphraser's. The loss of several taps is the mean of
    their losses. The authors' code trains the paraphraser for 2346 steps of 128 images (SGD, learning rate 0.1).

    Args:
        tap: maps ``(B, C, H, W)``, such as those of the last stage, as in the paper; a detector's pyramid or a segmentor's last
            stage by default.
        rate: the paraphrase rate k > 0: the number of factors divided by the number of the teacher's channels.
        variant: ``"code"`` or ``"paper"``; see :func:`kdgraft.losses.factor_transfer`.
        weight: 500 in the authors' code, for CIFAR-10 and factors of 32×8×8. The mean of ``"code"`` falls with the square root of
            the number of factors times positions; ``"paper"`` rises with it. The batch size does not matter.
        pretrain, network, save_network, lr, betas, weight_decay: see :class:`PretrainedTerm`.

    Example:
        >>> distiller = Distiller(student, teacher, [FactorTransfer("conv", pretrain=2)], example=images)
        >>> [sorted(distiller(images).losses) for step in range(3)][1:]
        [['distill.factor_transfer.loss', 'distill.factor_transfer.reconstruction'], ['distill.factor_transfer.loss']]
    """

    def __init__(
        self,
        tap: Taps | None = None,
        *,
        rate: float = 0.5,
        variant: Literal["code", "paper"] = "code",
        weight: Weight = 500.0,
        **settings: Any,
    ) -> None:
        super().__init__(tap, adapter="any", weight=weight, **settings)
        check_number("FactorTransfer", "rate", rate, above=True)
        check_choice(self, "variant", variant, ("code", "paper"))
        self.rate, self.variant = rate, variant
        self.translators = nn.ModuleList()

    def build_network(self, student: Tensor, teacher: Tensor) -> nn.Module:
        factors = max(round(teacher.shape[1] * self.rate), 1)
        row = self.rows[len(self.translators)]
        resized = ", resize" if row.adapter.endswith("resize") else ""
        self.rows[len(self.translators)] = row._replace(adapter=f"Translator {student.shape[1]}→{factors}{resized}")
        self.translators.append(Translator(student.shape[1], factors).to(student.device))
        return Paraphraser(teacher.shape[1], factors)

    def lesson(self, network: nn.Module, teacher: Tensor, valid: Tensor | None) -> Mapping[str, Tensor]:
        assert isinstance(network, Paraphraser)
        return {"reconstruction": network.errors(teacher, valid)}

    def teach(self, networks: Sequence[nn.Module], levels: Sequence[Level], batch: Batch) -> Ratio:
        ratios = []
        for network, translator, (s, t, weight) in zip(networks, self.translators, levels, strict=True):
            assert isinstance(network, Paraphraser)
            factors = translator(upcast(s), weight), network.encode(upcast(t), weight)
            items = factor_transfer(*factors, variant=self.variant, valid=weight, reduction="none")
            ratios.append(weighted_ratio(items, images_present(weight)))
        return mean_of(ratios)
