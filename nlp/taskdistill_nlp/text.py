"""Real text that is on every machine with the suite installed: docstrings. Guess the library from a sentence of it."""

from __future__ import annotations

import ast
import hashlib
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from taskdistill.errors import DistillError

LIBRARIES = ("python", "torch", "numpy", "transformers", "pandas", "sympy", "networkx")
"""The classes: the standard library, and what PyTorch, Transformers and Datasets need themselves."""
SHARES = {"test": 0.25, "val": 0.15, "train": 0.6}
"""Shares of each library's modules."""
SKIPPED = frozenset(
    {"tests", "test", "testing", "_vendor", "site-packages", "dist-packages", "idlelib", "lib2to3", "pip"}
)
SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
NAMES = re.compile(
    r"\b(py)?(torch|numpy|np|pandas|pd|sympy|networkx|nx|pyarrow|arrow|python|transformers?|hugging ?face)\b", re.I
)


class Sentence(NamedTuple):
    """One sentence and the library that it was written for (an index into :data:`LIBRARIES`)."""

    text: str
    label: int


def sentences(counts: dict[str, int], seed: int = 0) -> dict[str, list[Sentence]]:
    """Sentences of docstrings by split; no module is in two splits, no sentence occurs twice, the classes are even.

    Args:
        counts: how many sentences each split is to have.
        seed: of the draw.

    Raises:
        DistillError: a library is not installed, or holds too few sentences.
    """
    found: dict[str, list[Sentence]] = {split: [] for split in counts}
    for label, library in enumerate(LIBRARIES):
        wanted = {split: count // len(LIBRARIES) for split, count in counts.items()}
        by_split = _collect(library, wanted)
        for split, count in wanted.items():
            if len(by_split[split]) < count:
                raise DistillError(
                    f"the docstrings of {library} hold {len(by_split[split])} sentences for {split}, {count} are needed; "
                    "ask for fewer"
                )
            drawn = random.Random(f"{seed} {library} {split}").sample(sorted(by_split[split]), count)
            found[split] += [Sentence(text, label) for text in drawn]
    for split, drawn_sentences in found.items():
        random.Random(f"{seed} {split}").shuffle(drawn_sentences)
    return found


def _collect(library: str, wanted: dict[str, int]) -> dict[str, list[str]]:
    """Sentences of a library by split, module by module in an order of its own, until each split has twice what is wanted."""
    root = _folder(library)
    files = [(hashlib.sha256(f.relative_to(root).as_posix().encode()).hexdigest(), f) for f in root.rglob("*.py")]
    by_split: dict[str, list[str]] = {split: [] for split in SHARES}
    seen: set[str] = set()
    for digest, file in sorted(files):
        if SKIPPED & set(file.relative_to(root).parts):
            continue
        split = _split_of(digest)
        if len(by_split[split]) >= 2 * wanted.get(split, 0):
            if all(len(by_split[name]) >= 2 * count for name, count in wanted.items()):
                break
            continue
        for text in _docstrings(file):
            for sentence in _sentences(text):
                if sentence not in seen:
                    seen.add(sentence)
                    by_split[split].append(sentence)
    return by_split


def _split_of(digest: str) -> str:
    """Which split a module belongs to, by its path alone."""
    place, total = int(digest[-8:], 16) / 16**8, 0.0
    for split, share in SHARES.items():
        total += share
        if place < total:
            return split
    return "train"


def _docstrings(file: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield text


def _folder(library: str) -> Path:
    if library == "python":
        return Path(sysconfig.get_paths()["stdlib"])
    spec = find_spec(library)
    if spec is None or not spec.submodule_search_locations:
        raise DistillError(f"the demo reads the docstrings of {library}, which is not installed: pip install {library}")
    return Path(next(iter(spec.submodule_search_locations)))


def _sentences(docstring: str) -> Iterator[str]:
    """Sentences of prose, without code, mark-up and the names of the libraries themselves."""
    for block in re.split(r"\n\s*\n", docstring):
        if ">>>" in block or "::" in block or re.search(r"^\s*[-=~.|+*]{3,}", block, re.M):
            continue
        text = re.sub(r"[`*{}\\$<>\[\]|_#]+", " ", " ".join(block.split()))
        for sentence in SENTENCE.split(text):
            plain = " ".join(NAMES.sub(" ", sentence).split())
            words = plain.split()
            letters = sum(c.isalpha() or c == " " for c in plain)
            if 6 <= len(words) <= 40 and letters > 0.85 * len(plain) and plain[:1].isupper():
                yield plain
