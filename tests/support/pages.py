"""The pages of the documentation as programs, files and commands.

* A ``python`` block is a program that runs as it stands, or a config of MMDetection or MMSegmentation (it has a ``_base_``).
* A block with a ``title="…"`` is that file. A ``bash`` block is run beside the files of its section.
* An indented block, and code within a line that begins with a command, shows commands: they are parsed, not run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kdgraft.hosts import installed
from support.forking import IMPORTED, python

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("[!.]*/README.md")), *sorted(ROOT.glob("docs/**/*.md"))]
COMMANDS = ("kdgraft", "make", "pip", "accelerate", "torchrun", "python")
ADDRESS = "http://localhost:8000/v1"
"""The address of the servers on the pages."""
_FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A fenced block: where it stands, its language, the file that it is, if any, and its text."""

    page: str
    section: str
    language: str
    file: str
    text: str


def _sections(text: str) -> list[tuple[str, str]]:
    """Title and text of each section of a page; a line in a block that begins with # is no title."""
    blanked = _FENCE.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
    starts = [(found.start(), found[1]) for found in re.finditer(r"^##? (.+)$", blanked, re.MULTILINE)]
    ends = [start for start, _ in starts[1:]] + [len(text)]
    return [(title, text[start:end]) for (start, title), end in zip(starts, ends, strict=True)]


def _blocks() -> list[Block]:
    return [
        Block(str(page.relative_to(ROOT)), section, *found.groups(default=""))
        for page in PAGES
        for section, text in _sections(page.read_text(encoding="utf-8"))
        for found in _FENCE.finditer(text)
    ]


BLOCKS = _blocks()
PROGRAMS = [block for block in BLOCKS if block.language == "python" and not block.file and "_base_" not in block.text]
JOBS = list(dict.fromkeys((block.page, block.section) for block in BLOCKS if block.language == "bash"))
"""Sections with commands that are run."""


def configs(plugin: str) -> list[str]:
    """The configs on all pages that import a plugin and need no other file of their section."""
    return [block.text for block in BLOCKS if block.language == "python" and not block.file and plugin in block.text]


def program(*words: str) -> str:
    """The one program in which all these words are."""
    (found,) = [block.text for block in PROGRAMS if all(word in block.text for word in words)]
    return found


def _frameworks(texts: Sequence[str]) -> list[str]:
    """What these need beside torch."""
    needs = {"kdgraft_nlp": "transformers", "transformers": "transformers", "task: ": "transformers"}
    needs |= {"from trl": "trl", "from sentence_transformers": "sentence_transformers"}
    needs |= {"mmdet": "mmdet", "mmseg": "mmseg", "kdgraft_bench": "matplotlib", "kdgraft.onnx": "onnxscript"}
    return [need for word, need in needs.items() if any(word in text for text in texts)]


def missing_host(texts: Sequence[str]) -> str | None:
    """A framework that these need and that is not installed."""
    return next((need for need in _frameworks(texts) if not installed(need)), None)


def run(command: Sequence[str], folder: Path, timeout: float = 240) -> str:
    """What a command prints in a folder where it finds the modules that this process finds."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def run_program(code: str, folder: Path) -> str:
    """Runs a program from a folder, in a process that has imported nothing of ours; what it prints.

    One that asks a server finds a small one, at another address than the printed one, and its model in the folder ``teacher``.
    """
    if ADDRESS in code:
        from support.language_server import small_one

        with small_one(folder / "teacher") as server:
            return run_program(code.replace(ADDRESS, server.url), folder)
    host = next((need for need in _frameworks([code]) if need in IMPORTED), "torch")
    done = python("-c", code, host=host, folder=folder, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def run_job(page: str, section: str, folder: Path, timeout: float) -> str:
    """Writes the files of a section and runs its commands."""
    blocks = [block for block in BLOCKS if (block.page, block.section) == (page, section)]
    for block in blocks:
        if block.file:
            (folder / block.file).write_text(block.text, encoding="utf-8")
    ours = 'set -e; python() { "$0" "$@"; }; kdgraft() { python -m kdgraft "$@"; }\n'
    commands = "".join(block.text for block in blocks if block.language == "bash")
    return run(["bash", "-c", ours + commands, sys.executable], folder, timeout)


def shown_commands() -> list[tuple[str, str]]:
    """The commands that are shown and not run, each with its page."""
    found = []
    for page in PAGES:
        text = _FENCE.sub("", page.read_text(encoding="utf-8"))
        lines = re.findall(r"^ {4}(\S.*)$", text, re.MULTILINE)
        spans = re.findall(r"(?<!`)`([^`\n]+)`", re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE))
        for line in (*lines, *spans):
            command = re.sub(r"(?<!options) …$", "", re.split(r"\s+#", line)[0].strip())
            if re.match(rf"({'|'.join(COMMANDS)})\s", command):
                found.append((str(page.relative_to(ROOT)), command))
    return list(dict.fromkeys(found))
