"""Sequence to sequence: texts and the texts that are written for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from kdgraft.errors import DistillError

from .columns import texts_of
from .data import end_of_text
from .recipe_data import OwnData
from .second_tokenizer import able_to_pad


class SequenceData(OwnData):
    """Samples of a source and its target, as of translation and summarization, for models with an encoder and a decoder.

    ``prefix`` is put before each source, as T5 asks for (``"summarize: "``). A source is cut to ``length`` tokens, a target to
    ``target_length``, which is ``length`` by default.
    """

    read: ClassVar = ("source", "target")

    def encode(self, split: str, found: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        self.room(tokenizer, pair=False)
        able_to_pad(tokenizer, "student's")
        sources, targets = texts_of(found, [self.columns["source"], self.columns["target"]])
        for i, target in enumerate(targets):
            if not target.strip():
                raise DistillError(
                    f"sample {i} of column {self.columns['target']!r} has no text; leave such samples out"
                )
        before = self.told.get("prefix") or ""
        encoded = tokenizer([before + source for source in sources], truncation=True, max_length=self.length)
        cut = dict(truncation=True, max_length=self.told.get("target_length") or self.length)
        labels = tokenizer(text_target=targets, **cut)["input_ids"]
        inputs = {name: encoded[name] for name in encoded if name != "token_type_ids"}
        return Dataset.from_dict({**inputs, "labels": labels})

    def collator(self, tokenizer: PreTrainedTokenizerBase, student: Any) -> Callable[..., Any]:
        return DataCollatorForSeq2Seq(tokenizer, model=student)


def decoder_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the tokens with which a new model's decoder starts and ends."""
    names = ("bos_token_id", "cls_token_id", "pad_token_id")
    first = next((getattr(tokenizer, name) for name in names if getattr(tokenizer, name) is not None), None)
    last = end_of_text(tokenizer)
    return {"decoder_start_token_id": last if first is None else first, "eos_token_id": last}
