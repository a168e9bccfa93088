"""Terms on logits: soft targets, divergences of language models, universal logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdgraft.errors import DistillError, WiringError, check_flag
from kdgraft.losses import (
    Ratio,
    binary_soft_targets,
    generalized_jsd,
    reverse_kl,
    skewed_kl,
    soft_targets,
    universal_logits,
    weighted_ratio,
)
from kdgraft.losses.divergences import check_share
from kdgraft.losses.soft_targets import check_temperature
from kdgraft.regions import Batch
from kdgraft.sources import combined
from kdgraft.taps import Recording, Tap
from kdgraft.terms import Term, Wiring, check_choice, mean_of

from .chunked import head_of
from .predictions import (
    MULTI_LABEL,
    Problem,
    by_pixel,
    check_layout,
    counted_pixels,
    ignored_index,
    independent,
    problem_of,
)
from .registry import TERMS
from .tasks import LANGUAGE_MODELS, PER_TOKEN, task_of
from .tokens import Side, Tokens, take, tokens_of

Where = Literal["auto", "valid", "labelled"]
Compare = Callable[[Tensor, Tensor], Tensor]


class LogitTerm(Term):
    """Base of terms that compare what two models of one task predict: per sample, per token, per answer position, per pixel.

    Segmentors are compared on the grid of the labels, to which their own loss resizes the scores; pixels that this loss ignores
    take no part.

    Args:
        tokens: whose logits count, for models that predict per token: ``"valid"`` (every token that is not padding),
            ``"labelled"`` (those with a label other than −100, for a causal model those that predict one), or ``"auto"``:
            labelled for token classification, causal (vision-language models too) and sequence-to-sequence models, valid for
            masked language models and the frames of CTC models.
    """

    compares_classes = True
    hears_ensembles = True
    same_vocabulary = True

    def __init__(self, *, tokens: Where = "auto", **settings: Any) -> None:
        super().__init__(**settings)
        check_choice(self, "tokens", tokens, ("auto", "valid", "labelled"))
        self.tokens = tokens
        self.task = "other"
        self.problem = Problem()
        self.ignored_index = 255
        self.common: int | None = None
        self.chunked = False
        """Whether the host computes this term from hidden states."""

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        self.task = task_of(student)
        other = task_of(teacher)
        if other != self.task:
            raise WiringError(
                f"{self.name} compares predictions, and the student's are of another kind ({self.task}, "
                f"{type(student).__name__}) than the teacher's ({other}, {type(teacher).__name__})"
            )
        # Answers have padding to be masked in each member's own positions before any mean.
        self.hears_ensembles = self.task != "question"
        fields = ["start_logits", "end_logits"] if self.task == "question" else ["logits"]
        self.student_taps = self.teacher_taps = [Tap.parse(f"[{field}]") for field in fields]
        if self.chunked:
            self.student_taps, self.teacher_taps = (
                [Tap.parse(f"{model.base_model_prefix}[0]")] for model in (student, teacher)
            )
        if self.tokens == "auto":
            self._where = "valid" if self.task in ("masked", "ctc") else "labelled"
        else:
            self._where = self.tokens
            if self.task not in PER_TOKEN or (self.task, self.tokens) == ("ctc", "labelled"):
                raise WiringError(
                    f"{self.name}: tokens={self.tokens!r} is for models that predict per labelled token, and "
                    f"{type(student).__name__} does not; leave it out"
                )
        self.problem = problem_of(self.name, student, teacher)
        if self.task == "segmentation":
            self.ignored_index = ignored_index(student)
        if self.task in (*LANGUAGE_MODELS, "choice", "ctc"):
            self.compares_classes = False

    def wire(self, wiring: Wiring) -> None:
        if self.same_vocabulary and self.task in LANGUAGE_MODELS and wiring.facts.get("vocabulary") == "different":
            raise WiringError(
                f"{self.name}: student and teacher have different tokenizers, so that their tokens cannot be compared one by "
                "one; use UniversalLogits"
            )
        for s_tap, t_tap in zip(self.student_taps, self.teacher_taps, strict=True):
            student, teacher = wiring.student_recording[s_tap], wiring.teacher_recording[t_tap]
            if self.chunked:
                student, teacher = (
                    states.new_empty(*states.shape[:-1], len(head_of(model).weight))
                    for states, model in ((student, wiring.student), (teacher, wiring.teacher))
                )
            self._check(student, teacher, wiring)
            adapter = "in chunks" if self.chunked else "–"
            region = self._region(student)
            self.rows.append(self.row(student, teacher, taps=(s_tap, t_tap), adapter=adapter, region=region))

    def _check(self, student: Tensor, teacher: Tensor, wiring: Wiring) -> None:
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
            if self.problem.named == MULTI_LABEL and not self._takes_independent:
                raise WiringError(self._no_independent())
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
        return "sequences" if logits.ndim == 2 else f"{self._where} tokens"

    @property
    def _takes_independent(self) -> bool:
        return type(self).compare_independent is not LogitTerm.compare_independent

    def _no_independent(self) -> str:
        return (
            f"{self.name} compares one distribution over all classes, and these models score each class on its own "
            f"({MULTI_LABEL}, or labels that are floats); use SoftTargets, or problem_type='single_label_classification' in the "
            "config where the labels are shares of one class"
        )

    def _weight(self, tokens: Tokens, side: Side) -> Tensor | None:
        """``(B, L)``: which token predictions count."""
        if self._where == "labelled" and side.labelled is not None:
            return side.labelled
        return side.of("decoder" if self.task == "seq2seq" else "layers")

    def count(self, batch: Batch) -> Tensor | None:
        tokens = tokens_of(batch)
        if self.task == "segmentation":
            weight = counted_pixels(batch.labels, self.ignored_index)
        elif self.task in PER_TOKEN:
            weight = self._pair_weight(tokens)
        else:
            return torch.tensor(float(tokens.samples))
        return None if weight is None else weight.sum().float()

    def _pair_weight(self, tokens: Tokens) -> Tensor | None:
        weight = self._weight(tokens, tokens.student)
        if tokens.pairs is None or weight is None:
            return weight
        return take(weight, tokens.pairs[..., 0]) & (tokens.pairs >= 0).all(-1)

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        tokens = tokens_of(batch)
        ratios = []
        for tap in self.student_taps:
            s = student[tap]
            if self.task == "question":
                ratios.append(self._answers(s, teacher[tap], tokens))
                continue
            compare = self._compared(s, batch)

            def read(source: Recording, tap: Tap = tap, s: Tensor = s) -> Tensor:
                t = source[tap]
                if self.task == "segmentation":
                    t = by_pixel(s, t, batch.labels)[1]
                t = t if source.class_order is None else t[..., source.class_order]
                return t if self.common is None else t[..., : self.common]

            t = combined(teacher, read, "softmax" if compare == self.compare else "sigmoid")
            s = by_pixel(s, s, batch.labels)[0] if self.task == "segmentation" else s
            s = s if self.common is None else s[..., : self.common]
            if s.ndim == 2:
                ratios.append(weighted_ratio(compare(s, t)))
            elif s.ndim == 4:
                ratios.append(self._picked(s, t, counted_pixels(batch.labels, self.ignored_index), compare))
            else:
                self._check_lengths(s, t, tokens)
                ratios.append(self._per_token(s, t, tokens, compare))
        if len(ratios) == 1:
            return ratios[0]
        whole = mean_of(ratios)
        return Ratio(whole.numerator.sum(), whole.denominator[0])  # start and end of the same questions

    def items(self, batch: Batch) -> Tensor:
        """:meth:`count`, of a term that knows it."""
        count = self.count(batch)
        assert count is not None
        return count

    def on_chunk(self, student: Tensor, teacher: Tensor) -> Tensor:
        """:meth:`compare` on logits ``(n, V)`` of some tokens."""
        if self.common is not None:
            student, teacher = student[:, : self.common], teacher[:, : self.common]
        return self.compare(student, teacher)

    def counted(self, batch: Batch) -> Tensor:
        """``(B, L)``: the tokens whose predictions count."""
        weight = self._weight(tokens_of(batch), tokens_of(batch).student)
        assert weight is not None
        return weight

    def _compared(self, student: Tensor, batch: Batch) -> Compare:
        """:meth:`compare`, or :meth:`compare_independent` where each class is right or wrong on its own."""
        if self.task in LANGUAGE_MODELS or not independent(self.name, self.problem, student, batch.labels):
            return self.compare
        if not self._takes_independent:
            raise DistillError(self._no_independent())
        return self.compare_independent

    def _check_lengths(self, student: Tensor, teacher: Tensor, tokens: Tokens) -> None:
        """Raises a :class:`WiringError` where the logits are not those of the batch's tokens."""
        for logits, side, owner in ((student, tokens.student, "student"), (teacher, tokens.teacher, "teacher")):
            weight = self._weight(tokens, side)
            if weight is not None and weight.shape != logits.shape[:2]:
                raise WiringError(
                    f"{self.name}: the {owner} gives logits {tuple(logits.shape)} for tokens or labels {tuple(weight.shape)}, so "
                    "that nobody can tell which belong together; use terms on layers, or FeatureImitation with taps of your own"
                )

    def _per_token(self, student: Tensor, teacher: Tensor, tokens: Tokens, compare: Compare) -> Ratio:
        weight = self._pair_weight(tokens)
        if tokens.pairs is not None:
            student, teacher = take(student, tokens.pairs[..., 0]), take(teacher, tokens.pairs[..., 1])
        return self._picked(student, teacher, weight, compare)

    def _picked(self, student: Tensor, teacher: Tensor, weight: Tensor | None, compare: Compare) -> Ratio:
        if weight is None:
            return weighted_ratio(compare(student, teacher))
        # The items that count, picked: masked ones cost no softmax over the classes.
        items = compare(student[weight], teacher[weight])
        return Ratio(items.sum(), weight.sum().to(items.dtype))

    def _answers(self, student: Tensor, teacher: Tensor, tokens: Tokens) -> Ratio:
        real = tokens.student.real
        if tokens.pairs is not None:
            real = (tokens.pairs >= 0).all(-1)
            student, teacher = take(student, tokens.pairs[..., 0]), take(teacher, tokens.pairs[..., 1])
        if real is not None:
            low = torch.finfo(torch.float16).min
            student, teacher = student.masked_fill(~real, low), teacher.masked_fill(~real, low)
        return weighted_ratio(self.compare(student, teacher))

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss per item: ``(…, C)`` of both -> ``(…)``."""
        raise NotImplementedError

    def compare_independent(self, student: Tensor, teacher: Tensor) -> Tensor:
        """As :meth:`compare`, for classes that are right or wrong each on its own; a term that has no such form is refused."""
        raise NotImplementedError


class Divergence(LogitTerm):
    """Base of terms with a temperature on logits of one vocabulary."""

    def __init__(self, *, temperature: float = 1.0, **settings: Any) -> None:
        super().__init__(**settings)
        check_temperature(temperature)
        self.temperature = float(temperature)


@TERMS.register
class SoftTargets(Divergence):
    """Soft targets per sample, token, answer position or pixel: T²·KL(teacher ‖ student) (Hinton 2015, arXiv 1503.02531).

    For multi-label models, of which each output is a class of its own, the KL is that of Bernoulli distributions,
    σ(logit / T), in the mean over classes as in the models' own loss. A model is taken for one where ``problem_type`` of its
    config is ``"multi_label_classification"`` or, where that is not set, the labels are floats of the shape of the logits.

    Args:
        temperature: T > 0.
        tokens: for models that predict per token; see :class:`LogitTerm`.
    """

    def __init__(self, temperature: float = 2.0, **settings: Any) -> None:
        super().__init__(temperature=temperature, **settings)

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return soft_targets(student, teacher, self.temperature, reduction="none")

    def compare_independent(self, student: Tensor, teacher: Tensor) -> Tensor:
        return binary_soft_targets(student, teacher, self.temperature, reduction="none").mean(-1)


@TERMS.register
class ForwardKL(Divergence):
    """KL(teacher ‖ student) of language models, token mean, no factor T² (sequence-level baseline of GKD, arXiv 2306.13649)."""

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return soft_targets(student, teacher, self.temperature, reduction="none") / self.temperature**2


@TERMS.register
class ReverseKL(Divergence):
    """KL(student ‖ teacher) of language models: mode seeking (MiniLLM, arXiv 2306.08543)."""

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return reverse_kl(student, teacher, self.temperature, reduction="none")


@TERMS.register
class GeneralizedJSD(Divergence):
    """Generalised Jensen-Shannon divergence of language models (GKD, arXiv 2306.13649, equation 1).

    Args:
        beta: in [0, 1]: 0 is the forward, 1 the reverse KL.
        temperature: T > 0.
    """

    def __init__(self, beta: float = 0.5, **settings: Any) -> None:
        super().__init__(**settings)
        check_share("beta", beta)
        self.beta = beta

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return generalized_jsd(student, teacher, self.beta, self.temperature, reduction="none")


@TERMS.register
class SkewedKL(Divergence):
    """KL against a mixture with a little of the first distribution (DistiLLM, arXiv 2402.03898).

    Args:
        alpha: share of the first distribution in the mixture, in [0, 1).
        reverse: the student's distribution comes first.
        temperature: T > 0.
    """

    def __init__(self, alpha: float = 0.1, *, reverse: bool = False, **settings: Any) -> None:
        super().__init__(**settings)
        check_share("alpha", alpha)
        check_flag("SkewedKL", "reverse", reverse)
        self.alpha, self.reverse = alpha, reverse

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return skewed_kl(student, teacher, self.alpha, self.temperature, reverse=self.reverse, reduction="none")


@TERMS.register
class UniversalLogits(LogitTerm):
    """L1 of the sorted probabilities: for different vocabularies (ULD, Boizard et al. 2024, arXiv 2402.12030).

    Args:
        align: ``"position"``, the paper's: the n-th counted token of one model with the n-th of the other, up to the shorter;
            ``"text"``: tokens that end on the same character, which the collator finds.
    """

    same_vocabulary = False

    def __init__(self, align: Literal["position", "text"] = "position", **settings: Any) -> None:
        super().__init__(**settings)
        check_choice(self, "align", align, ("position", "text"))
        self.align = align

    def _check(self, student: Tensor, teacher: Tensor, wiring: Wiring) -> None:
        if student.ndim != 3 or teacher.ndim != 3 or self.task not in LANGUAGE_MODELS:
            raise WiringError(f"{self.name} compares language models token by token; use SoftTargets for {self.task}")

    def _pair_weight(self, tokens: Tokens) -> Tensor | None:
        if self.align == "text":
            return super()._pair_weight(tokens)
        ours, theirs = (self._weight(tokens, side) for side in (tokens.student, tokens.teacher))
        if ours is None or theirs is None:
            return ours
        count = torch.minimum(ours.sum(1), theirs.sum(1))
        return torch.arange(int(count.max()) if len(count) else 0, device=count.device)[None] < count[:, None]

    def _per_token(self, student: Tensor, teacher: Tensor, tokens: Tokens, compare: Compare) -> Ratio:
        if self.align == "text":
            return super()._per_token(student, teacher, tokens, compare)
        weight = self._pair_weight(tokens)
        ours, theirs = (self._weight(tokens, side) for side in (tokens.student, tokens.teacher))
        if weight is None or ours is None or theirs is None:
            return weighted_ratio(compare(student, teacher))
        items = compare(_first(student, ours, weight), _first(teacher, theirs, weight))
        return Ratio(items.sum(), weight.sum().to(items.dtype))

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return universal_logits(student, teacher, reduction="none")


def _first(logits: Tensor, counted: Tensor, weight: Tensor) -> Tensor:
    """Of each sequence its first counted tokens, as many as ``weight`` has."""
    order = (~counted).to(torch.int8).sort(dim=1, stable=True).indices[:, : weight.shape[1]]
    return take(logits, order)[weight]
