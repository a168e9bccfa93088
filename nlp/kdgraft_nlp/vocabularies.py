"""Facts about the vocabularies of student and teacher, by which terms on tokens are wired."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .absent import Absent
from .collator import DistillCollator
from .tokens import shared_tokens


def tokenizer_of(trainer: Any) -> Any:
    """Return a trainer's tokenizer, which may be in a processor; ``None`` without one."""
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)


def vocabularies(trainer: Any, teachers: Sequence[Any]) -> dict[str, Any]:
    """Return the facts about the vocabularies for the wiring of terms."""
    collator, own = trainer.data_collator, _own_tokenizer(trainer)
    if own is None:
        return {}
    facts: dict[str, Any] = {"vocabulary_checked": len(own)}
    others = [collator.teacher_tokenizer] if isinstance(collator, DistillCollator) else []
    others = [tokenizer for tokenizer in others if tokenizer is not None]
    for teacher in teachers if not others else ():
        folder = teacher if isinstance(teacher, (str, Path)) else getattr(teacher, "name_or_path", "") or ""
        if folder and (Path(folder) / "tokenizer_config.json").is_file():
            others.append(AutoTokenizer.from_pretrained(folder))
    if others:
        same = all(other.get_vocab() == own.get_vocab() for other in others)
        facts["vocabulary"] = "same" if same else "different"
        if len(others) == 1:
            facts["shared_tokens"] = partial(shared_tokens, own, others[0])
    return facts


def check_tokenizer(trainer: Any, sources: Sequence[Any]) -> None:
    """Refuse a teacher that is not here and reads, or read, other tokens."""
    for source in sources:
        if isinstance(source, Absent):
            source.check_tokenizer(_own_tokenizer(trainer))


def _own_tokenizer(trainer: Any) -> PreTrainedTokenizerBase | None:
    """Return a trainer's tokenizer, or else that of its collator; ``None`` without one."""
    for found in (tokenizer_of(trainer), getattr(trainer.data_collator, "tokenizer", None)):
        if isinstance(found, PreTrainedTokenizerBase):
            return found
    return None
