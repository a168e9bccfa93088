"""The base of terms on layers of two models, and the check of taps against LayerDrop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from kdgraft.batch import Batch
from kdgraft.distributed import kept_in_graph
from kdgraft.errors import WiringError
from kdgraft.losses import Ratio
from kdgraft.sources import STUDENT
from kdgraft.taps import Recording, Tap
from kdgraft.terms import Term, check_choice

from .attention import Layer, Stack, drops_layers, layer_pairs, stacks
from .packing import per_text
from .queries import QUERY_TASKS, QueryMatching
from .tasks import task_of
from .tokens import Tokens, refuse_padded_images, tokens_of

LayerPairs = str | Sequence[Sequence[int]]
STACKS = ("auto", "layers", "encoder", "decoder", "cross")


class LayerTerm(Term):
    """Base of terms that find the layers of two models and compare them.

    Args:
        layers: the pairs of layers; see :func:`~kdgraft_nlp.attention.layer_pairs`.
        stack: for a model with an encoder and a decoder: ``"encoder"`` (``"auto"``), ``"decoder"`` or ``"cross"``.
    """

    matches_queries: ClassVar[bool] = False
    """True for a term that can compare the decoders of detectors, at queries that are matched by their predictions."""

    def __init__(
        self, layers: LayerPairs = "uniform", *, stack: Stack | Literal["auto"] = "auto", **settings: Any
    ) -> None:
        super().__init__(**settings)
        check_choice(self, "stack", stack, STACKS)
        self.layers, self.stack = layers, stack
        self.pairs: list[tuple[int, int]] = []
        self.drops_layers = False
        self.matching: QueryMatching | None = None

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        ours, theirs = self._stack(student, "student"), self._stack(teacher, "teacher")
        self.pairs = self._paired(len(ours), len(theirs))
        self.student_taps = [self._tap(ours[i]) for i, _ in self.pairs]
        self.teacher_taps = [self._tap(theirs[j]) for _, j in self.pairs]
        self.drops_layers = drops_layers(student, self.student_taps)
        if task_of(student) in QUERY_TASKS and self._stack_name != "encoder":
            self._match_queries(student, teacher)

    def _match_queries(self, student: nn.Module, teacher: nn.Module) -> None:
        """Have the queries of two detectors matched; a decoder's positions are queries, in an order of each model's own."""
        if not self.matches_queries or self._stack_name != "decoder":
            raise WiringError(
                f"{self.name}: positions of the stack {self._stack_name!r} of {type(student).__name__} are object queries, in an order of "
                "each model's own; use HiddenStates(stack='decoder') or stack='encoder' where the model has one, or SoftTargets"
            )
        self.matching = QueryMatching(student, teacher, self.name)
        self.student_taps = [*self.student_taps, *self.matching.taps[0]]
        self.teacher_taps = [*self.teacher_taps, *self.matching.taps[1]]

    def _paired(self, ours: int, theirs: int) -> list[tuple[int, int]]:
        """Return the pairs of layers of the listener and of the source; the user gives them as (student, other model)."""
        if self.listener == STUDENT:
            return layer_pairs(self.layers, ours, theirs, self.name)
        if self.source == STUDENT:
            return [(j, i) for i, j in layer_pairs(self.layers, theirs, ours, self.name)]
        if not isinstance(self.layers, str):  # two peers: each at the layers that the user gave for it
            told = [(j, j) for _, j in self.layers]
            return layer_pairs(told, ours, theirs, self.name)
        if ours > theirs:  # rules need the deeper model second
            return [(j, i) for i, j in layer_pairs(self.layers, theirs, ours, self.name)]
        return layer_pairs(self.layers, ours, theirs, self.name)

    def _stack(self, model: nn.Module, owner: str) -> list[Layer]:
        found = stacks(model)
        if not found:
            raise WiringError(
                f"{self.name}: {type(model).__name__} (the {owner}) has no attention that can be recorded; use SoftTargets or FeatureImitation"
            )
        name = self.stack
        if name == "auto":
            name = "layers" if "layers" in found else "encoder"
        if name not in found:
            raise WiringError(f"{self.name}: the {owner} has no stack {name!r}, but {', '.join(map(repr, found))}")
        self._stack_name = name
        return found[name]

    def _tap(self, layer: Layer) -> Tap:
        """Return the tap of a layer."""
        return Tap.parse(layer.path)

    def tokens(self, batch: Batch) -> Tokens:
        """Return the tokens of a batch.

        Raises:
            WiringError: it has padded images, whose positions in a sequence the term does not know.
        """
        refuse_padded_images(batch, self.name)
        return tokens_of(batch)

    def _real(self, tokens: Tokens) -> Tensor | None:
        """Return the tokens that count, ``(B, L)``, at the student's positions or at those of the pairs."""
        return tokens.student.of(self._stack_name) if tokens.paired is None else tokens.paired

    def count(self, batch: Batch) -> Tensor | None:
        return None if self.drops_layers else self._count(batch)

    def _count(self, batch: Batch) -> Tensor | None:
        """Return the denominator of a step that drops no layer, from the batch alone; ``None`` where it depends on the pass."""
        raise NotImplementedError

    def _ran(self, student: Recording) -> list[int]:
        """Return the indices of the pairs whose layers ran in this step: all, unless the student drops layers."""
        layers = self.student_taps[: len(self.pairs)]
        return [k for k, tap in enumerate(layers) if not self.drops_layers or student.calls(tap)]

    def _over_pairs(self, parts: Sequence[Ratio], teacher: Tensor) -> Ratio:
        """Return the mean over the pairs; where layers are dropped, over the items of the pairs that ran in any process."""
        if not self.drops_layers:
            return Ratio(torch.stack([part.numerator for part in parts]).mean(), parts[0].denominator)
        zero = kept_in_graph(self.parameters(), teacher.device)  # the adapters of dropped layers
        count = torch.zeros((), device=teacher.device)
        return Ratio(sum((p.numerator for p in parts), zero), sum((p.denominator for p in parts), count))

    def _lengths(self, tokens: Tokens, real: Tensor) -> Tensor:
        """Return the number of tokens that count in each text: ``(B,)``, or a value for each text of packed rows."""
        return per_text(real.long(), tokens.student.texts_of(self._stack_name))


def refuse_dropped_layers(student: nn.Module, terms: Sequence[Term]) -> None:
    """Refuse taps on layers that LayerDrop skips in some steps, for terms that need their taps in every step.

    Raises:
        WiringError: a term taps such a layer.
    """
    for term in terms:
        for tap in () if isinstance(term, LayerTerm) else term.student_taps:
            if drops_layers(student, [tap]):
                raise WiringError(
                    f"{term.name}: LayerDrop skips the layer of tap '{tap}' in some steps; use HiddenStates, or set the student's layerdrop to 0"
                )
