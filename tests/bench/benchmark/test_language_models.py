"""Benchmarks of language models: another tokenizer, texts that students write, a part of a set; on real, tiny models."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import support.nlp  # noqa: F401  quiet, one thread
from kdgraft.errors import DistillError
from kdgraft.plans import carry_out
from kdgraft_bench.benchmark.planned import plan_of_benchmark
from kdgraft_bench.benchmark.working import carry_out_one, write_texts
from kdgraft_bench.decisions import Decisions, same_items
from kdgraft_bench.hosts import Dataset, bench_host, nlp_setup
from kdgraft_bench.hosts.own_texts import own_texts
from kdgraft_bench.spec import Model, read_benchmark
from kdgraft_bench.trl_gkd import trl_gkd
from kdgraft_nlp import OnPolicy
from kdgraft_nlp.data import encode
from kdgraft_nlp.run import plain_trainer
from kdgraft_nlp.settings import load
from support.bench import write_texts as write_classes


@pytest.fixture(scope="module", autouse=True)
def few_sentences():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nlp_setup, "DATA", dict(train=140, val=14, test=28))
        yield


def small(told, **sizes):
    """A benchmark with models as small as can be, and the other arguments of its own."""

    def shrunk(model, width, layers):
        return Model(settings={**model.settings, "width": width, "layers": layers, **sizes})

    students = {name: shrunk(model, 16, 1) for name, model in told.students.items()}
    return replace(told, teacher=shrunk(told.teacher, 32, 2), students=students)


def carried_out(told):
    """Carry out the runs of the first seed; return the plan, what each gave, and the finished models."""
    host = bench_host(told.host)
    plan = plan_of_benchmark(told, host, host.dataset(told))
    seed = told.seeds[0]
    done = {name: carry_out_one(told, plan, name, seed) for name, _, _ in told.trained()}
    return plan, done, carry_out(plan, dry_run=True, tell=lambda line: None)


def test_students_with_another_tokenizer(tmp_path):
    told = read_benchmark("nlp-tokenizers", seeds=[0], iterations=2, methods=["gold"], out=str(tmp_path))
    told = small(replace(told, batch=4), length=16)
    told.teacher.settings["vocabulary"], told.students["small"].settings["vocabulary"] = 120, 60
    plan, done, _ = carried_out(told)
    entries = {}
    for name, one in done.items():
        tokenizer = AutoTokenizer.from_pretrained(one.model.weights)
        model = AutoModelForCausalLM.from_pretrained(one.model.weights)
        entries[name] = len(tokenizer)
        assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert entries["teacher"] == 120 > entries["small-plain"] == entries["small-gold"] == 60
    teacher, plain, gold = (
        Decisions.read(plan.folder(name, 0) / "decisions.npz") for name in ("teacher", "small-plain", "small-gold")
    )
    # Students are tested on the same tokens; a teacher of another tokenizer on others, so that their perplexities are no gap.
    assert same_items(plain, gold) and not same_items(teacher, plain)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A benchmark of on-policy training: a plain student, and methods that start as this one."""
    out = tmp_path_factory.mktemp("on_policy")
    told = read_benchmark(
        "nlp-on-policy", seeds=[0], iterations=10, out=str(out), methods=["continued", "on_policy", "minillm"]
    )
    told = small(replace(told, texts=6, processes=1, batch=4), vocabulary=300, length=16)
    for method in told.methods.values():
        method["options"]["training.max_steps"] = 3
        if "on_policy" in method["options"]:
            method["options"]["on_policy"]["max_new_tokens"] = 8
    return told, *carried_out(told)


def test_methods_start_as_the_plain_student(written):
    _, plan, done, _ = written
    needs = {run.name: set(run.needs) for run in plan.runs}
    assert needs["small-continued"] == {"small-plain"} and needs["small-on_policy"] == {"teacher", "small-plain"}
    states = {
        name: AutoModelForCausalLM.from_pretrained(one.model.weights).state_dict()
        for name, one in done.items()
        if name != "teacher"
    }
    first = states.pop("small-plain")["lm_head.weight"]
    for state in states.values():
        assert 0 < (state["lm_head.weight"] - first).abs().max() < 0.1  # three small steps


@pytest.mark.slow
def test_texts_are_measured_once(written):
    told, plan, _, finished = written
    found = write_texts(told, plan, list(finished), finished)
    assert found["teacher", 0]["reverse KL"] == pytest.approx(0, abs=1e-6)
    assert found["small-plain", 0]["reverse KL"] > 0
    record = plan.folder("small-plain", 0) / "texts.json"
    before = record.stat().st_mtime_ns
    assert write_texts(told, plan, list(finished), finished) == found and record.stat().st_mtime_ns == before
    write_texts(replace(told, texts=5), plan, [("small-plain", 0)], finished)
    assert record.stat().st_mtime_ns != before


def test_texts_are_measured_by_their_writer_and_the_teacher(written):
    told, _, done, _ = written
    student, judge = done["small-plain"].model, done["teacher"].model
    run, config = plain_trainer(student.config, student.weights, [], told.out / "scratch")
    model, teacher = (AutoModelForCausalLM.from_pretrained(each.weights).eval() for each in (student, judge))
    blocks = encode("causal", nlp_setup.read(config["data"]["eval"]), run.processing_class, ("text", None), None, 16)
    blocks = blocks.select(range(3))
    settings = OnPolicy(max_new_tokens=8, prompt=8, eos_token_id=[])
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
    found = own_texts(run, judge.weights, blocks)
    assert found["reverse KL"] == pytest.approx(sum(divergence) / 24, rel=1e-4)
    assert found["teacher's loss"] == pytest.approx(sum(loss) / 24, rel=1e-4)


