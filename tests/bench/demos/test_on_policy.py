"""The comparison of on-policy distillation runs end to end, where one of its methods is named."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import support.nlp  # noqa: F401  quiet, one thread
from kdgraft_bench.comparison import Training
from kdgraft_bench.demos import nlp as demo
from kdgraft_bench.demos import on_policy
from kdgraft_nlp import OnPolicy

NAMES = "continued,on_policy,minillm"
METRICS = {"perplexity", "reverse KL", "teacher's loss", "parameters (k)", "step (ms)"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run with models and data as small as can be, and a call that does it again."""
    out = tmp_path_factory.mktemp("demo")
    models = dict(teacher=demo.llama(32, 2), student=demo.llama(16, 1), told=dict(length=16))
    sizes = dict(vocabulary=300, batch_size=4, rounds=2, texts=6, iterations=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "DATA", dict(train=140, val=14, test=28))
        patch.setattr(demo, "ON_POLICY", replace(demo.ON_POLICY, **models, **sizes))
        for texts in (on_policy.TEXTS, *(on_policy.METHODS[name]["on_policy"] for name in ("on_policy", "minillm"))):
            patch.setitem(texts, "max_new_tokens", 8)
        demo.main(recipes=NAMES, out=out)
        yield out, lambda: demo.main(recipes=NAMES, out=out)


def test_methods_start_as_the_plain_student(finished):
    with (finished[0] / "on_policy" / "results.csv").open() as file:
        told = {(row["method"], row["metric"]): float(row["value"]) for row in csv.DictReader(file)}
    methods = {"teacher", "plain", *NAMES.split(",")}
    assert told.keys() == {(method, metric) for method in methods for metric in METRICS}
    assert told["teacher", "reverse KL"] == pytest.approx(0, abs=1e-6) and told["plain", "reverse KL"] > 0
    assert told["minillm", "step (ms)"] > told["plain", "step (ms)"]  # it writes, with its teacher
    folder = finished[0] / "on_policy" / "seed0"
    states = {name: AutoModelForCausalLM.from_pretrained(folder / name).state_dict() for name in methods - {"teacher"}}
    first = states.pop("plain")["lm_head.weight"]
    for state in states.values():
        assert 0 < (state["lm_head.weight"] - first).abs().max() < 0.1  # three small steps


@pytest.mark.slow
def test_finished_trainings_are_taken_as_they_are(finished, capsys):
    finished[1]()
    assert capsys.readouterr().out.count("taken from") == 5


def test_texts_are_measured_by_their_writer_and_the_teacher(finished):
    out, comparison = finished[0], demo.ON_POLICY
    run = comparison.restore(Training("plain", 0, 10, "test", "cpu", out / "data", out / "on_policy"))
    folder = out / "on_policy" / "seed0"
    model, teacher = (AutoModelForCausalLM.from_pretrained(folder / name).eval() for name in ("plain", "teacher"))
    blocks = comparison.sets(out / "data")["test"]
    blocks = on_policy.encode("causal", blocks, run.processing_class, ("text", None), None, 16).select(range(3))
    settings = OnPolicy(**on_policy.TEXTS)
    divergence, loss = [], []
    for row, block in enumerate(blocks["input_ids"]):
        ids = torch.tensor(block[:8])
        for number in settings.numbers(0, 0, row):
            with torch.no_grad():
                q, p = (one(ids[None]).logits[0, -1].log_softmax(-1) for one in (model, teacher))
            token = int((q.double().exp().cumsum(0) <= number).sum())
            divergence.append(float((q.exp() * (q - p)).sum()))
            loss.append(-float(p[token]))
            ids = torch.cat([ids, torch.tensor([token])])
    found = on_policy.own_texts(run, str(folder / "teacher"), blocks)
    assert found["reverse KL"] == pytest.approx(sum(divergence) / 24, rel=1e-4)
    assert found["teacher's loss"] == pytest.approx(sum(loss) / 24, rel=1e-4)


def test_other_runs_leave_it_out(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(demo, "run", lambda comparisons, *_, **__: seen.extend(comparisons) or [])
    demo.main(out=tmp_path)
    assert demo.ON_POLICY in seen and not demo.ON_POLICY.default
