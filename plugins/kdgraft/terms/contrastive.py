"""Contrastive terms: samples are told from those that a memory holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..balance import Weight
from ..batch import Batch
from ..distributed import SharedRandom, gather_objects, gather_rows
from ..errors import DistillError, check_number, check_share
from ..losses import Ratio, crd, weighted_ratio
from ..losses.scale import unit
from ..losses.soft_targets import check_temperature
from ..readers import class_dim
from ..registry import RECIPES, TERMS
from ..taps import Recording
from .base import Taps, Wiring
from .samples import SampleTerm


@TERMS.register
@RECIPES.register("crd")
class CRD(SampleTerm):
    """CRD: a sample's embeddings by both models are told from remembered samples (Tian et al. 2020, arXiv 1910.10699).

    A linear head of each model, trained with the student, maps to embeddings. Each model's embedding is told, by noise-contrastive
    estimation, from the other model's embeddings of remembered samples, and drawn to its embedding of the same sample.

    The paper remembers every sample of the training set, by its index. Where the host tells which samples a batch holds, a sample
    keeps its row: it is averaged with ``momentum``, and is not its own negative. So do MMDetection and MMSegmentation by the image's
    id or path, ``DistillCollator(id="…")`` by a column, and ``distiller(x, indices=…)``. Without, and once ``memory`` samples are
    held, the newest replace the oldest: set ``memory`` to the size of the training set for the paper's memory. Where a batch has one
    label per sample, samples of the same class are no negatives, as in the paper.

    The authors' code attracts an embedding to the *remembered* one of its sample, which is random in the first epoch; here it is the
    current one, without gradient. Each process compares its own samples with the same negatives; the memory receives those of all,
    is the same on every process, and is saved in checkpoints (16 MB by default). Batches in parts are remembered part by part.

    The published weight is 0.8, on the last features of classifiers of CIFAR-100. The loss is a mean over samples, but a sum over
    the negatives: its scale does not depend on the batch or on the models' widths.

    Args:
        tap, region: see :class:`~kdgraft.terms.SampleTerm`; one tensor.
        pool: ``"mean"`` or ``"first"``.
        width: the width of the embeddings.
        temperature: τ > 0.
        memory: the number of samples to remember.
        negatives: the maximum number of them to compare with, drawn anew in each step.
        momentum: the share of the old embedding of a sample that is seen again, in [0, 1].
        weight: 0.8 in the authors' code.

    Example:
        >>> distiller = Distiller(student, teacher, [CRD("conv", memory=1000)], example=images)
        >>> first, second = (distiller(images, targets=labels, indices=[3, 7]).losses for _ in range(2))
        >>> bool(first["distill.crd.loss"] == 0), bool(second["distill.crd.loss"] > 0)  # nothing to remember at first
        (True, True)
    """

    pools: ClassVar[tuple[str, ...]] = ("mean", "first")
    student_memory: Tensor
    teacher_memory: Tensor
    classes: Tensor

    def __init__(
        self,
        tap: Taps | None = None,
        *,
        width: int = 128,
        temperature: float = 0.07,
        memory: int = 16384,
        negatives: int = 16384,
        momentum: float = 0.5,
        weight: Weight = 0.8,
        **settings: Any,
    ) -> None:
        super().__init__(tap, weight=weight, **settings)
        check_temperature(temperature)
        for name, size in dict(width=width, memory=memory, negatives=negatives).items():
            check_number("CRD", name, size, 1, whole=True)
        check_share("CRD", "momentum", momentum)
        self.width, self.temperature, self.momentum = width, temperature, momentum
        self.memory, self.negatives = memory, negatives
        self._random = SharedRandom()
        self._stored = 0
        self._places: dict[Any, int] = {}
        self._owners: dict[int, Any] = {}

    def wire(self, wiring: Wiring) -> None:
        super().wire(wiring)
        if len(self.rows) != 1:
            raise DistillError(f"{self.name}: takes one tap of one tensor, got {len(self.rows)}; add a term for each")
        ((s, t, _, _),) = self.pairs(wiring.student_recording, wiring.teacher_recording)
        widths = [tensor.shape[class_dim(tensor)] for tensor in (s, t)]
        self.student_head, self.teacher_head = (nn.Linear(own, self.width).to(s.device) for own in widths)
        for name in ("student_memory", "teacher_memory"):
            self.register_buffer(name, torch.zeros(self.memory, self.width, device=s.device))
        self.register_buffer("classes", torch.full((self.memory,), -1, device=s.device))
        label = f"{widths[0]}→{self.width}, {widths[1]}→{self.width}, memory {self.memory}"
        self.rows[0] = self.rows[0]._replace(adapter=label)

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        ((s, t, present),) = self.samples(student, teacher, batch)
        with torch.autocast(s.device.type, enabled=False):
            s, t = (
                unit(head(vectors.to(head.weight.dtype)), 1)
                for head, vectors in ((self.student_head, s), (self.teacher_head, t))
            )
        labels, ids = _labels(batch, s), _ids(batch, s)
        rows = self._drawn(s.device)
        known = self._others(labels, ids, rows)
        settings: Any = dict(temperature=self.temperature, others=known, reduction="none")
        items = crd(s, t.detach(), self.teacher_memory[rows], **settings)
        items = items + crd(t, s.detach(), self.student_memory[rows], **settings)
        ratio = weighted_ratio(items, present)
        self._remember(s, t, labels, present, ids)
        return ratio

    def _drawn(self, device: torch.device) -> Tensor:
        """Return the rows of this step's negatives, the same on every process."""
        held = min(self._stored, self.memory)
        if held <= self.negatives:
            return torch.arange(held, device=device)
        return torch.randperm(held, generator=self._random.of_all_ranks())[: self.negatives].to(device)

    def _others(self, labels: Tensor, ids: Sequence[Any] | None, rows: Tensor) -> Tensor:
        """Return ``(N, M)``, true for rows of another sample, and of another class where that is known."""
        known = (labels[:, None] != self.classes[rows]) | (labels < 0)[:, None]
        if ids is not None:
            own = torch.tensor([self._places.get(one, -1) for one in ids], dtype=torch.long, device=rows.device)
            known &= own[:, None] != rows
        return known

    @torch.no_grad()
    def _remember(
        self, student: Tensor, teacher: Tensor, labels: Tensor, present: Tensor, ids: Sequence[Any] | None
    ) -> None:
        """Store the samples of all processes, in the order of ranks."""
        kept = present & student.isfinite().all(1) & teacher.isfinite().all(1)
        here = kept.nonzero()[:, 0]
        names = None if ids is None else gather_objects([ids[i] for i in here.tolist()])
        s, t, labels = (gather_rows(values[here]) for values in (student, teacher, labels))
        targets = self._assign([None] * len(s) if names is None else names)
        if not targets:
            return
        places, chosen, seen = (torch.tensor(part, device=s.device) for part in zip(*targets, strict=True))
        share = (self.momentum * seen)[:, None]
        for memory, new in ((self.student_memory, s), (self.teacher_memory, t)):
            mixed = share * memory[places] + (1 - share) * new[chosen].to(memory.dtype)
            memory[places] = unit(mixed, 1).to(memory.dtype)
        self.classes[places] = labels[chosen]

    def _assign(self, names: Sequence[Any]) -> list[tuple[int, int, bool]]:
        """Return for each row of the memory that changes: its place, the sample to store, and whether it held that sample."""
        found: dict[int, tuple[int, bool]] = {}
        for sample, name in enumerate(names):
            place = None if name is None else self._places.get(name)
            if place is not None:
                found.setdefault(place, (sample, True))  # a sample that is twice in a batch counts once
                continue
            place = self._stored % self.memory
            self._stored += 1
            self._places.pop(self._owners.pop(place, None), None)
            if name is not None:
                self._places[name], self._owners[place] = place, name
            found[place] = (sample, False)
        return [(place, *chosen) for place, chosen in found.items()]

    def hidden_state(self) -> dict[str, Any]:
        return {"random": self._random.state(), "stored": self._stored, "places": dict(self._places)}

    def load_hidden_state(self, state: Mapping[str, Any]) -> None:
        self._random.load(state["random"])
        self._stored, self._places = int(state["stored"]), dict(state["places"])
        self._owners = {place: name for name, place in self._places.items()}


def _labels(batch: Batch, samples: Tensor) -> Tensor:
    """Return the class of each sample, below 0 where the batch has no label per sample."""
    labels = batch.labels
    if isinstance(labels, Tensor) and labels.shape == samples.shape[:1] and not labels.is_floating_point():
        return labels.to(samples.device).long()
    return torch.full((len(samples),), -1, device=samples.device)


def _ids(batch: Batch, samples: Tensor) -> list[Any] | None:
    """Return the identity of each sample, if the host knows it."""
    if batch.samples is None or len(batch.samples.ids) != len(samples):
        return None
    return [one.item() if hasattr(one, "item") else one for one in batch.samples.ids]