def test_texts_belong_to_language_models(tmp_path):
    write_classes(tmp_path)
    told = small(read_benchmark("nlp", data=str(tmp_path), texts=3, out=str(tmp_path / "out")))
    host = bench_host("nlp")
    with pytest.raises(DistillError, match="texts are of language models, the task is classification; leave texts out"):
        plan_of_benchmark(told, host, host.dataset(told))  # before anything is trained
    with pytest.raises(DistillError, match="texts are of language models, in Hugging Face"):
        read_benchmark("core", texts=3)


def test_a_batch_belongs_to_small_models(tmp_path):
    told = replace(read_benchmark("nlp", batch=3, out=str(tmp_path)), teacher=Model(config="mine.yaml"))
    with pytest.raises(DistillError, match=r"batch is of the small models, and mine\.yaml says its own"):
        plan_of_benchmark(told, bench_host("nlp"), bench_host("nlp").dataset(told))


def test_a_part_of_a_set_is_drawn_by_the_seed(tmp_path):
    write_classes(tmp_path)
    told = small(read_benchmark("nlp", data=str(tmp_path), fraction=0.5, out=str(tmp_path / "out")))
    host = bench_host("nlp")
    path, options = host.config(told.teacher, host.dataset(told), told, "teacher")
    assert options == {"data.fraction": 0.5}
    own = replace(told, data=None)  # a recipe file of the user's, on its own data
    assert host.config(Model(config=path), Dataset("own data", None), own, "x") == (path, options)
    drawn = []
    for seed in (0, 1):
        told_seed = [
            "data.fraction=0.5",
            f"training.seed={seed}",
            "training.use_cpu=true",
            "training.max_steps=2",
            f"output={tmp_path / 'x'}",
        ]
        drawn.append(nlp_build(path, told_seed).train_dataset["input_ids"])
    assert [len(each) for each in drawn] == [45, 45] and list(drawn[0]) != list(drawn[1])
    for fraction in (0, 1.5, True):
        with pytest.raises(DistillError, match=r"fraction must be in \(0, 1\]"):
            read_benchmark("nlp", fraction=fraction)
    with pytest.raises(DistillError, match="fraction is a setting of Hugging Face's training sets"):
        read_benchmark("core", fraction=0.5)


def nlp_build(path, options):
    from kdgraft_nlp.run import build

    return build(load(path, options))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"label": 1}, "need a column 'text', or 'tokens'"),
        ({"text": "a"}, "need a column 'label', or 'tokens' and 'tags'"),
        ({"tokens": ["a"], "tags": ["O"]}, "there are no columns for the task classification"),
    ],
)
def test_a_set_without_its_columns_is_one_line(tmp_path, line, message):
    for split in ("train", "val"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(line) + "\n")
    told = read_benchmark("nlp", data=str(tmp_path), out=str(tmp_path / "out"))
    with pytest.raises(DistillError, match=message):
        bench_host("nlp").dataset(told)
    (tmp_path / "val.jsonl").unlink()
    with pytest.raises(DistillError, match=r"no val\.jsonl"):
        bench_host("nlp").dataset(told)


trl_there = find_spec("trl") is not None


@pytest.mark.skipif(trl_there, reason="TRL is installed")
def test_without_trl_the_peer_says_what_to_install():
    with pytest.raises(DistillError, match="pip install trl"):
        trl_gkd(teacher="x", args=TrainingArguments("x", report_to=[]))


@pytest.fixture(scope="module")
def beside_trl(tmp_path_factory):
    """A benchmark of language models with TRL's trainer beside ours, which leaves the labels out as TRL does."""
    pytest.importorskip("trl")
    out = tmp_path_factory.mktemp("trl")
    told = read_benchmark("nlp-text", seeds=[0], iterations=12, out=str(out), methods=["gkd_alone"])
    return carried_out(small(replace(told, batch=4, processes=1), vocabulary=300, length=16))


def test_trls_student_is_that_of_the_same_divergence(beside_trl):
    _, done, _ = beside_trl
    states = {
        name: AutoModelForCausalLM.from_pretrained(done[f"small-{name}"].model.weights).state_dict()
        for name in ("trl", "gkd_alone", "plain")
    }
    # The same weights, batches and schedule, and one loss written twice; the plain student learns something else.
    for key, value in states["gkd_alone"].items():
        torch.testing.assert_close(states["trl"][key], value, rtol=0, atol=2e-5)
    apart = [(states["plain"][key] - value).abs().max() for key, value in states["gkd_alone"].items()]
    assert max(apart) > 0.02


def test_trls_student_is_tested_and_validated_as_the_others(beside_trl):
    _, done, _ = beside_trl
    for kind in ("metrics", "validated"):
        theirs, ours, plain = (getattr(done[f"small-{name}"], kind) for name in ("trl", "gkd_alone", "plain"))
        assert theirs["perplexity"] == pytest.approx(ours["perplexity"], rel=1e-3)
        assert theirs.keys() == ours.keys() == plain.keys() and theirs["perplexity"] > 100


def test_trls_peer_is_of_language_models_and_takes_its_arguments_alone(tmp_path):
    host = bench_host("nlp")
    told = read_benchmark("nlp-text", out=str(tmp_path))
    with pytest.raises(DistillError, match="the peer trl_gkd takes no 'bata'; did you mean 'beta'"):
        host.peer(Model(settings={"model": "trl_gkd", "bata": 1}), "small", host.dataset(told), told)
    told = read_benchmark("nlp", out=str(tmp_path))
    with pytest.raises(DistillError, match="trl_gkd trains language models, the task is classification"):
        host.peer(Model(settings={"model": "trl_gkd"}), "small", host.dataset(told), told)
