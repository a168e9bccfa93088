"""Terms on each sample's own vector: embeddings of texts or images, and scores of the candidates of a query."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..adapters import AdapterKind, adapter_label, build_adapter
from ..batch import Batch
from ..errors import DistillError, check_number
from ..losses import Ratio, cosine, hint, margin_mse, upcast, weighted_ratio
from ..losses.scale import unit
from ..registry import RECIPES, TERMS
from ..taps import Recording, Tap
from .base import Taps, Wiring, check_choice, mean_of
from .samples import Pool, SampleTerm


class VectorTerm(SampleTerm):
    """Base of terms that compare each sample by itself, so that none is gathered over the processes.

    Args:
        tap, student_tap, teacher_tap: as in :class:`~kdgraft.terms.SampleTerm`; also numbers ``(B,)``.
        pool, student_pool, teacher_pool: the ``"mean"`` over a sample's positions, or the state of its ``"first"`` or ``"last"``
            token, for both models or each.
        region: as in :class:`~kdgraft.terms.SampleTerm`.

    Example:
        >>> class Lengths(VectorTerm):
        ...     def forward(self, student, teacher, batch):
        ...         ((s, t, weight),) = self.samples(student, teacher, batch)
        ...         return weighted_ratio((s.norm(dim=1) - t.norm(dim=1)).abs(), weight)
        >>> list(Distiller(student, teacher, [Lengths("conv")], example=images)(images).losses)
        ['distill.lengths.loss']
    """

    pools: ClassVar[tuple[str, ...]] = ("mean", "first", "last")

    def __init__(
        self,
        tap: Taps | None = None,
        *,
        pool: Pool = "mean",
        student_pool: Pool | None = None,
        teacher_pool: Pool | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(tap, pool=pool, **settings)
        for name, value in (("student_pool", student_pool), ("teacher_pool", teacher_pool)):
            check_choice(self, name, pool if value is None else value, self.pools)
        self.both_pools = {"student": student_pool or pool, "teacher": teacher_pool or pool}
        self._pooled: set[bool] = set()

    def between(self, listener: str, source: str) -> VectorTerm:
        twin = super().between(listener, source)
        assert isinstance(twin, VectorTerm)
        twin.both_pools = dict(zip(("student", "teacher"), twin.of_sides(*self.both_pools.values()), strict=True))
        return twin

    def pool_of(self, recording: Recording) -> Pool:
        return self.both_pools["teacher" if recording.owner == "teacher" else "student"]

    def pairs(self, student: Recording, teacher: Recording) -> list[tuple[Tensor, Tensor, Tap, Tap]]:
        found = super().pairs(student, teacher)
        return [(_in_rows(s), _in_rows(t), s_tap, t_tap) for s, t, s_tap, t_tap in found]

    def wire(self, wiring: Wiring) -> None:
        super().wire(wiring)
        pairs = self.pairs(wiring.student_recording, wiring.teacher_recording)
        for place, (s, t, s_tap, t_tap) in enumerate(pairs):
            self._pooled.add(s.ndim > 2)
            ours, theirs = (x.new_zeros(len(x), x.shape[1 if x.ndim == 4 else -1]) for x in (s, t))
            self.rows[place] = self.rows[place]._replace(adapter=self.wire_pair(ours, theirs, s_tap, t_tap))

    def _region_name(self) -> str:
        return " / ".join(dict.fromkeys(self.both_pools.values()))

    def wire_pair(self, student: Tensor, teacher: Tensor, student_tap: Tap, teacher_tap: Tap) -> str:
        """Check the shapes of a pair of vectors and build its adapter, if any; return the adapter's description."""
        return "–"

    def count(self, batch: Batch) -> Tensor | None:
        if len(self._pooled) > 1:
            return None
        return self.reader.samples(batch, self.student_taps[0] if self._pooled == {True} else None)

    def _vectors(self, tensor: Tensor, tap: Tap, recording: Recording, batch: Batch) -> tuple[Tensor, Tensor]:
        if tensor.ndim == 2 and not tap.path:  # a model's own output has a row for each sample
            return upcast(tensor), torch.ones_like(tensor[:, 0], dtype=torch.bool)
        return super()._vectors(tensor, tap, recording, batch)


