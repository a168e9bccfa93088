"""Reads what Hugging Face models predict: per sample, per token, per answer position, per pixel."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from kdgraft.batch import Batch
from kdgraft.errors import DistillError, WiringError
from kdgraft.readers import Compared, Pairs, Reader, Scores
from kdgraft.sources import combined
from kdgraft.taps import Recording, Tap
from kdgraft.wiring import Wiring

from .chunked import head_of
from .predictions import (
    MULTI_LABEL,
    by_pixel,
    check_layout,
    counted_pixels,
    ignored_index,
    independent,
    problem_types_of,
)
from .tasks import LANGUAGE_MODELS, PER_TOKEN, task_of
from .tokens import ModelTokens, Tokens, take, tokens_of

CountedTokens = Literal["auto", "valid", "labelled"]


class HFReader(Reader):
    """Knows the task that two models are made for."""

    default_taps: ClassVar = {}
    chunked = False
    """Whether the host computes terms on logits from hidden states, in chunks."""

    def scores(  # type: ignore[override]  # each host has settings of its own
        self, student: nn.Module, teacher: nn.Module, *, tokens: CountedTokens = "auto"
    ) -> Scores:
        """The class scores of two models of one task.

        Segmentors are compared on the grid of the labels, to which their own loss resizes the scores; pixels that this loss
        ignores take no part.

        Args:
            tokens: whose logits count, for models that predict per token: ``"valid"`` (every token that is not padding),
                ``"labelled"`` (those with a label other than −100, for a causal model those that predict one), or ``"auto"``:
                labelled for token classification, causal (vision-language models too) and sequence-to-sequence models, valid for
                masked language models and the frames of CTC models.
        """
        return OutputScores(student, teacher, self.term, tokens, self.chunked)


class ChunkedReader(HFReader):
    """Reads a causal language model whose logits are computed in chunks."""

    chunked = True


class OutputScores(Scores):
    """The logits of two models of one task.

    Args:
        student, teacher: the models.
        term: the term's name, for messages.
        tokens: see :meth:`HFReader.scores`.
        chunked: read the states under the output layers in place of logits.
    """

    same_vocabulary = True
    """Whether tokens are compared one by one, so that both models must have the same."""
    no_single_class = (
        f" ({MULTI_LABEL}, or labels that are floats); use SoftTargets, or problem_type='single_label_classification' in the "
        "config where the labels are shares of one class"
    )

    def __init__(self, student: nn.Module, teacher: nn.Module, term: str, tokens: CountedTokens, chunked: bool) -> None:
        if tokens not in ("auto", "valid", "labelled"):
            raise DistillError(f"{term}: tokens must be one of auto, valid, labelled, got {tokens!r}")
        self.name, self.task, self.chunked, other = term, task_of(student), chunked, task_of(teacher)
        if other != self.task:
            raise WiringError(
                f"{self.name} compares predictions, and the student's are of another kind ({self.task}, "
                f"{type(student).__name__}) than the teacher's ({other}, {type(teacher).__name__})"
            )
        # Answers have padding to be masked in each member's own positions before any mean.
        self.averages = self.task != "question"
        fields = ["start_logits", "end_logits"] if self.task == "question" else ["logits"]
        self.taps = ([Tap.parse(f"[{field}]") for field in fields],) * 2
        if chunked:
            self.taps = tuple([Tap.parse(f"{model.base_model_prefix}[0]")] for model in (student, teacher))  # type: ignore[assignment]
        if tokens != "auto" and (self.task not in PER_TOKEN or (self.task, tokens) == ("ctc", "labelled")):
            raise WiringError(
                f"{self.name}: tokens={tokens!r} is for models that predict per labelled token, and "
                f"{type(student).__name__} does not; leave it out"
            )
        self.where = tokens if tokens != "auto" else "valid" if self.task in ("masked", "ctc") else "labelled"
        self.problem = problem_types_of(self.name, student, teacher)
        self.ignored_index = ignored_index(student) if self.task == "segmentation" else 255
        self.compares_classes = self.task not in (*LANGUAGE_MODELS, "choice", "ctc")
        self.independent = self.compares_classes and self.problem.named == MULTI_LABEL
        self.common: int | None = None

    def wire(self, wiring: Wiring) -> list[Compared]:
        if self.same_vocabulary and self.task in LANGUAGE_MODELS and wiring.facts.get("vocabulary") == "different":
            raise WiringError(
                f"{self.name}: student and teacher have different tokenizers, so that their tokens cannot be compared one by "
                "one; use UniversalLogits"
            )
        found = []
        for s_tap, t_tap in zip(*self.taps, strict=True):
            student, teacher = wiring.student_recording[s_tap], wiring.teacher_recording[t_tap]
            if self.chunked:
                student, teacher = (
                    states.new_empty(*states.shape[:-1], len(head_of(model).weight))
                    for states, model in ((student, wiring.student), (teacher, wiring.teacher))
                )
            self.check(student, teacher, wiring)
            adapter = "in chunks" if self.chunked else "–"
            found.append(Compared(student, teacher, (s_tap, t_tap), self._region(student), adapter))
        return found

    def check(self, student: Tensor, teacher: Tensor, wiring: Wiring) -> None:
        """Raise a :class:`WiringError` where two models' logits cannot be compared class by class."""
        if student.ndim != teacher.ndim:
            raise WiringError(
                f"{self.name}: logits {tuple(student.shape)} and {tuple(teacher.shape)} cannot be compared"
            )
        check_layout(self.name, self.task, wiring.student, student)
        axis = 1 if self.task == "segmentation" else -1
        classes, others = student.shape[axis], teacher.shape[axis]
        if self.task not in ("question", *LANGUAGE_MODELS):
            single = classes == 1 and self.task != "choice"
            if single or self.problem.named == "regression":
                raise WiringError(
                    f"{self.name}: softmax over classes means nothing for {self.problem.named or 'a single output'}; use terms on "
                    "layers, or FeatureImitation(student_tap='…', teacher_tap='…', adapter='none') on the output layers"
                )
        if self.task == "question" or classes == others:
            return
        sizes = f"{classes} and {others}"
        if self.task not in LANGUAGE_MODELS:
            raise WiringError(f"{self.name}: student and teacher tell {sizes} classes apart; they must agree")
        # Sizes that differ by padding share their first ids; that they do is checked where the tokenizers are known.
        self.common = min(classes, others)
        if not wiring.facts.get("vocabulary_checked"):
            raise WiringError(
                f"{self.name}: the vocabularies have {sizes} entries and no tokenizer says that they are padded versions of "
                "one; pass processing_class=tokenizer to the trainer, or use UniversalLogits for different ones"
            )
        if int(wiring.facts["vocabulary_checked"]) > self.common:
            raise WiringError(
                f"{self.name}: the tokenizer has {wiring.facts['vocabulary_checked']} entries and the smaller model "
                f"{self.common}; use UniversalLogits for different vocabularies"
            )

    def _region(self, logits: Tensor) -> str:
        if self.task == "question":
            return "valid positions"
        if self.task == "segmentation":
            return "labelled pixels"
        return "sequences" if logits.ndim == 2 else f"{self.where} tokens"

    def weight(self, tokens: Tokens, side: ModelTokens) -> Tensor | None:
        """The token predictions that count, ``(B, L)``."""
        if self.where == "labelled" and side.labelled is not None:
            return side.labelled
        return side.of("decoder" if self.task == "seq2seq" else "layers")

    def count(self, batch: Batch) -> Tensor | None:
        tokens = tokens_of(batch)
        if self.task == "segmentation":
            weight = counted_pixels(batch.labels, self.ignored_index)
        elif self.task in PER_TOKEN:
            weight = self.pair_weight(tokens)
        else:
            return torch.tensor(float(tokens.samples))
        return None if weight is None else weight.sum().float()

    def pair_weight(self, tokens: Tokens) -> Tensor | None:
        """The predictions that count, of aligned tokens the pairs: ``(B, L)``."""
        weight = self.weight(tokens, tokens.student)
        if tokens.pairs is None or tokens.paired is None or weight is None:
            return weight
        return take(weight, tokens.pairs[..., 0]) & tokens.paired

    def pairs(self, student: Recording, teacher: Recording, batch: Batch) -> list[Pairs]:
        tokens, found = tokens_of(batch), []
        for tap in self.taps[0]:
            s = student[tap]
            if self.task == "question":
                found.append(self._answers(s, teacher[tap], tokens))
                continue
            apart = self._independent(s, batch)

            def read(source: Recording, tap: Tap = tap, s: Tensor = s) -> Tensor:
                t = source[tap]
                if self.task == "segmentation":
                    t = by_pixel(s, t, batch.labels)[1]
                t = t if source.class_order is None else t[..., source.class_order]
                return t if self.common is None else t[..., : self.common]

            t = combined(teacher, read, "sigmoid" if apart else "softmax")
            s = by_pixel(s, s, batch.labels)[0] if self.task == "segmentation" else s
            s = s if self.common is None else s[..., : self.common]
            if s.ndim == 2:
                pairs = Pairs(s, t)
            elif s.ndim == 4:
                pairs = picked(s, t, counted_pixels(batch.labels, self.ignored_index))
            else:
                self._check_lengths(s, t, tokens)
                pairs = self.per_token(s, t, tokens)
            pairs.independent = pairs.mean = apart
            found.append(pairs)
        return found

    def on_chunk(self, student: Tensor, teacher: Tensor) -> Pairs:
        """Logits ``(n, V)`` of some tokens, as far as the vocabularies have entries in common."""
        return Pairs(student[:, : self.common], teacher[:, : self.common])

    def counted(self, batch: Batch) -> Tensor:
        """The tokens whose predictions count, ``(B, L)``."""
        weight = self.weight(tokens_of(batch), tokens_of(batch).student)
        assert weight is not None
        return weight

    def _independent(self, student: Tensor, batch: Batch) -> bool:
        """Whether each class is right or wrong on its own."""
        return self.task not in LANGUAGE_MODELS and independent(self.name, self.problem, student, batch.labels)

    def _check_lengths(self, student: Tensor, teacher: Tensor, tokens: Tokens) -> None:
        """Raises a :class:`WiringError` where the logits are not those of the batch's tokens."""
        for logits, side, owner in ((student, tokens.student, "student"), (teacher, tokens.teacher, "teacher")):
            weight = self.weight(tokens, side)
            if weight is not None and weight.shape != logits.shape[:2]:
                raise WiringError(
                    f"{self.name}: the {owner} gives logits {tuple(logits.shape)} for tokens or labels {tuple(weight.shape)}, so "
                    "that nobody can tell which belong together; use terms on layers, or FeatureImitation with taps of your own"
                )

    def per_token(self, student: Tensor, teacher: Tensor, tokens: Tokens) -> Pairs:
        """The logits ``(n, C)`` of the tokens that count."""
        weight = self.pair_weight(tokens)
        return picked(*tokens.align(student, teacher), weight)

    def _answers(self, student: Tensor, teacher: Tensor, tokens: Tokens) -> Pairs:
        student, teacher = tokens.align(student, teacher)
        real = tokens.student.real if tokens.paired is None else tokens.paired
        if real is not None:
            low = torch.finfo(torch.float16).min
            student, teacher = student.masked_fill(~real, low), teacher.masked_fill(~real, low)
        return Pairs(student, teacher)


def picked(student: Tensor, teacher: Tensor, weight: Tensor | None) -> Pairs:
    """The items that count, picked: masked ones cost no softmax over the classes."""
    if weight is None:
        return Pairs(student, teacher)
    return Pairs(student[weight], teacher[weight], count=weight.sum().to(torch.float32))
