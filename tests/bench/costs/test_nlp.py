"""The benchmark runs on small models; its steps train what they say."""

from __future__ import annotations

import pytest

from kdgraft.hosts import installed
from kdgraft_bench.costs import language
from kdgraft_bench.costs import nlp as costs
from kdgraft_bench.costs.sharded import sharded_rows
from support import nlp as support  # noqa: F401  quiet, one thread


def test_every_variant_trains(monkeypatch):
    monkeypatch.setitem(costs.SIZES, "cpu", (2, 8))
    steps = costs.steps("cpu", base=128, depth=4)
    assert list(steps)[:3] == ["plain", "teacher forward", "eager maps"]
    assert set(costs.VARIANTS) < set(steps)
    for run in steps.values():
        run()


def test_language_model_rows(monkeypatch):
    monkeypatch.setattr(language, "TOKENS", 64)
    rows = language.language_model(2048, 3, "cpu", width=16)
    names = ["no distillation", "plain losses", "chunked", "stored teacher", "stored teacher, chunked"]
    names += ["LoRA, chunked", "LoRA, its own base, chunked"] if installed("peft") else []
    names += ["chunked, no labels", "chunked, forward KL, no labels"]
    names += ["TRL, no labels", "TRL, forward KL, no labels"] if installed("trl") else []
    assert [row["step"] for row in rows] == names
    assert float(rows[2]["peak / plain losses"]) < 1
    assert all(float(row["ms"]) >= 0 for row in rows)


@pytest.mark.slow
def test_two_processes_share_a_training():
    one, two = sharded_rows("cpu", vocabulary=64, width=16)
    assert (one["processes"], two["processes"]) == ("1", "2, FSDP2")
    assert float(one["tokens/s"]) > 0 and float(two["tokens/s"]) > 0 and one["/ one process"] == "1.00"
