"""A server that fails: requests are repeated, one line says what is wrong, and no wrong target is learned from."""

from __future__ import annotations

import json
import logging
import random
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from kdgraft import DistillError
from kdgraft_nlp import DistillTrainer, Served
from kdgraft_nlp.student import graft
from support import nlp as support
from support.forking import environment, python
from support.language_server import Served as Process
from support.language_server import serving
from support.processes import launched

BATCH = support.collate(support.samples(12, "causal")[3:7])


def student():
    return support.quiet(support.model("llama", seed=1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("teacher")
    support.model("llama", 32, 2, seed=2).save_pretrained(found)
    support.by_word().save_pretrained(found)
    return found


@pytest.fixture(scope="module")
def process(folder):
    with serving(folder) as found:
        yield found


@pytest.fixture
def server(process):
    process.fail()
    return process


def grafted(given):
    return graft(student(), given, ["ForwardKL"]).train()


def loss_of(one):
    return float(support.loss_of(one, BATCH).detach())


# --- what a server recovers from


@pytest.mark.parametrize(
    "faults",
    [
        [dict(status=500)] * 3,
        [dict(status=429, headers={"Retry-After": "1"})],
        [dict(kind="cut"), dict(kind="half")],
        [dict(delay=2.0)],
        [dict(status=503), dict(kind="cut"), dict(status=502), dict(kind="half")],
    ],
    ids=["500", "429", "cut", "late", "all"],
)
@pytest.mark.parametrize("api", ["vllm", *(pytest.param(api, marks=pytest.mark.slow) for api in ("echo", "sglang"))])
def test_requests_are_repeated(server, faults, api):
    one = grafted(Served(server.url, top_k=9, api=api, timeout=1.0))
    whole = loss_of(one)
    before = server.ask("/seen")["requests"]
    server.fail(*faults)
    assert loss_of(one) == pytest.approx(whole, rel=1e-6)
    assert server.ask("/seen")["requests"] - before == 4 + len(faults)


@pytest.mark.parametrize(
    ("status", "form"),
    [
        (429, "seconds"),
        *(pytest.param(*other, marks=pytest.mark.slow) for other in ((429, "date"), (503, "seconds"), (503, "date"))),
    ],
)
def test_no_sooner_than_the_server_asks(server, status, form):
    one = grafted(Served(server.url, top_k=9, concurrency=1))
    loss_of(one)
    told = "2"
    if form == "date":  # whole seconds
        told = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 3))
    server.fail(dict(status=status, headers={"Retry-After": told}))
    began = time.monotonic()
    loss_of(one)
    assert 1.9 < time.monotonic() - began < 8


def test_pauses_draw_from_no_generator_of_the_training(server):
    given = Served(server.url, top_k=4)
    given.stand_for(student())
    server.fail(dict(status=503), dict(status=503))
    before = random.getstate(), torch.get_rng_state()
    given.load()
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


# --- one line


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (
            dict(status=500),
            r"answers 500 \(Engine is busy\), after 2 tries in \d s; start it again and resume, or raise",
        ),
        (dict(delay=3.0), r"does not answer \(ReadTimeout.*\), after 2 tries"),
        (dict(kind="half"), "sent an answer that is not complete JSON, after 2 tries"),
        (dict(kind="cut"), r"does not answer \(RemoteProtocolError.*after 2 tries"),
    ],
    ids=str,
)
def test_a_server_that_does_not_recover(server, fault, said):
    one = grafted(Served(server.url, top_k=9, timeout=0.7, retries=1))
    server.fail(*[fault] * 30)
    with pytest.raises(DistillError, match=said) as error:
        loss_of(one)
    assert "\n" not in str(error.value)


