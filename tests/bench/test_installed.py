"""Measuring without the libraries that it needs ends with one line."""

from __future__ import annotations

import pytest

from support.forking import python


@pytest.mark.parametrize("command", [("demo", "nlp"), ("bench", "nlp"), ("experiments", "hard_soft")])
def test_a_missing_library_is_one_line(command: tuple[str, str]):
    # An entry of None makes a module look as if it were not installed.
    program = "import sys\nsys.modules['pandas'] = None\nfrom kdgraft.cli import main\nsys.exit(main(sys.argv[1:]))"
    done = python("-c", program, *command)
    assert done.returncode == 2
    said = 'measuring needs pandas, which is not installed: pip install "kdgraft[bench]"'
    assert done.stderr == f"kdgraft: error: {said}\n"
