"""The benchmark runs on small models; its steps train what they say."""

from __future__ import annotations

from kdgraft.hosts import installed
from kdgraft_bench.costs import nlp as costs
from support import nlp as support  # noqa: F401  quiet, one thread


def test_every_variant_trains(monkeypatch):
    monkeypatch.setitem(costs.SIZES, "cpu", (2, 8))
    steps = costs.steps("cpu", base=128, depth=4)
    assert list(steps)[:3] == ["plain", "teacher forward", "eager maps"]
    assert set(costs.VARIANTS) < set(steps)
    for run in steps.values():
        run()


def test_language_model_rows(monkeypatch):
    monkeypatch.setattr(costs, "LM_TOKENS", 64)
    rows = costs.language_model(2048, 6, "cpu", width=16)
    names = [
        "no distillation",
        "plain losses",
        "chunked",
        "chunked, no labels",
        "stored teacher",
        "stored teacher, chunked",
    ]
    names += ["TRL, no labels"] if installed("trl") else []
    assert [row["step"] for row in rows] == names
    assert float(rows[2]["peak / plain losses"]) < 1
    assert all(float(row["ms"]) >= 0 for row in rows)
