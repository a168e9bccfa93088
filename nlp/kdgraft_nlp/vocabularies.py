"""Facts about the vocabularies of student and teacher, by which terms on tokens are wired."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from .collator import DistillCollator
from .stored import Stored
from .tokens import shared_tokens


def tokenizer_of(trainer: Any) -> Any:
    """Return a trainer's tokenizer, which may be in a processor; ``None`` without one."""
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)


def vocabularies(trainer: Any, teachers: Sequence[Any]) -> dict[str, Any]:
    """Return the facts about the vocabularies for the wiring of terms."""
    collator = trainer.data_collator
    own = tokenizer_of(trainer)
    if not isinstance(own, PreTrainedTokenizerBase):
        own = getattr(collator, "tokenizer", None)
    if not isinstance(own, PreTrainedTokenizerBase):
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
    """Refuse a stored teacher that read other tokens."""
    tokenizer = tokenizer_of(trainer)
    for source in sources:
        if isinstance(source, Stored) and isinstance(tokenizer, PreTrainedTokenizerBase):
            source.check_tokenizer(tokenizer)
