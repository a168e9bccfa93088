"""Readers of Hugging Face models' predictions: per sample, token, answer position or pixel."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from kdgraft.batch import Batch
from kdgraft.errors import DistillError, WiringError
from kdgraft.pairs import Compared, Numbers, Pairs, Scores
from kdgraft.readers import Reader, integers_of
from kdgraft.sources import combined
from kdgraft.taps import Recording, Tap
from kdgraft.topk import TopK, joined_pairs
from kdgraft.wiring import Wiring
from kdgraft_hosts import NLP

from .attention import STUDENT_FORWARD
from .chunked import head_of
from .numbers import OutputNumbers
from .packing import per_text
from .predictions import (
    MULTI_LABEL,
    REGRESSION,
    by_pixel,
    check_layout,
    counted_pixels,
    ignored_index,
    independent,
    picked,
    problem_types_of,
    same_classes,
)
from .queries import QUERY_TASKS, Queries, adds_queries, check_queries, refuse_queries
from .query_reader import QueryPlaces, QueryScores, matching_of
from .tasks import LANGUAGE_MODELS, PER_TOKEN, STORED, has_decoder, task_of
from .tokens import ModelTokens, Tokens, answers_of, stack_of, take, tokens_of, weighed

LAST_STATE = "last_hidden_state"
"""The tap of the last hidden state, for models of any architecture."""

CountedTokens = Literal["auto", "valid", "labelled"]


class HFReader(Reader):
    """The reader of two models of Hugging Face of the same task."""

    default_taps: ClassVar = {"samples": LAST_STATE, "output": "[logits]"}
    lacks: ClassVar = NLP.lacks
    chunked = False
    """True where the host computes terms on logits in chunks, from hidden states."""

    def __init__(self, student: nn.Module, teacher: nn.Module, term: str) -> None:
        super().__init__(student, teacher, term)
        task = task_of(student)
        self.segments, self.by_queries = task == "segmentation", task in QUERY_TASKS
        if self.segments:  # the scores of others are no maps
            self.default_taps = {**self.default_taps, "scores": "[logits]"}  # type: ignore[misc]
        if task not in ("sequence", "image", "audio"):
            self.no_specialists = f"they know classes of whole samples, which {type(student).__name__} does not score"

    def settle(self, tap: Tap, model: nn.Module) -> Tap:
        """Return the tap of this model's last hidden state, or of the last map of a convolutional model, for its name."""
        if tap.text != LAST_STATE:
            return tap
        if task_of(model) in QUERY_TASKS and adds_queries(model):
            raise WiringError(
                f"{self.term}: the last states of {type(model).__name__} are those of its queries, of which it has more in training; tap a "
                "map, such as the last one of its backbone or encoder"
            )
        path = str(getattr(model, "base_model_prefix", ""))
        if not isinstance(getattr(model, path, None) if path else None, nn.Module):
            path = "encoder" if has_decoder(model) and isinstance(getattr(model, "encoder", None), nn.Module) else ""
        return Tap.parse(f"{path}[0]")

    def tensors(self, recording: Recording, tap: Tap) -> list[Tensor]:
        found = super().tensors(recording, tap)
        if self.by_queries:
            refuse_queries(self.term, tap, found)
        return found

    def reads_scores(self, tap: Tap) -> bool:
        """Return true for the class scores of a segmentor."""
        return self.segments and str(tap) == "[logits]"

    def check_classes(self, student: Tensor, teacher: Tensor, student_tap: Tap, teacher_tap: Tap) -> None:
        same_classes(self.term, student.shape[1], teacher.shape[1])

    def samples(self, batch: Batch, tap: Tap | None = None) -> Tensor | None:
        tokens = tokens_of(batch)
        if tap is None:
            return torch.tensor(float(tokens.samples))
        stack = stack_of(tap, tokens)
        real = tokens.student.of(stack)
        if real is None:
            return torch.tensor(float(tokens.size))
        return (per_text(real.long(), tokens.student.texts_of(stack)) > 0).sum().float()

    def images(self, model: nn.Module) -> Tap:
        if getattr(model, "main_input_name", "") != "pixel_values":
            raise WiringError(
                f"{self.term} differentiates models by the images that they see, and {type(model).__name__} reads none; use terms on "
                "layers or predictions"
            )
        return Tap.parse(":inputs[pixel_values]")

    def run(self, model: nn.Module, images: Tensor) -> Any:
        return getattr(model, STUDENT_FORWARD, model)(pixel_values=images)

    def scores(  # type: ignore[override]  # each host has settings of its own
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        tokens: CountedTokens = "auto",
        queries: Queries = "auto",
    ) -> Scores:
        """Return the class scores of two models of one task.

        Segmentors are compared on the grid of the labels, to which their own loss resizes the scores, without the pixels that
        this loss ignores.

        Args:
            student, teacher: the models.
            tokens: the tokens that count, for models that predict per token: ``"valid"`` (all except padding), ``"labelled"``
                (those with a label other than −100; for a causal model those that predict one), or ``"auto"``: labelled for token
                classification, causal (including vision-language) and sequence-to-sequence models, valid for masked language
                models and the frames of CTC models.
            queries: the queries that count, for detectors: ``"all"`` (the two models' queries are matched by their predictions, and
                weighted by the teacher's best class score), ``"objects"`` (the two queries that are matched to the same object of
                the labels), or ``"auto"``: ``"objects"`` for terms that need labels, else ``"all"``.
        """
        check_queries(self.term, queries, student)
        if task_of(student) in QUERY_TASKS:
            if tokens != "auto":
                raise WiringError(
                    f"{self.term}: tokens={tokens!r} is for labels per token, and a detector has queries; leave it out"
                )
            return QueryScores(matching_of(student, teacher, self.term), queries)
        return OutputScores(student, teacher, self.term, tokens, self.chunked)

    def numbers(  # type: ignore[override]  # each host has settings of its own
        self, student: nn.Module, teacher: nn.Module, *, queries: Queries = "auto"
    ) -> Numbers:
        """Return the numbers that two models of ``problem_type="regression"`` predict for each sample, or the boxes or masks of queries.

        Args:
            student, teacher: the models.
            queries: see :meth:`scores`; here ``"auto"`` is ``"objects"`` for terms that need the true numbers, else ``"all"``.
        """
        check_queries(self.term, queries, student)
        if task_of(student) in QUERY_TASKS:
            return QueryPlaces(matching_of(student, teacher, self.term), queries)
        return OutputNumbers(student, teacher, self.term)