def _in_rows(numbers: Tensor) -> Tensor:
    return numbers[:, None] if numbers.ndim == 1 else numbers


@TERMS.register
@RECIPES.register("embeddings")
class SampleEmbeddings(VectorTerm):
    """Embeddings of samples: the student's vector of each text or image imitates the teacher's, by MSE or cosine.

    For texts this is the distillation of sentence embeddings (Reimers & Gurevych 2020, arXiv 2004.09813, use the MSE of mean
    states). The loss is a mean over samples and, for the MSE, over channels, so that its weight depends on the lengths of the
    teacher's vectors: about 1/C per channel where they are normalised. Several taps give the mean of their losses.

    Args:
        tap: by default the last states of a Hugging Face model; see :class:`~kdgraft.VectorTerm`.
        loss: ``"mse"`` or ``"cosine"`` (1 − cos).
        adapter: ``"auto"`` (a linear map where the widths differ), ``"linear"`` or ``"none"``. A saved student has no adapter:
            compare its own vectors where they are to be used as they are.
        pool, student_pool, teacher_pool: see :class:`~kdgraft.VectorTerm`.

    Example:
        >>> distiller = Distiller(student, teacher, [SampleEmbeddings("conv", loss="cosine")], example=images)
        >>> for row in distiller.rows: print(row.student_shape, row.adapter, row.region)
        2×4×8×8 LinearAdapter 4→8 mean
    """

    def __init__(
        self,
        tap: Taps | None = None,
        *,
        loss: Literal["mse", "cosine"] = "mse",
        adapter: AdapterKind = "auto",
        **settings: Any,
    ) -> None:
        super().__init__(tap, **settings)
        check_choice(self, "loss", loss, tuple(_LOSSES))
        check_choice(self, "adapter", adapter, ("auto", "linear", "none"))
        self.loss: Callable[..., Tensor] = _LOSSES[loss]
        self.adapter_kind: AdapterKind = adapter
        self.adapters = nn.ModuleList()

    def wire_pair(self, student: Tensor, teacher: Tensor, student_tap: Tap, teacher_tap: Tap) -> str:
        same = student.shape[1] == teacher.shape[1]
        kind: AdapterKind = "none" if self.adapter_kind == "auto" and same else self.adapter_kind
        adapter = build_adapter(kind, student, teacher, f"{self.name} ({student_tap} → {teacher_tap})")
        self.adapters.append(adapter)
        return adapter_label(adapter, student, teacher)

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        parts = []
        for adapter, (s, t, weight) in zip(self.adapters, self.samples(student, teacher, batch), strict=True):
            items = self.loss(adapter(s, t), t, dim=-1, reduction="none")
            parts.append(weighted_ratio(items, weight))
        return mean_of(parts)


_LOSSES: dict[str, Callable[..., Tensor]] = {"mse": hint, "cosine": cosine}


