"""Checks of folders that a user names, and errors of a host in one line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from kdgraft.errors import DistillError


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
    """Raise a :class:`DistillError` unless ``source`` is a folder of ``save_pretrained`` or a model in the hub's cache."""
    if (Path(source) / file).is_file():
        return
    cached = re.fullmatch(r"([\w.-]+/)?[\w.-]+", str(source)) and not Path(source).exists()
    if cached and isinstance(try_to_load_from_cache(str(source), file), str):
        return
    raise DistillError(f"no {entry} at {source}: there is no {file}; give the folder that save_pretrained wrote")
