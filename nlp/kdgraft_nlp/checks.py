"""Checks of folders that a user names, and errors of a host in one line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import constants, try_to_load_from_cache
from torch import nn

from kdgraft.errors import DistillError

from .tasks import has_decoder


@contextmanager
def one_line(entry: str, mistaken: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Turn any error that a host raises over a user's value into a :class:`DistillError` of one line.

    Args:
        entry: the name of the value, with which the line starts.
        mistaken: called after an error; returns whether the value caused it. Other errors are raised unchanged.
    """
    try:
        yield
    except DistillError:
        raise
    except Exception as error:
        if not mistaken():
            raise
        raise DistillError(f"{entry}: {type(error).__name__}: {flat(error)}") from error


def flat(error: BaseException) -> str:
    """Return the message of an error in one line of at most 300 characters."""
    return " ".join(str(error).split())[:300]


def check_folder(entry: str, source: str | Path, file: str = "config.json") -> None:
    """Raise a :class:`DistillError` unless ``source`` is a folder of ``save_pretrained``, or may be a model of the hub, ``owner/name``."""
    there = (file, *(["adapter_config.json"] if file == "config.json" else []))  # PEFT's, which names its base model
    if any((Path(source) / name).is_file() for name in there):
        return
    named = re.fullmatch(r"([\w.-]+/)?[\w.-]+", str(source)) and not Path(source).exists()
    if named and isinstance(try_to_load_from_cache(str(source), file), str):
        return
    owned = named and "/" in str(source) and not Path(source).parent.exists()
    if owned and not constants.HF_HUB_OFFLINE:  # of the hub, perhaps: loading it says whether it is there
        return
    raise DistillError(f"no {entry} at {source}: there is no {file}; give the folder that save_pretrained wrote")


def check_sizes(owner: str, model: Any, tokenizer: Any, sets: Mapping[str, Dataset]) -> None:
    """Refuse samples that index past a model's embeddings, on which the model itself would fail only in training."""
    words = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > words:
        raise DistillError(
            f"the tokenizer has {len(tokenizer)} entries, and the {owner} has {words} embeddings; raise vocab_size"
        )
    longest = max(len(row) for row in _rows(sets, ("input_ids", *(["labels"] if has_decoder(model) else []))))
    kinds = [max(row) + 1 for row in _rows(sets, ("token_type_ids",))]
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if not isinstance(module, nn.Embedding) or name.startswith("distiller."):
            continue
        places = module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
        if last in ("position_embeddings", "wpe", "embed_positions") and longest > places:
            raise DistillError(
                f"the longest sample has {longest} tokens, and the {owner} has {places} positions; lower data.length"
            )
        if last == "token_type_embeddings" and max(kinds, default=1) > module.num_embeddings:
            raise DistillError(f"pairs have two types of tokens, and the {owner} one; set {owner}.type_vocab_size to 2")


def _rows(sets: Mapping[str, Dataset], columns: Sequence[str]) -> Iterator[list[int]]:
    """Iterate over all rows of tokens; samples of multiple choice have several."""
    for found in sets.values():
        for column in columns:
            for row in found[column][:] if column in found.column_names else ():
                yield from row if row and isinstance(row[0], list) else [row]
