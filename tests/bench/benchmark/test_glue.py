"""The benchmark of GLUE's SST-2, on a miniature with encoders from folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tomllib

from kdgraft.cli import main
from kdgraft_bench.records import read_rows
from kdgraft_bench.spec import SHIPPED, read_benchmark

pytest.importorskip("transformers")
import torch
from datasets import Dataset, DatasetDict
from transformers import AutoConfig, AutoModel, BertTokenizerFast

from kdgraft_bench.benchmark.planned import plan_of_benchmark
from kdgraft_bench.hosts import bench_host

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "good",
    "bad",
    "film",
    "plot",
    "a",
    "the",
    "very",
    "dull",
    "fine",
]
SMALL = dict(num_hidden_layers=2, num_attention_heads=2, hidden_size=16, intermediate_size=32, vocab_size=len(WORDS))


def encoder(folder: Path, kind: str, seed: int) -> str:
    torch.manual_seed(seed)
    sizes = SMALL if kind == "bert" else dict(n_layers=1, n_heads=2, dim=16, hidden_dim=32, vocab_size=len(WORDS))
    AutoModel.from_config(AutoConfig.for_model(kind, **sizes)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


def sst2(folder: Path) -> None:
    texts = [f"{a} {b} {c}" for a in ("a", "the") for b in ("good", "bad", "dull", "fine") for c in ("film", "plot")]
    rows = dict(sentence=texts * 4, label=[int("good" in text or "fine" in text) for text in texts * 4])
    rows["idx"] = list(range(len(rows["label"])))
    DatasetDict({name: Dataset.from_dict(rows) for name in ("train", "validation")}).save_to_disk(folder)


def test_its_runs_are_those_that_it_names(tmp_path):
    told = read_benchmark("glue-sst2", out=str(tmp_path / "out"))
    host = bench_host(told.host)
    plan = plan_of_benchmark(told, host, host.dataset(told))
    runs = {run.name: run for run in plan.runs}
    assert set(runs) == {"teacher", "distilbert-plain", "distilbert-soft_targets", "distilbert-tinybert"}
    assert runs["teacher"].options["student"] == "bert-base-uncased" and not runs["distilbert-plain"].teachers
    assert told.teacher.published == {"accuracy": 0.927} and not told.published
    assert told.students["distilbert"].published == {"accuracy": 0.913}


@pytest.mark.slow
def test_it_runs_on_a_miniature(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    sst2(tmp_path / "data/glue/sst2")
    text = (SHIPPED / "glue-sst2.toml").read_text()
    teacher, student = encoder(tmp_path / "bert", "bert", 0), encoder(tmp_path / "distilbert", "distilbert", 1)
    text = text.replace('student = "bert-base-uncased"', f"student = {json.dumps(teacher)}")
    text = text.replace(
        '"glue-sst2.yaml"\npublished = { accuracy = 0.913',
        f'"glue-sst2.yaml"\noptions = {{ student = {json.dumps(student)} }}\npublished = {{ accuracy = 0.913',
    )
    text = text.replace("seeds = [0, 1, 2]", "seeds = [0]\nbatches = [1]")
    assert tomllib.loads(text)["students"]["distilbert"]["options"]["student"] == student
    (tmp_path / "glue-sst2.toml").write_text(text)
    (tmp_path / "glue-sst2.yaml").write_text((SHIPPED / "glue-sst2.yaml").read_text())
    command = ["bench", "glue-sst2.toml", "--out", "out"]
    assert main([*command, "--dry-run"]) == 0
    assert "each takes" in capfd.readouterr().out
    assert main(command) == 0
    methods = ("plain", "soft_targets", "tinybert")
    rows = read_rows(tmp_path / "out")
    assert set(rows) == {("teacher", "teacher", 0), *(("distilbert", method, 0) for method in methods)}
    table = (tmp_path / "out/table.md").read_text()
    assert "published" in table and "0.927" in table and "0.913" in table
