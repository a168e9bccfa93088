"""Recipe files of language models on prompts and answers, on chats, on packed texts, and with adapters."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from kdgraft import DistillError
from kdgraft.cli import main
from kdgraft_nlp.chats import encode_chats
from kdgraft_nlp.run import build
from support import nlp as support

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)
FORGETFUL = "{{ messages[-1]['content'] }}"


def tokenizer(template=TEMPLATE):
    found = support.by_letter("right")
    found.eos_token = "<pad>"
    found.chat_template = template
    return found


def text(own, ids):
    return own.decode(ids).replace(" ", "")


def rows(**columns):
    return Dataset.from_dict(columns)


USER, REPLY = {"role": "user", "content": "who"}, {"role": "assistant", "content": "me"}


def test_the_answer_to_a_text_has_labels():
    own = tokenizer()
    found = encode_chats(rows(p=["what is it", "who"], c=["a cat", "me"]), own, ["p", "c"], 64)
    for row, prompt, answer in zip(found, ["whatisit", "who"], ["acat", "me"], strict=True):
        labelled = [token for token in row["labels"] if token != -100]
        assert labelled == row["input_ids"][-len(labelled) :] and labelled[-1] == own.eos_token_id
        assert text(own, labelled[:-1]) == answer
        assert text(own, row["input_ids"][: -len(labelled)]) == prompt


def test_the_assistant_s_turns_have_labels():
    own = tokenizer()
    messages = [USER, REPLY, {"role": "user", "content": "and"}, {"role": "assistant", "content": "you"}]
    (row,) = encode_chats(rows(m=[messages]), own, ["m"], 64)
    assert text(own, row["input_ids"]) == "userwhoassistantmeuseranduserassistantyou".replace("anduser", "and")
    assert text(own, [token for token in row["labels"] if token != -100]) == "meyou"
    (pair,) = encode_chats(rows(p=[messages[:3]], c=[messages[3:]]), own, ["p", "c"], 64)
    assert pair["input_ids"] == row["input_ids"]
    assert text(own, [token for token in pair["labels"] if token != -100]) == "you"


def test_samples_without_an_answer_are_left_out():
    own = tokenizer()
    found = encode_chats(rows(p=["a" * 20, "who"], c=["it", "me"]), own, ["p", "c"], 10)
    assert len(found) == 1 and text(own, found[0]["input_ids"][:3]) == "who"
    with pytest.raises(DistillError, match=r"no sample of p and c has an answer within 2 tokens; raise data\.length"):
        encode_chats(rows(p=["aaa"], c=["it"]), own, ["p", "c"], 2)


@pytest.mark.parametrize(
    ("columns", "template", "said"),
    [
        (dict(m=[[USER, REPLY]]), None, "messages need a tokenizer with a chat template"),
        (dict(m=[[USER, REPLY]]), FORGETFUL, "sample 0 of 'm': the chat template changes what came before an answer"),
        (dict(m=["who"]), TEMPLATE, "sample 0 of 'm' must be a list of messages"),
        (dict(p=["who"], c=[[REPLY]]), TEMPLATE, "sample 0 of 'p' and 'c' must be two texts, or two lists of messages"),
    ],
)
def test_what_is_no_chat_is_refused(columns, template, said):
    with pytest.raises(DistillError, match=said):
        encode_chats(rows(**columns), tokenizer(template), list(columns), 64)


def recipe(folder, data, lines, **told):
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = tokenizer()
    for name, width, seed in (("teacher", 32, 2), ("base", 16, 1)):
        support.model("llama", width, 2, seed=seed).save_pretrained(folder / name)
        own.save_pretrained(folder / name)
    entries = {
        "task": "causal",
        "data": {"train": "train.jsonl", "eval": "train.jsonl", "length": 48, **data},
        "tokenizer": "teacher",
        "student": "base",
        "teacher": "teacher",
        "terms": ["ForwardKL"],
        "training": dict(max_steps=3, per_device_train_batch_size=4, logging_steps=1, report_to=[], use_cpu=True),
        "output": "out",
        **told,
    }
    (folder / "recipe.yaml").write_text(json.dumps(entries))
    return entries


ANSWERS = [{"prompt": f"what is a {word}", "completion": f"it is {word}"} for word in ("cat", "dog", "cow", "hen")] * 2
CHATS = [{"messages": [{**USER, "content": f"who is {i}"}, REPLY]} for i in "abcdefgh"]
TEXTS = [{"text": "the cat sat on a mat " * (1 + i % 3)} for i in range(8)]
DATA = {
    "answers": (dict(prompt="prompt", completion="completion"), ANSWERS),
    "chats": (dict(messages="messages"), CHATS),
    "packed": (dict(packed=True), TEXTS),
    "packed answers": (dict(prompt="prompt", completion="completion", packed=True), ANSWERS),
}


@pytest.mark.parametrize("name", DATA)
def test_a_recipe_trains_on_it(tmp_path, monkeypatch, capfd, name):
    data, lines = DATA[name]
    recipe(tmp_path, data, lines)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "recipe.yaml"]) == 0
    said = capfd.readouterr().out
    assert "distill.forward_kl.loss" in said and "perplexity" in said


@pytest.mark.parametrize("name", ["answers", "texts"])
def test_a_recipe_has_weights_of_texts(tmp_path, monkeypatch, capfd, name):
    data, lines = (dict(text="text", joined=False), TEXTS) if name == "texts" else DATA[name]
    weighed = [{**line, "quality": [0.5, 2.0, 0.0][i % 3]} for i, line in enumerate(lines)]
    if name == "answers":
        weighed.insert(
            0, dict(prompt="what is it " * 20, completion="cat", quality=9.0)
        )  # left out: its answer is cut off
    config = recipe(tmp_path, {**data, "weights": "quality"}, weighed)
    monkeypatch.chdir(tmp_path)
    trainer = build(config)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    assert [row.max() for row in batch["token_weights"]] == [0.5, 2.0, 0.0]
    assert main(["train", "recipe.yaml"]) == 0
    said = capfd.readouterr().out
    assert "distill.forward_kl.loss" in said and "perplexity" in said


def test_packed_rows_have_the_losses_of_padded_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    losses = []
    for packed in (False, True):
        config = recipe(tmp_path, dict(prompt="prompt", completion="completion", packed=packed), ANSWERS)
        trainer = build(config)
        batch = next(iter(trainer.get_train_dataloader()))
        assert ("attention_mask" in batch) != packed and (len(batch["input_ids"]) == 1) == packed
        trainer.state.epoch, trainer.current_gradient_accumulation_steps = 0.0, 1
        trainer.model.config.use_cache = False
        loss = trainer.compute_loss(trainer.model.train(), dict(batch)).detach()
        losses.append((loss, trainer.model.distill_link.last.losses["distill.forward_kl.loss"].detach()))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("teacher", ["base", "teacher"])
def test_adapters_of_a_recipe(tmp_path, monkeypatch, capfd, teacher):
    pytest.importorskip("peft")
    data, lines = DATA["answers"]
    told = dict(adapters=dict(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    if teacher == "base":  # a folder of this name is there too: with adapters the word means the student's own
        told["student"] = "student"
    recipe(tmp_path, data, lines, teacher=teacher, **told)
    support.model("llama", 16, 2, seed=1).save_pretrained(tmp_path / "student")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "recipe.yaml"]) == 0
    assert "distill.forward_kl.loss" in capfd.readouterr().out
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "out" / "model.safetensors").is_file()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert any("lora_" in name for name, _ in loaded.named_parameters())
    assert main(["test", "recipe.yaml", "out"]) == 0, capfd.readouterr().err
    assert "perplexity" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(data=dict(train="train.jsonl", prompt="prompt")), "data names either messages, or prompt and completion"),
        (
            dict(data=dict(train="train.jsonl", messages="messages", text="text")),
            "data.text means nothing beside prompts",
        ),
        (
            dict(data=dict(train="train.jsonl", messages="chats")),
            "has no column 'chats' but messages; name it with data.messages",
        ),
        (dict(data=dict(train="train.jsonl", packed=True, joined=True)), "data.packed keeps texts apart"),
        (dict(task="masked", data=dict(train="train.jsonl", packed=True)), "data.packed is for language models"),
        (
            dict(data=dict(train="train.jsonl", messages="messages", weights="much")),
            "no column 'much' but messages; name it",
        ),
        (dict(data=dict(train="train.jsonl", weights="much")), "data.weights are those of texts that stay apart"),
        (dict(task="masked", data=dict(train="train.jsonl", weights="much")), "data.weights is for language models"),
        (dict(adapters={}, student=dict(model_type="llama")), "adapters are added to a trained model"),
        (dict(adapters=dict(type="Lora")), "peft has no config 'Lora'"),
        (dict(adapters=dict(rank=3)), "adapters: TypeError"),
        (dict(teacher="base_of_student"), "teacher"),
    ],
)
def test_mistakes_are_said(tmp_path, monkeypatch, changes, said):
    pytest.importorskip("peft")
    config = {**recipe(tmp_path, dict(messages="messages"), CHATS), **changes}
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DistillError, match=said):
        build(config)


def test_models_that_read_across_packed_texts_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = recipe(tmp_path, dict(packed=True), TEXTS)
    config["student"] = dict(
        model_type="opt",
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=16,
        word_embed_proj_dim=16,
        vocab_size=40,
    )
    with pytest.raises(DistillError, match="the student, a OPTForCausalLM, reads across the texts of a packed row"):
        build(config)


def test_messages_that_the_template_cannot_write_are_said():
    with pytest.raises(DistillError, match="the chat template cannot write these messages"):
        encode_chats(rows(m=[[{"role": "user", "content": None}, REPLY]]), tokenizer(), ["m"], 64)


def test_a_prompt_begins_as_the_tokenizer_begins_a_text():
    own = support.by_word("right")
    own.bos_token, own.eos_token = "[CLS]", "[SEP]"
    (row,) = encode_chats(rows(p=["the cat"], c=["sat"]), own, ["p", "c"], 16)
    assert row["input_ids"] == own("the cat sat")["input_ids"] and row["labels"][:3] == [-100] * 3