WRONG = {
    "few": ("vllm", "the server gives 8 log-probabilities of a token, and top_k is 9; start it with --max-logprobs 9"),
    "few, echoed": ("echo", "the server gives 8 log-probabilities of a token, and top_k is 9"),
    "short": ("vllm", "the server read 5 tokens, and 6 were sent; it may cut prompts, or add tokens to them"),
    "bos": ("vllm", "the server read 7 tokens, and 6 were sent"),
    "bos, echoed": ("echo", "the server read 7 tokens, and 6 were sent"),
    "other": ("vllm", "the server read another token than .*, which was sent as token 5 of 6"),
    "other, echoed": ("echo", "the server read another token than .*, which was sent as token 5 of 6"),
    "logits": ("vllm", "the server's numbers are no log-probabilities, .* --logprobs-mode raw_logprobs"),
    "plain": ("vllm", r"has no choices\[\].prompt_logprobs for each token, as api='vllm' needs; take another api"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("repeats", [1, 0], ids=["new", "old"])  # older servers do not repeat the tokens that they read
def test_answers_that_are_wrong_are_no_targets(server, name, repeats):
    api, said = WRONG[name]
    one = grafted(Served(server.url, top_k=9, api=api, concurrency=1))
    server.fail(dict(kind=name.partition(",")[0], repeats=repeats))
    with pytest.raises(DistillError, match=said):
        loss_of(one)


def test_the_vocabulary_of_the_server_is_that_of_the_student(server):
    small = support.quiet(support.model("llama", seed=1, vocab_size=30))
    with pytest.raises(
        DistillError, match=r"gives token 3\d among the most probable ones, and the student has 30 entries"
    ):
        graft(small, Served(server.url, top_k=25), ["ForwardKL"])
    wide = support.quiet(support.model("llama", seed=1, vocab_size=50))
    with pytest.raises(DistillError, match="gives 40 log-probabilities of a token, and top_k is 45"):
        graft(wide, Served(server.url, top_k=45), ["ForwardKL"])


def test_the_key_the_model_and_the_number_of_entries(folder, monkeypatch):
    monkeypatch.setenv("THE_KEY", "the secret")
    monkeypatch.setenv("OLD_KEY", "an older secret")
    with serving(folder, key="the secret", max_logprobs=20, repeats=0, name="base,tuned") as process:

        def refused(said, **told):
            with pytest.raises(DistillError, match=said) as error:
                grafted(Served(process.url, **{"model": "base", "top_k": 20, "api_key": "THE_KEY", **told}))
            assert "secret" not in str(error.value) and "\n" not in str(error.value)

        assert loss_of(grafted(Served(f"{process.url}/v1/", "base", 20, api_key="THE_KEY"))) > 0
        refused("the key in OLD_KEY .401.; set api_key to the name of the environment variable", api_key="OLD_KEY")
        refused("refuses requests without a key .401.", api_key=None)
        refused("has no model 'bose'; did you mean 'base'", model="bose")
        refused("has several models; set model to one of base, tuned", model=None)
        for api in ("vllm", "echo"):
            refused("gives fewer log-probabilities .* top_k is 21; start it with --max-logprobs 21", top_k=21, api=api)


def test_nobody_at_the_address():
    with pytest.raises(DistillError, match=r"127.0.0.1:9 does not answer \(ConnectError.*after 1 tries"):
        grafted(Served("http://127.0.0.1:9/v1", "a", retries=0))


# --- tokenizers


def trainer_of(folder, given, processing=None, **settings):
    return DistillTrainer(
        model=student(),
        teacher=given,
        terms=["ForwardKL"],
        args=support.arguments(folder, **settings),
        train_dataset=support.samples(12, "causal"),
        data_collator=support.collate,
        processing_class=processing,
    )


def test_another_tokenizer_is_refused(server, tmp_path, caplog):
    with pytest.raises(DistillError, match="model 'teacher' on the server has another tokenizer than the student"):
        trainer_of(tmp_path, Served(server.url, top_k=4), support.by_letter())
    other = support.by_word()
    other.add_tokens(["late"])
    with pytest.raises(DistillError, match="another tokenizer than the student"):
        trainer_of(tmp_path, Served(server.url, top_k=4), other)
    with caplog.at_level(logging.WARNING, "kdgraft"):
        trainer_of(tmp_path, Served(server.url, top_k=4), support.by_word())
    assert "could not be checked" not in caplog.text


def test_a_tokenizer_that_cannot_be_compared_is_said_once(folder, tmp_path, caplog):
    with serving(folder, tokenizes=0) as process, caplog.at_level(logging.WARNING, "kdgraft"):
        trainer_of(tmp_path, Served(process.url, top_k=4), support.by_word(), max_steps=2).train()
        trainer_of(tmp_path, Served(process.url, top_k=4), max_steps=1)
    said = [record.getMessage() for record in caplog.records if "could not be checked" in record.getMessage()]
    assert len(said) == 2 and "/tokenize answers 404" in said[0] and "no tokenizer is known here" in said[1]


# --- from recipe files, with a server that is killed


def recipe(folder, url, **told):
    words = ["the cat sat", "a dog on the cat", "the dog sat on a cat", "cat on dog", "a cat"]
    rows = [{"text": " ".join(words[(i + j) % 5] for j in range(1 + i % 3))} for i in range(40)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    support.by_word().save_pretrained(folder / "tokenizer")
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=40)
    training = dict(max_steps=8, per_device_train_batch_size=4, logging_steps=1, report_to=[], use_cpu=True)
    entries = {
        "task": "causal",
        "data": {"train": "train.jsonl", "length": 16, "joined": False},
        "tokenizer": "tokenizer",
        "student": {"model_type": "llama", **sizes},
        "teacher": {"type": "Served", "url": url, "top_k": 8, "retries": 1, "timeout": 5},
        "recipe": "gkd",
        "training": {**training, "save_steps": 2, "seed": 3},
        **told,
    }
    (folder / "recipe.yaml").write_text(json.dumps(entries))


def kdgraft(folder, *arguments):
    done = python("-W", "ignore", "-m", "kdgraft", *arguments, host="transformers", folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_server_that_is_killed_in_a_training(folder, tmp_path):
    with serving(folder) as process:
        recipe(tmp_path, process.url)
        kdgraft(tmp_path, "train", "recipe.yaml", "--work-dir", "whole")
    slow = Process(folder, process.port, delay=0.4)
    try:
        training = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "kdgraft", "train", "recipe.yaml", "--work-dir", "killed"],
            cwd=tmp_path,
            env=environment(CUDA_VISIBLE_DEVICES=""),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2400):
            assert training.poll() is None, training.communicate()
            if (tmp_path / "killed" / "checkpoint-4").is_dir():
                break
            time.sleep(0.1)
    finally:
        slow.end()
    _, errors = training.communicate(timeout=120)
    assert training.returncode == 2
    (line,) = [line for line in errors.splitlines() if "error" in line]
    assert line.startswith(f"kdgraft: error: the server at {slow.url} does not answer (") and "after 2 tries" in line
    assert "Traceback" not in errors
    again = Process(folder, process.port)
    try:
        kdgraft(tmp_path, "train", "recipe.yaml", "--work-dir", "killed", "--resume")
    finally:
        again.end()
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    for name, value in whole.items():
        torch.testing.assert_close(killed[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_a_store_from_a_recipe_and_its_training(server, tmp_path):
    recipe(tmp_path, "http://localhost:1")
    served = f"teacher={{type: Served, url: {server.url}/v1, top_k: 8}}"
    said = kdgraft(tmp_path, "cache", "recipe.yaml", "--out", "store", "--top-k", "8", "--cfg-options", served)
    assert "40 texts and" in said
    assert json.loads((tmp_path / "store" / "store.json").read_text())["teacher"]["served"] == "teacher"
    stored = json.dumps({"type": "Stored", "folder": "store"})
    said = kdgraft(tmp_path, "train", "recipe.yaml", "--work-dir", "out", "--cfg-options", f"teacher={stored}")
    assert "distill.generalized_jsd.loss" in said
    said = kdgraft(tmp_path, "check", "recipe.yaml", "--cfg-options", served)
    assert "generalized_jsd" in said


@pytest.mark.slow
def test_two_processes_ask_for_their_own_texts(server, tmp_path):
    """Their student is that of one process with the batches of both."""
    for folder, size in (("two", 4), ("one", 8)):
        (tmp_path / folder).mkdir()
        told = dict(max_steps=3, per_device_train_batch_size=size, report_to=[], use_cpu=True, optim="sgd", seed=3)
        recipe(tmp_path / folder, server.url, training={**told, "learning_rate": 0.5, "save_strategy": "no"})
    before = server.ask("/seen")["requests"]
    kdgraft(tmp_path / "one", "train", "recipe.yaml", "--work-dir", "out")
    between = server.ask("/seen")["requests"]
    launched(
        ["torch.distributed.run", "--nproc_per_node", "2"], tmp_path / "two" / "recipe.yaml", tmp_path / "two" / "out"
    )
    after = server.ask("/seen")["requests"]
    assert (between - before, after - between) == (24 + 1, 24 + 2)  # each asks for one text when it begins
    one, two = (load_file(tmp_path / name / "out" / "model.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
