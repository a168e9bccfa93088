"""The command line, as a user meets it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from kdgraft.cli import main


def refused(capsys: pytest.CaptureFixture[str], arguments: Sequence[str], *parts: str, progress: bool = False) -> str:
    """The one line on stderr with which a command exits with 2; it holds all the parts.

    Args:
        progress: whether a host's progress bars may stand beside the line.
    """
    capsys.readouterr()
    assert main(list(arguments)) == 2
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("kdgraft") or (line and not progress)]
    assert len(lines) == 1 and lines[0].startswith("kdgraft: error: "), said
    line = lines[0]
    for part in parts:
        assert part in line, line
    return line
