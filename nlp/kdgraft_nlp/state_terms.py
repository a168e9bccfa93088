"""Terms on hidden states, embeddings and states of first tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdgraft.adapters import AdapterKind, adapter_label, build_adapter
from kdgraft.batch import Batch
from kdgraft.errors import DistillError, WiringError
from kdgraft.losses import Ratio, cosine, hint, patient, weighted_ratio
from kdgraft.pooling import first_of_each
from kdgraft.taps import Recording, Tap
from kdgraft.terms import check_choice
from kdgraft.wiring import Wiring

from .attention import Layer
from .layers import LayerPairs, LayerTerm
from .queries import QueryMatching
from .registry import TERMS
from .tasks import accepted
from .tokens import ModelTokens, image_positions, tokens_of


@TERMS.register
class HiddenStates(LayerTerm):
    """Hidden states of layers, through a projection of automatic size (TinyBERT, arXiv 1909.10351, equation 8).

    A layer's output is compared; in models with pre-normalisation it is the state before the final normalisation. The states of
    a detector's decoder are compared at queries that are matched, and weighted, as by :class:`SoftTargets`.

    Args:
        layers: ``"uniform"``, ``"last"``, ``"skip"``, ``"final"`` or pairs.
        loss: ``"mse"``, ``"cosine"`` (DistilBERT) or ``"normalized"`` (squared error after a layer normalisation without
            parameters, MobileBERT).
        adapter: ``"auto"`` (linear), ``"linear"`` or ``"none"`` for equal widths.
        stack: see :class:`LayerTerm`.
    """

    matches_queries = True

    def __init__(
        self,
        layers: LayerPairs = "uniform",
        *,
        loss: Literal["mse", "cosine", "normalized"] = "mse",
        adapter: AdapterKind = "auto",
        **settings: Any,
    ) -> None:
        super().__init__(layers, **settings)
        check_choice(self, "loss", loss, tuple(_LOSSES))
        check_choice(self, "stack", self.stack, ("auto", "layers", "encoder", "decoder"))
        self.loss: Callable[..., Tensor] = _LOSSES[loss]
        self.adapter_kind: AdapterKind = adapter
        self.adapters = nn.ModuleList()

    def wire(self, wiring: Wiring) -> None:
        region = "valid tokens" if self.matching is None else "matched queries"
        for k, s, t in self._states(wiring.student_recording, wiring.teacher_recording):
            s_tap, t_tap = self.student_taps[k], self.teacher_taps[k]
            if s.ndim != 3 or t.ndim != 3:
                raise WiringError(
                    f"{self.name}: {s_tap} {tuple(s.shape)} and {t_tap} {tuple(t.shape)} must be (B, L, C)"
                )
            if (
                self.matching is None
                and s.shape[1] != t.shape[1]
                and "labels" in wiring.fields
                and _sees_images(wiring.student)
            ):
                raise WiringError(
                    f"{self.name}: student and teacher split images into {s.shape[1]} and {t.shape[1]} positions, which cannot be compared; use SoftTargets"
                )
            adapter = build_adapter(self.adapter_kind, s[:, :1], t[:, :1], f"{self.name} ({s_tap} → {t_tap})")
            self.adapters.append(adapter)
            label = adapter_label(adapter, s, t)
            self.rows.append(self.row(s, t, taps=(s_tap, t_tap), adapter=label, region=region))
        if self.matching is not None:
            self.matching.settle(wiring)

    def _state(self, recording: Recording, tap: Tap) -> Tensor:
        value = recording[tap]
        return value[0] if isinstance(value, (tuple, list)) else value

    def _states(self, student: Recording, teacher: Recording) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield the index and both models' states for each pair of layers that ran."""
        for k in self._ran(student):
            yield k, self._state(student, self.student_taps[k]), self._state(teacher, self.teacher_taps[k])

    def _count(self, batch: Batch) -> Tensor | None:
        tokens = tokens_of(batch)
        real = self._real(tokens)
        return torch.tensor(float(tokens.size)) if real is None else real.sum().float()

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        tokens = tokens_of(batch)
        real = self._real(tokens)
        places = None if real is None else real.flatten().nonzero().flatten()
        parts = []
        if self.matching is not None:
            return self._of_queries(self.matching, student, teacher, batch)
        for k, s, t in self._states(student, teacher):
            s, t = tokens.align(s, t)
            if s.shape[1] != t.shape[1]:
                raise WiringError(
                    f"{self.name}: student and teacher have {s.shape[1]} and {t.shape[1]} positions; pass teacher_tokenizer=… to the collator"
                )
            if places is not None:
                s, t = (_rows(x, places) for x in (s, t))
            items = self.loss(self.adapters[k](s, t), t, dim=-1, reduction="none")
            total = items.sum() if real is not None else self._per_image(items, batch)
            parts.append(Ratio(total, total.new_tensor(float(len(s)))))
        return self._over_pairs(parts, self._state(teacher, self.teacher_taps[0]))

    def _per_image(self, items: Tensor, batch: Batch) -> Tensor:
        """Return the sum of each sample's mean over its positions ``(B, L)``, without the padding of images."""
        places = image_positions(batch, items.shape[1], self.name)
        if places is None:
            return items.mean(1).sum()
        places = places.to(items.device)
        return (items.masked_fill(~places, 0).sum(1) / places.sum(1).clamp(min=1)).sum()

    def _of_queries(self, matching: QueryMatching, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        """Return the loss at matched queries; the weights of an image add up to 1."""
        found = matching.by_predictions(student, teacher, batch)
        parts = []
        for k, s, t in self._states(student, teacher):
            s, t = (
                one.own(states)[found.images, queries]
                for one, states, queries in zip(matching.sides, (s, t), found.queries, strict=True)
            )
            parts.append(weighted_ratio(self.loss(self.adapters[k](s, t), t, dim=-1, reduction="none"), found.weight))
        return self._over_pairs(parts, self._state(teacher, self.teacher_taps[0]))


def _rows(states: Tensor, places: Tensor) -> Tensor:
    """Return the states ``(n, C)`` at places of all tokens; where these are all tokens, nothing is copied."""
    flat = states.flatten(0, 1)
    return flat if len(places) == len(flat) else flat.index_select(0, places)


def _normalized(student: Tensor, teacher: Tensor, **settings: Any) -> Tensor:
    width = student.shape[-1:]
    return hint(F.layer_norm(student.float(), width), F.layer_norm(teacher.float(), width), **settings)


_LOSSES: dict[str, Callable[..., Tensor]] = {"mse": hint, "cosine": cosine, "normalized": _normalized}


@TERMS.register
class Embeddings(HiddenStates):
    """The output of the embedding layer, which is the first layer's input (TinyBERT, arXiv 1909.10351, equation 9).

    Args:
        loss, adapter, stack: as in :class:`HiddenStates`.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__([(0, 0)], **settings)

    def _tap(self, layer: Layer) -> Tap:
        return Tap.parse(f"{layer.path}:input")


@TERMS.register
class PatientStates(HiddenStates):
    """The state of each text's first token, L2-normalised (patient knowledge distillation, arXiv 1908.09355, equation 7).

    Args:
        layers: ``"skip"`` (PKD-Skip), ``"last"``, ``"uniform"``, ``"final"`` or pairs.
        variant: ``"paper"`` sums over channels, ``"code"`` takes the mean as the authors' code does.
        adapter: by default ``"none"`` for equal widths, as in the paper, and a linear map where the widths differ.
    """

    matches_queries = False

    def __init__(
        self,
        layers: LayerPairs = "skip",
        *,
        variant: Literal["paper", "code"] = "paper",
        adapter: AdapterKind | None = None,
        **settings: Any,
    ) -> None:
        if "loss" in settings:
            raise DistillError("PatientStates takes no argument 'loss'; use HiddenStates for other losses")
        super().__init__(layers, adapter=adapter or "none", **settings)
        check_choice(self, "variant", variant, ("paper", "code"))
        self.adapter_given = adapter is not None
        self.variant = variant

    def wire(self, wiring: Wiring) -> None:
        if not self.adapter_given:
            pairs = self._states(wiring.student_recording, wiring.teacher_recording)
            widths = {states.shape[-1] for _, *pair in pairs for states in pair}
            self.adapter_kind = "none" if len(widths) == 1 else "linear"
        super().wire(wiring)
        self.rows = [row._replace(region="first token") for row in self.rows]

    def _count(self, batch: Batch) -> Tensor | None:
        tokens = tokens_of(batch)
        if tokens.student.texts_of(self._stack_name) is None:
            return torch.tensor(float(tokens.size))
        real = self._real(tokens)
        assert real is not None
        return (self._lengths(tokens, real) > 0).sum().float()

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        tokens = self.tokens(batch)
        parts = []
        for k, states, targets in self._states(student, teacher):
            s, t = self._first(states, tokens.student), self._first(targets, tokens.teacher)
            total = patient(self.adapters[k](s, t), t, variant=self.variant, reduction="sum")
            parts.append(Ratio(total, total.new_tensor(float(len(t)))))
        return self._over_pairs(parts, self._state(teacher, self.teacher_taps[0]))

    def _first(self, states: Tensor, side: ModelTokens) -> Tensor:
        return first_of_each(states, side.of(self._stack_name), side.texts_of(self._stack_name))


def _sees_images(model: nn.Module) -> bool:
    return "pixel_values" in accepted(model) and "input_ids" not in accepted(model)