class ChunkedReader(HFReader):
    """The reader of causal language models whose logits are computed in chunks."""

    chunked = True


class OutputScores(Scores):
    """The logits of two models of one task.

    Args:
        student, teacher: the models.
        term: the name of the term, for messages.
        tokens: see :meth:`HFReader.scores`.
        chunked: read the states before the output layers instead of logits.
    """

    same_vocabulary = True
    """True where tokens are compared one by one, so that both models need the same vocabulary."""
    no_labels = "add labels (one integer class for each item) to the batch"
    no_single_class = (
        f" ({MULTI_LABEL}, or float labels); use SoftTargets, or problem_type='single_label_classification' in the config where "
        "the labels are probabilities of one class"
    )

    def __init__(self, student: nn.Module, teacher: nn.Module, term: str, tokens: CountedTokens, chunked: bool) -> None:
        if tokens not in ("auto", "valid", "labelled"):
            raise DistillError(f"{term}: tokens must be one of auto, valid, labelled, got {tokens!r}")
        self.name, self.task, self.chunked, other = term, task_of(student), chunked, task_of(teacher)
        if other != self.task:
            raise WiringError(
                f"{self.name} compares predictions, and the models have different tasks: {self.task} (student, "
                f"{type(student).__name__}) and {other} (teacher, {type(teacher).__name__}); give both the same"
            )
        # Padding of answers is masked at each member's own positions, so members cannot be averaged before.
        self.averages = self.task != "question"
        fields = ["start_logits", "end_logits"] if self.task == "question" else ["logits"]
        self.taps = ([Tap.parse(f"[{field}]") for field in fields],) * 2
        self.stored = bool(getattr(teacher, STORED, False))
        if chunked:
            states = tuple([Tap.parse(f"{model.base_model_prefix}[0]")] for model in (student, teacher))
            self.taps = (states[0], self.taps[1] if self.stored else states[1])  # a store has no output layer
        if tokens != "auto" and (self.task not in PER_TOKEN or (self.task, tokens) == ("ctc", "labelled")):
            raise WiringError(
                f"{self.name}: tokens={tokens!r} is for labels per token, which {type(student).__name__} does not predict; leave it out"
            )
        self.where = tokens if tokens != "auto" else "valid" if self.task in ("masked", "ctc") else "labelled"
        self.problem = problem_types_of(self.name, student, teacher)
        self.ignored_index = ignored_index(student) if self.task == "segmentation" else 255
        self.compares_classes = self.task not in (*LANGUAGE_MODELS, "choice", "ctc")
        self.independent = self.compares_classes and self.problem.named == MULTI_LABEL
        if self.task == "ctc":
            self.unlabelled = "CTC models have labels for sequences, not for frames; use SoftTargets"
        self.common: int | None = None

    def wire(self, wiring: Wiring) -> list[Compared]:
        if self.same_vocabulary and self.task in LANGUAGE_MODELS and wiring.facts.get("vocabulary") == "different":
            raise WiringError(
                f"{self.name}: student and teacher have different tokenizers, and their tokens cannot be compared one by one; use UniversalLogits"
            )
        found = []
        for s_tap, t_tap in zip(*self.taps, strict=True):
            student, teacher = wiring.student_recording[s_tap], wiring.teacher_recording[t_tap]
            if self.chunked:
                student = student.new_empty(*student.shape[:-1], len(head_of(wiring.student).weight))
                if not self.stored:
                    teacher = teacher.new_empty(*teacher.shape[:-1], len(head_of(wiring.teacher).weight))
            self.check(student, teacher, wiring)
            if self.stored and self.common is not None and self.common < teacher.shape[-1]:
                raise WiringError(
                    f"{self.name}: the store has {teacher.shape[-1]} classes of each token, and the student {self.common}; fill it with this "
                    "student"
                )
            adapter = "in chunks" if self.chunked else "–"
            found.append(Compared(student, teacher, (s_tap, t_tap), self._region(student), adapter))
        return found

    def check(self, student: Tensor, teacher: Tensor, wiring: Wiring) -> None:
        """Raise a :class:`WiringError` where two models' logits cannot be compared class by class."""
        if student.ndim != teacher.ndim:
            shapes = f"{tuple(student.shape)} and {tuple(teacher.shape)}"
            raise WiringError(f"{self.name}: logits {shapes} cannot be compared; use models of the same kind")
        check_layout(self.name, self.task, wiring.student, student)
        axis = 1 if self.task == "segmentation" else -1
        classes, others = student.shape[axis], teacher.shape[axis]
        self.width = 0 if self.task in ("question", "choice") else min(classes, others)
        if self.task not in ("question", *LANGUAGE_MODELS):
            single = classes == 1 and self.task != "choice"
            if single or self.problem.named == REGRESSION:
                raise WiringError(
                    f"{self.name}: softmax has no meaning for {self.problem.named or 'a single output'}; use "
                    "BoundedRegression, which compares numbers, or terms on layers"
                )
        if self.task == "question" or classes == others:
            return
        if self.task not in LANGUAGE_MODELS:
            same_classes(self.name, classes, others)
        # Vocabularies that differ by padding share their first ids; the tokenizer, where known, shows that they do.
        self.common = min(classes, others)
        if not wiring.facts.get("vocabulary_checked"):
            raise WiringError(
                f"{self.name}: the vocabularies have {classes} and {others} entries, and no tokenizer shows that they differ by padding only; pass "
                "processing_class=tokenizer to the trainer, or use UniversalLogits for different vocabularies"
            )
        if int(wiring.facts["vocabulary_checked"]) > self.common:
            raise WiringError(
                f"{self.name}: the tokenizer has {wiring.facts['vocabulary_checked']} entries, the smaller model {self.common}; use UniversalLogits"
            )

    def _region(self, logits: Tensor) -> str:
        if self.task == "question":
            return "valid positions"
        if self.task == "segmentation":
            return "labelled pixels"
        return "sequences" if logits.ndim == 2 else f"{self.where} tokens"

    def weight(self, tokens: Tokens, side: ModelTokens) -> Tensor | None:
        """Return the tokens of one model whose predictions count, ``(B, L)``."""
        if (self.where == "labelled" or self.needs_labels) and side.labelled is not None:
            return side.labelled
        return side.of("decoder" if self.task == "seq2seq" else "layers")

    def count(self, batch: Batch) -> Tensor | None:
        tokens = tokens_of(batch)
        if self.task == "segmentation":
            weight = counted_pixels(batch.labels, self.ignored_index)
        elif self.task in PER_TOKEN:
            weight = self.pair_weight(tokens)
        else:
            return self._samples(batch)
        return None if weight is None else tokens.amount(weight)

    def _samples(self, batch: Batch) -> Tensor:
        """Return the number of samples that count; those without a label do not where the term needs one."""
        tokens = tokens_of(batch)
        labels = batch.labels
        if self.needs_labels and self.task == "question":
            labels = answers_of(batch)[0]
        if not self.needs_labels or not isinstance(labels, Tensor):
            return torch.tensor(float(tokens.samples))
        return (labels >= 0).sum().float()

    def pair_weight(self, tokens: Tokens) -> Tensor | None:
        """Return the predictions that count: ``(B, L)`` tokens, or ``(B, P)`` pairs of aligned tokens."""
        weight = self.weight(tokens, tokens.student)
        if tokens.pairs is None or tokens.paired is None or weight is None:
            return weight
        return take(weight, tokens.pairs[..., 0]) & tokens.paired

    def pairs(self, student: Recording, teacher: Recording, batch: Batch) -> list[Pairs]:
        tokens = tokens_of(batch)
        found: list[Pairs] = []
        for tap in self.taps[0]:
            s = student[tap]
            if self.task == "question":
                place = answers_of(batch)[len(found)] if self.needs_labels else None
                found.append(self._answers(s, teacher[tap], tokens, place))
                continue
            known = teacher[tap] if self.stored else None
            if isinstance(known, TopK):
                found.append(self._joined(s, known, tokens))
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
                pairs = Pairs(s, t, labels=None if apart else integers_of(batch.labels, s.shape[:1]))
            elif s.ndim == 4:
                pairs = picked(s, t, counted_pixels(batch.labels, self.ignored_index), batch.labels)
            else:
                self._check_lengths(s, t, tokens)
                pairs = self.per_token(s, t, tokens)
            pairs.independent = pairs.mean = apart
            found.append(pairs)
        return found

    def _joined(self, student: Tensor, known: TopK, tokens: Tokens) -> Pairs:
        """Return the probabilities of the tokens that count, of which a store knows the largest."""
        self._check_one_tokenizer(tokens)
        weight = self.pair_weight(tokens)
        if weight is None:
            return joined_pairs(student.flatten(0, 1), known.flatten(), self.temperature)
        return weighed(joined_pairs(student[weight], known[weight], self.temperature), tokens, weight)

    def on_chunk(self, student: Tensor, teacher: Tensor | TopK, labels: Tensor) -> Pairs:
        """Return the logits ``(n, V)`` of some tokens, limited to the entries that both vocabularies have, with their labels."""
        if isinstance(teacher, TopK):
            return joined_pairs(student, teacher, self.temperature)
        return Pairs(student[:, : self.common], teacher[:, : self.common], labels=labels)

    def _check_one_tokenizer(self, tokens: Tokens) -> None:
        if tokens.pairs is not None:
            what = "losses in chunks compare" if self.chunked else "the largest probabilities of a store are compared"
            raise DistillError(
                f"{self.name}: {what} token by token, and the batch has those of two tokenizers; take whole logits of a running teacher"
            )

    def counted(self, batch: Batch) -> Tensor:
        """Return the tokens whose predictions count, ``(B, L)``; for losses in chunks."""
        self._check_one_tokenizer(tokens_of(batch))
        weight = self.weight(tokens_of(batch), tokens_of(batch).student)
        assert weight is not None
        return weight

    def _independent(self, student: Tensor, batch: Batch) -> bool:
        """Return whether classes are independent."""
        return self.task not in LANGUAGE_MODELS and independent(self.name, self.problem, student, batch.labels)

    def _check_lengths(self, student: Tensor, teacher: Tensor, tokens: Tokens) -> None:
        """Raise a :class:`WiringError` unless the logits match the tokens of the batch."""
        for logits, side, owner in ((student, tokens.student, "student"), (teacher, tokens.teacher, "teacher")):
            weight = self.weight(tokens, side)
            if weight is not None and weight.shape != logits.shape[:2]:
                raise WiringError(
                    f"{self.name}: the {owner} gives logits {tuple(logits.shape)} for tokens or labels {tuple(weight.shape)}, which "
                    "cannot be matched; use terms on layers, or FeatureImitation with taps of your own"
                )

    def per_token(self, student: Tensor, teacher: Tensor, tokens: Tokens) -> Pairs:
        """Return the logits ``(n, C)`` of the tokens that count."""
        weight, labels = self.pair_weight(tokens), tokens.student.targets
        if tokens.pairs is not None and labels is not None:
            labels = take(labels, tokens.pairs[..., 0])
        pairs = picked(*tokens.align(student, teacher), weight, labels)
        return pairs if weight is None else weighed(pairs, tokens, weight)

    def _answers(self, student: Tensor, teacher: Tensor, tokens: Tokens, place: Tensor | None) -> Pairs:
        """Return the logits ``(B, L)`` of positions; ``place`` is that of each answer, −100 for none."""
        student, teacher = tokens.align(student, teacher)
        real = tokens.student.real if tokens.paired is None else tokens.paired
        if real is not None:
            low = torch.finfo(torch.float16).min
            student, teacher = student.masked_fill(~real, low), teacher.masked_fill(~real, low)
        return Pairs(student, teacher, labels=place, present=real)
