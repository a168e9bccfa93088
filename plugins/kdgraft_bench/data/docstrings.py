"""Real text that every installation of the suite has: sentences of docstrings, to be classified by their library."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import random
import re
import sysconfig
import warnings
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

from kdgraft.errors import DistillError

LIBRARIES = ("python", "torch", "numpy", "transformers", "pandas", "sympy", "networkx")
"""The classes: the standard library, and packages that PyTorch, Transformers and Datasets depend on."""
SHARES = {"test": 0.25, "val": 0.15, "train": 0.6}
"""Split -> its share of each library's modules."""
WORDS = (6, 40)
"""The number of words of the shortest and of the longest sentence."""
_SKIPPED = frozenset(
    {"tests", "test", "testing", "_vendor", "site-packages", "dist-packages", "idlelib", "lib2to3", "pip"}
)
_SENTENCE_ENDS = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_NAMES = re.compile(
    r"\b(py)?(torch|numpy|np|pandas|pd|sympy|networkx|nx|pyarrow|arrow|python|transformers?|hugging ?face)\b", re.I
)


def write_sentences(folder: Path, counts: Mapping[str, int], seed: int = 0) -> Path:
    """Write ``train.jsonl``, ``val.jsonl`` and ``test.jsonl``, lines of ``{"text": …, "label": …}``, and return the folder.

    No module is in two splits, no sentence occurs twice in a library, the names of the libraries are removed, and all classes
    have equally many sentences.

    Args:
        folder: the folder, which is made if it does not exist.
        counts: the numbers of sentences of ``train``, ``val`` and ``test``.
        seed: the random seed.

    Raises:
        DistillError: a library is not installed, or has too few sentences.
    """
    wanted = {split: count // len(LIBRARIES) for split, count in counts.items()}
    rows: dict[str, list[dict[str, str]]] = {split: [] for split in counts}
    for library in LIBRARIES:
        found = _collect(_folder(library), wanted)
        for split, count in wanted.items():
            if len(found[split]) < count:
                raise DistillError(
                    f"the docstrings of {library} hold {len(found[split])} sentences for {split}, {count} are needed; ask for fewer"
                )
            drawn = random.Random(f"{seed} {library} {split}").sample(found[split], count)
            rows[split] += [{"text": text, "label": library} for text in drawn]
    folder.mkdir(parents=True, exist_ok=True)
    for split, lines in rows.items():
        random.Random(f"{seed} {split}").shuffle(lines)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def _collect(root: Path, wanted: Mapping[str, int]) -> dict[str, list[str]]:
    """Return a library's sentences by split, unique and sorted; modules are read in the order of their hash until these suffice."""
    modules: dict[str, list[tuple[str, Path]]] = {split: [] for split in SHARES}
    for file in _sources(root):
        digest = hashlib.sha256(file.relative_to(root).as_posix().encode()).hexdigest()
        modules[_split_of(digest)].append((digest, file))
    seen: set[str] = set()
    by_split = {}
    for split, count in wanted.items():
        found: set[str] = set()
        for _, file in sorted(modules[split]):
            if len(found) >= 2 * count:
                break
            found.update(
                sentence for text in _docstrings(file) for sentence in _sentences(text) if sentence not in seen
            )
        seen |= found
        by_split[split] = sorted(found)
    return by_split


def _sources(root: Path) -> Iterator[Path]:
    """Yield the modules under a folder, without looking into folders that are skipped."""
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name not in _SKIPPED]
        yield from (Path(folder, file) for file in files if file.endswith(".py"))


def _split_of(digest: str) -> str:
    """Return the split of a module, which depends on its path only."""
    place, total = int(digest[:8], 16) / 16**8, 0.0
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
    """Yield the sentences of prose, without code, mark-up and the names of the libraries."""
    for block in re.split(r"\n\s*\n", docstring):
        if ">>>" in block or "::" in block or re.search(r"^\s*[-=~.|+*]{3,}", block, re.M):
            continue
        text = re.sub(r"[`*{}\\$<>\[\]|_#]+", " ", " ".join(block.split()))
        for sentence in _SENTENCE_ENDS.split(text):
            plain = " ".join(_NAMES.sub(" ", sentence).split())
            letters = sum(c.isalpha() or c == " " for c in plain)
            fits = WORDS[0] <= len(plain.split()) <= WORDS[1]
            if fits and letters > 0.85 * len(plain) and plain[:1].isupper():
                yield plain