@TERMS.register
@RECIPES.register("marginmse")
class MarginMSE(VectorTerm):
    """Margin-MSE of rankers: differences of scores within each query, squared error (Hofstätter et al. 2020, 2010.02666).

    Rows that follow one another belong to one query; a collator that turns each sample into its rows keeps them together under
    any shuffling. The shape of what is tapped tells what the rows are, for each model by itself:

    * ``(B, 1)`` or ``(B,)``, a score for each row: rows are (query, positive), (query, negative), …, ``candidates`` rows per query.
      This is a cross-encoder, such as a Hugging Face model for sequence classification with ``num_labels=1``, whose rows are
      tokenised pairs of texts. Its batch needs no labels.
    * ``(B, candidates)``: a row is a query, with the scores of its candidates, as models for multiple choice have.
    * ``(B, C)`` of any other width, or states and maps, which are pooled: a bi-encoder's vectors. Rows are query, positive,
      negative, …, ``candidates + 1`` rows per query, and scores are similarities of the query's vector with the others.

    The paper trains on MS MARCO with one negative, the mean over queries and weight 1; scores of a BERT differ by about 10 there.

    Args:
        tap: by default the output of a model in plain PyTorch, and the logits of a Hugging Face model.
        candidates: the number of candidates of a query, 2 or more; the first one is relevant.
        similarity: of vectors: ``"dot"`` (the paper) or ``"cosine"``.
        pool, student_pool, teacher_pool: see :class:`~kdgraft.VectorTerm`.

    Example:
        >>> rankers = [nn.Linear(3, 1) for _ in range(2)]
        >>> pairs = torch.rand(4, 3)  # of two queries
        >>> list(Distiller(*rankers, [MarginMSE()], example=pairs)(pairs).losses)
        ['distill.margin_mse.loss']
    """

    reads = "output"
    needs = ("samples", "queries")

    def __init__(
        self,
        tap: Taps | None = None,
        *,
        candidates: int = 2,
        similarity: Literal["dot", "cosine"] = "dot",
        **settings: Any,
    ) -> None:
        super().__init__(tap, **settings)
        check_number("MarginMSE", "candidates", candidates, 2, whole=True)
        check_choice(self, "similarity", similarity, ("dot", "cosine"))
        self.candidates, self.similarity = candidates, similarity
        self._rows_per_query: set[int] = set()

    def wire_pair(self, student: Tensor, teacher: Tensor, student_tap: Tap, teacher_tap: Tap) -> str:
        self._rows_per_query.add(self._rows_of(student.shape[1]))
        return f"{self.candidates} candidates"

    def count(self, batch: Batch) -> Tensor | None:
        rows = super().count(batch)
        (each,) = self._rows_per_query if len(self._rows_per_query) == 1 else (None,)
        return None if rows is None or each is None else rows // each

    def _check_samples(self, student: Tensor, teacher: Tensor, student_tap: Tap, teacher_tap: Tap) -> None:
        """A query may have other rows for each model."""

    def samples(self, student: Recording, teacher: Recording, batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield both models' rows of each tap, and ``(N,)``, true for the student's rows that count."""
        for s, t, s_tap, t_tap in self.pairs(student, teacher):
            ours, here = self._vectors(s, s_tap, student, batch)
            theirs, there = self._vectors(t, t_tap, teacher, batch)
            yield ours, theirs, here & there if len(here) == len(there) else here

    def _rows_of(self, width: int) -> int:
        """Return the number of rows of a query, by the width of a row's vector."""
        return {1: self.candidates, self.candidates: 1}.get(width, self.candidates + 1)

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        parts = []
        for s, t, present in self.samples(student, teacher, batch):
            ours, theirs = (self._scores(x, owner) for x, owner in ((s, "student"), (t, "teacher")))
            each = len(s) // max(len(ours), 1)
            whole = present.view(-1, max(each, 1)).all(1)
            parts.append(weighted_ratio(margin_mse(ours, theirs, reduction="none"), whole))
        return mean_of(parts)

    def _scores(self, vectors: Tensor, owner: str) -> Tensor:
        """Return the scores of each query's candidates, ``(Q, K)``."""
        width, rows = vectors.shape[1], self._rows_of(vectors.shape[1])
        if len(vectors) % rows:
            raise DistillError(
                f"{self.name}: the {owner}'s {len(vectors)} rows are no queries of {rows} rows each; see MarginMSE, and let the collator "
                "write the rows of each query together"
            )
        if width in (1, self.candidates):
            return vectors.reshape(-1, self.candidates)
        vectors = vectors.view(-1, rows, width)
        vectors = unit(upcast(vectors), -1) if self.similarity == "cosine" else upcast(vectors)
        # No matrix product, which autocast would compute in half precision.
        return (vectors[:, :1] * vectors[:, 1:]).sum(-1)
