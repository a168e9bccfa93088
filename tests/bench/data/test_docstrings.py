"""Sentences of docstrings: their splits and classes."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from kdgraft.errors import DistillError
from kdgraft_bench.data.docstrings import LIBRARIES, write_sentences


def test_sentences_leak_nothing(tmp_path):
    counts = dict(train=70, val=35, test=35)
    folder = write_sentences(tmp_path / "a", counts)
    found = {
        split: [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()] for split in counts
    }
    for split, lines in found.items():
        assert Counter(line["label"] for line in lines) == dict.fromkeys(LIBRARIES, counts[split] // len(LIBRARIES))
    texts = [(line["text"], line["label"]) for lines in found.values() for line in lines]
    assert len(set(texts)) == len(texts)
    # A name by itself would give the answer away.
    words = {word.strip(".,:;()'\"").lower() for text, _ in texts for word in text.split()}
    assert not words & {*LIBRARIES, "np", "pd", "nx", "pytorch"}
    again = write_sentences(tmp_path / "b", counts)
    assert (again / "train.jsonl").read_bytes() == (folder / "train.jsonl").read_bytes()
    other = write_sentences(tmp_path / "c", counts, seed=1)
    assert (other / "train.jsonl").read_bytes() != (folder / "train.jsonl").read_bytes()


def test_too_many_sentences_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("kdgraft_bench.data.docstrings.LIBRARIES", ("networkx",))
    with pytest.raises(DistillError, match=r"docstrings of networkx hold \d+ sentences for val, 1000000 are needed"):
        write_sentences(tmp_path, dict(val=10**6))
