"""Tables on the terminal."""

from __future__ import annotations

import pytest

from kdgraft.tables import print_rows


def test_columns_are_as_wide_as_their_longest_entry(capsys: pytest.CaptureFixture[str]):
    rows = [
        {"method": name, "model": model, "AP": "0.81 ± 0.01", "AP75": "–"}
        for name, model in (("teacher", "large"), ("plain", "small"), ("localization", "small"))
    ]
    print_rows(rows, "Test")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "Test"
    assert printed[1].split() == ["method", "model", "AP", "AP75"]
    assert printed[1].index("model") == printed[4].index("small")
    print_rows([])
    assert capsys.readouterr().out == ""
