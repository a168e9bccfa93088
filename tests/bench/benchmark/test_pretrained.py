"""The benchmark with a teacher that was really pretrained: real weights, students of some of its layers and from scratch."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch
import yaml
from transformers import AutoModel, AutoTokenizer

import support.nlp  # noqa: F401  quiet, one thread
from kdgraft.errors import DistillError
from kdgraft_bench.benchmark.planned import plan_of_benchmark
from kdgraft_bench.benchmark.working import carry_out_one
from kdgraft_bench.hosts import bench_host, pretrained
from kdgraft_bench.spec import read_benchmark
from support.bench import write_masks, write_scenes

WORDS = {"cat": "the cat sat on a mat", "dog": "a dog ran in the park"}
needs_weights = pytest.mark.skipif(find_spec(pretrained.PACKAGE) is None, reason="needs the extra pretrained")


@pytest.fixture
def told(tmp_path):
    data = tmp_path / "pets"
    data.mkdir()
    for split, count in (("train", 16), ("val", 3)):
        rows = [{"text": f"{text} {place}", "label": name} for place in range(count) for name, text in WORDS.items()]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_benchmark("nlp-pretrained", data=str(data), out=str(tmp_path / "out"), seeds=[0], iterations=2)


def test_without_its_weights_it_says_what_to_install(monkeypatch, told):
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    host = bench_host("nlp")
    with pytest.raises(DistillError, match=r'pip install "kdgraft\[pretrained\]"'):
        plan_of_benchmark(told, host, host.dataset(told))


@needs_weights
def test_a_student_of_some_layers_has_these_layers(tmp_path):
    folder = pretrained.some_layers([1, 3, 5], tmp_path)
    student, whole = AutoModel.from_pretrained(folder), AutoModel.from_pretrained(pretrained.minilm())
    own, given = student.state_dict(), whole.state_dict()
    assert student.config.num_hidden_layers == 3
    for key, value in own.items():
        place = {"layer.0.": "layer.1.", "layer.1.": "layer.3.", "layer.2.": "layer.5."}
        other = next((key.replace(mine, theirs) for mine, theirs in place.items() if mine in key), key)
        assert torch.equal(value, given[other]), key
    text = "a dog ran"
    tokens = [AutoTokenizer.from_pretrained(path)(text)["input_ids"] for path in (folder, pretrained.minilm())]
    assert tokens[0] == tokens[1]


@needs_weights
@pytest.mark.parametrize("layers", [[], [6], [-1], [True], ["1"]])
def test_layers_that_are_not_there_are_refused(tmp_path, layers):
    with pytest.raises(DistillError, match="numbers from 0 to 5"):
        pretrained.some_layers(layers, tmp_path)


@needs_weights
def test_it_trains_teacher_and_students_on_the_same_tokens(told):
    host = bench_host("nlp")
    dataset = host.dataset(told)
    plan = plan_of_benchmark(told, host, dataset)
    names = ("teacher", "three_layers-minilmv2", "scratch-minilmv2", "scratch-embeddings")
    done = {name: carry_out_one(told, plan, name, 0) for name in names}
    for name, one in done.items():
        assert 0 <= one.metrics["accuracy"] <= 1, name
        assert AutoTokenizer.from_pretrained(one.model.weights).vocab_size == 30522
    for name in ("teacher", "three_layers", "scratch"):
        config = yaml.safe_load((told.out / f"configs/{name}.yaml").read_text())
        assert config["tokenizer"] == str(pretrained.minilm()) and config["training"]["max_steps"] == 2


@pytest.mark.parametrize(
    ("name", "write", "method"),
    [
        pytest.param("det-pretrained", write_scenes, "ld", marks=pytest.mark.slow),
        ("seg-pretrained", write_masks, "cwd"),
    ],
)
def test_a_backbone_with_imagenet_weights_teaches(tmp_path, name, write, method):
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra pretrained")
    data = tmp_path / "data"
    data.mkdir()
    told = read_benchmark(
        name, data=str(write(data)), out=str(tmp_path / "out"), seeds=[0], iterations=2, methods=[method]
    )
    host = bench_host(told.host)
    dataset = host.dataset(told)
    plan = plan_of_benchmark(told, host, dataset)
    done = {run: carry_out_one(told, plan, run, 0) for run in ("teacher", f"small-{method}")}
    weights = torch.load(done["teacher"].model.weights, weights_only=False)["state_dict"]
    efficientnet = __import__("kdgraft_bench.hosts.efficientnet", fromlist=["network"])
    own, given = (
        weights["backbone.stages.0.0._depthwise_conv.weight"],
        efficientnet.network("lite0")._blocks[0]._depthwise_conv.weight,
    )
    # One step of AdamW at a warm-up's rate moves a weight by less than this.
    assert torch.allclose(own, given, atol=2e-3) and not torch.equal(own, given)
    assert not any(
        "stages" in key for key in torch.load(done[f"small-{method}"].model.weights, weights_only=False)["state_dict"]
    )
    opened = host.open(next(run for run in plan.runs if run.name == "teacher"), done["teacher"].model, dataset)
    levels = opened.model.backbone(torch.zeros(1, 3, 64, 96))
    assert [tuple(level.shape[1:]) for level in levels] == [
        (c, 64 // s, 96 // s) for c, s in zip((24, 40, 112, 320), (4, 8, 16, 32), strict=True)
    ]
