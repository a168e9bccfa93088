"""On-policy distillation: who writes the texts, what is trained on them, and that the host does not notice."""

from __future__ import annotations

import doctest
import json
import shutil

import numpy as np
import pytest
import torch
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    GenerationConfig,
    Trainer,
)

import kdgraft_nlp.on_policy
from kdgraft import DistillError, Itself, Peer, WiringError
from kdgraft.cli import main
from kdgraft.losses import minillm, reverse_kl
from kdgraft.sources import Teacher
from kdgraft_nlp import DistillCollator, DistillTrainer, MiniLLM, OnPolicy, TeacherCache, distill
from kdgraft_nlp.pen import Pen, ends_of, prompts_of, up_to_end
from support import nlp as support
from support.on_policy_ranks import trained
from support.processes import found_by_two
from support.tensors import assert_same, draw

ALL = dict(share=1.0)


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# --- the share of the steps


@pytest.mark.parametrize("chunked", [False, 4])
def test_a_share_of_0_is_the_training_without_it(chunked, tmp_path):
    runs = [
        trained(
            tmp_path, told, model=support.model("gpt2", seed=1), family="gpt2", max_steps=3, more=dict(chunked=chunked)
        )
        for told in (None, dict(share=0.0))
    ]
    assert_same(*map(weights, runs))
    assert_same(*[run.batches[-1] for run in runs])
    assert logged(runs[0], "loss") == logged(runs[1], "loss") and logged(runs[1], "on_policy.fraction") == [0, 0, 0]


def test_the_steps_are_drawn_by_seed_and_step_alone():
    for seed in range(3):
        chosen = [OnPolicy(share=0.3).chooses(seed, step) for step in range(2000)]
        assert np.mean(chosen) == pytest.approx(0.3, abs=0.03)
        # A greater share adds steps and takes none away; numbers of texts are others than those of the choice.
        assert all(OnPolicy(share=0.6).chooses(seed, step) for step, one in enumerate(chosen) if one)
    first = [OnPolicy(share=0.3).numbers(0, step, 0)[0] < 0.3 for step in range(2000)]
    assert np.corrcoef(first, [OnPolicy(share=0.3).chooses(0, step) for step in range(2000)])[0, 1] < 0.1
    (example,) = doctest.DocTestFinder(recurse=False).find(OnPolicy, globs=vars(kdgraft_nlp.on_policy))
    assert doctest.DocTestRunner().run(example).failed == 0


def test_other_steps_see_the_batches_and_random_numbers_of_a_plain_run(tmp_path):
    dropout = dict(family="gpt2", max_steps=6, learning_rate=0.0, teacher=support.model("gpt2", seed=1))
    plain, mixed = (
        trained(tmp_path, told, model=support.model("gpt2", seed=1), **dropout) for told in (None, dict(share=0.5))
    )
    chosen = [mixed._writer.settings.chooses(1, step) for step in range(6)]
    assert 0 < sum(chosen) < 6 and logged(mixed, "on_policy.fraction") == chosen
    for step, one in enumerate(chosen):
        ours, theirs = mixed.batches[step], plain.batches[step]
        assert ("written" in ours) == one
        if not one:
            assert_same(ours, theirs)
            # With dropout, and a teacher that draws none: the divergence is the same only for the same masks.
            key = "distill.reverse_kl.loss"
            assert mixed.state.log_history[step][key] == plain.state.log_history[step][key]
    assert plain.state.log_history[0]["distill.reverse_kl.loss"] > 1e-4


# --- what is written


def test_a_share_of_1_trains_on_what_the_student_wrote(tmp_path):
    done = trained(tmp_path, ALL, max_steps=2)
    student = support.quiet(support.model("llama", seed=1)).eval()
    batch = done.batches[0]
    given = support.samples(8, "causal")
    for row in range(4):
        real = batch["attention_mask"][row].bool()
        ids, labels = batch["input_ids"][row][real], batch["labels"][row]
        assert bool(real[0]) and (real.int().diff() <= 0).all() and (labels[~real] == -100).all()
        prompt = int((labels != -100).int().argmax())
        assert prompt == 1 and ids[0] == 1  # the samples' first token has no label
        assert labels[real].tolist() == [-100, *ids[1:].tolist()]
        assert 1 <= len(ids) - 1 <= 6
        # Each token is the one at which the student's mass passes the text's own random number.
        place = [sample["input_ids"] for sample in given].index(given[row]["input_ids"])
        numbers = done._writer.settings.numbers(1, 0, place)
        with torch.no_grad():
            mass = student(ids[None]).logits[0].double().softmax(-1).cumsum(-1)
        for step, token in enumerate(ids[1:].tolist()):
            assert mass[step, token] > numbers[step] and (token == 0 or mass[step, token - 1] <= numbers[step])
    assert all("written" in one for one in done.batches)


def by_hand(student, teacher, prompt, numbers, mix, temperature=1.0, ends=()):
    """The continuation of one prompt, from whole passes without a cache."""
    ids = prompt.clone()
    for number in numbers:
        with torch.no_grad():
            q, p = (
                model(ids[None]).logits[0, -1].double().div(temperature).softmax(-1) for model in (student, teacher)
            )
        mass = ((1 - mix) * q + mix * p).cumsum(0)
        token = int((mass <= number * mass[-1]).sum())
        ids = torch.cat([ids, torch.tensor([token])])
        if token in ends:
            break
    return ids


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen"])
@pytest.mark.parametrize(("mix", "temperature"), [(0.0, 1.0), (0.2, 1.0), (0.9, 0.7)])
def test_prompts_of_any_length_are_continued_as_each_would_be_alone(family, mix, temperature):
    student, teacher = support.model(family, seed=1).eval(), support.model(family, 32, seed=2).eval()
    told = OnPolicy(max_new_tokens=5, mix=mix, temperature=temperature, eos_token_id=7)
    samples = support.samples(6, "causal")
    for place, sample in enumerate(samples):
        sample["labels"] = [-100] * (1 + place % 3) + sample["input_ids"][1 + place % 3 :]
    batch = support.collate(samples)
    numbers = [told.numbers(0, 0, row) for row in range(6)]
    pen = Pen(told, {"student": student, "teacher": teacher}, None, Teacher(teacher) if mix else None)
    found = pen.write(student, batch, numbers)
    for row, sample in enumerate(samples):
        prompt = torch.tensor(sample["input_ids"][: 1 + row % 3])
        expected = by_hand(student, teacher, prompt, numbers[row], mix, temperature, [7])
        assert found["input_ids"][row][found["attention_mask"][row].bool()].tolist() == expected.tolist()
        assert found["labels"][row][found["attention_mask"][row].bool()].tolist()[: len(prompt)] == [-100] * len(prompt)
    assert (found["written"].mix, found["written"].length) == (mix, (found["labels"] != -100).sum().item() / 6)


@pytest.mark.parametrize("mix", [0.0, 0.3])
def test_tokens_are_drawn_from_the_models_distribution(mix):
    student, teacher = support.model("llama", seed=1).eval(), support.model("llama", seed=2).eval()
    for model in (student, teacher):  # further from uniform
        model.lm_head.weight.data *= 5
    told = OnPolicy(max_new_tokens=1, mix=mix, prompt=2)
    pen = Pen(told, {"student": student}, None, Teacher(teacher) if mix else None)
    rows = 4000
    batch = {"input_ids": torch.tensor([[1, 9]]).expand(rows, 2)}
    drawn = pen.write(student, batch, [told.numbers(0, 0, row) for row in range(rows)])["labels"][:, -1]
    with torch.no_grad():
        q, p = (model(torch.tensor([[1, 9]])).logits[0, -1].softmax(-1) for model in (student, teacher))
    expected = (1 - mix) * q + mix * p
    distance = (drawn.bincount(minlength=support.VOCABULARY) / rows - expected).abs().sum()
    assert distance < 0.12 and (mix == 0 or (q - expected).abs().sum() > 0.3)


def test_the_most_probable_token_alone_is_greedy_generation():
    model = support.model("llama", seed=1).eval()
    ids = torch.tensor([[1, 9, 12]])
    greedy = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    for told in (dict(top_k=1), dict(top_p=1e-6)):
        settings = OnPolicy(max_new_tokens=5, eos_token_id=[], **told)
        pen = Pen(settings, {"student": model}, None, None)
        assert torch.equal(pen.write(model, {"input_ids": ids}, [settings.numbers(0, 0, 0)])["input_ids"], greedy)


@pytest.mark.parametrize("length", [dict(max_length=64), dict(max_new_tokens=3), dict(max_length=64, max_new_tokens=3)])
def test_how_a_model_generates_by_itself_does_not_matter(length):
    model, told = support.model("llama", seed=1).eval(), OnPolicy(max_new_tokens=9, eos_token_id=[])
    batch, numbers = {"input_ids": torch.tensor([[1, 9, 12], [1, 5, 7]])}, [told.numbers(0, 0, row) for row in range(2)]
    expected = Pen(told, {"student": model}, None, None).write(model, batch, numbers)["input_ids"]
    others = dict(do_sample=True, temperature=0.1, top_k=2, repetition_penalty=9.0, no_repeat_ngram_size=1, num_beams=2)
    model.generation_config = GenerationConfig(**length, **others, eos_token_id=2)
    assert torch.equal(Pen(told, {"student": model}, None, None).write(model, batch, numbers)["input_ids"], expected)


def test_what_a_model_cannot_read_is_never_written(tmp_path):
    # Vocabularies are padded differently, and the smaller model has no embedding for the entries beyond.
    teacher, student = support.model("llama", 32, seed=2, vocab_size=30), support.quiet(support.model("llama", seed=1))
    student.lm_head.weight.data[30:] = 9 * student.lm_head.weight.data[:10]
    tokenizer = support.by_word()
    for told in (ALL, dict(share=1.0, mix=0.5)):
        settings = dict(
            data=[dict(input_ids=[1, 9, 5], labels=[-100, 9, 5])] * 8, more=dict(processing_class=tokenizer)
        )
        done = trained(tmp_path, told, model=student, teacher=teacher, **settings)
        student = support.quiet(support.model("llama", seed=1))
        assert done.batches[0]["input_ids"].max() < 30


# --- prompts and ends


def test_prompts():
    ids = torch.tensor([[0, 0, 3, 4, 5, 6], [3, 4, 5, 6, 7, 0], [3, 4, 5, 0, 0, 0], [3, 4, 5, 6, 0, 0]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]])
    labels = torch.full_like(ids, -100)
    labels[0, 4:], labels[1, :], labels[2, 0] = 1, 1, 1
    batch = dict(input_ids=ids, attention_mask=mask, labels=labels)
    assert [p.tolist() for p in prompts_of(batch, 2)] == [[3, 4], [3, 4], [3, 4], [3, 4, 5, 6]]
    assert [p.tolist() for p in prompts_of(dict(input_ids=ids, attention_mask=mask), 4)] == [
        [3, 4, 5, 6],
        [3, 4, 5, 6],
        [3, 4, 5],
        [3, 4, 5, 6],
    ]
    assert [len(p) for p in prompts_of(dict(batch, position_ids=ids), 2)] == [2, 2, 2, 4]


def test_the_side_of_the_padding_does_not_matter(tmp_path):
    def left(features):
        batch = support.collate(features)
        for row, count in enumerate(batch["attention_mask"].sum(1).tolist()):
            for name in batch:
                batch[name][row] = batch[name][row].roll(-count)
        return batch

    right = trained(tmp_path, ALL, family="gpt2")
    moved = trained(tmp_path, ALL, family="gpt2", collator=left)
    assert_same(*[{k: v for k, v in run.batches[0].items() if k != "written"} for run in (right, moved)])
    assert_same(*map(weights, (right, moved)))


def test_texts_end_with_the_end_of_text(tmp_path):
    tokens = torch.tensor([5, 3, 9, 3])
    assert up_to_end(tokens, [3]).tolist() == [5, 3] and up_to_end(tokens, [9, 3]).tolist() == [5, 3]
    assert up_to_end(tokens, []).tolist() == up_to_end(tokens, [7]).tolist() == [5, 3, 9, 3]
    # Without any the model's own ends no text, and nothing that the library pads with has a label.
    endless = trained(tmp_path, dict(share=1.0, max_new_tokens=20, eos_token_id=[])).batches[0]
    assert (endless["labels"] != -100).sum(1).tolist() == [20] * 4 and (endless["labels"] == 2).any()
    ends = [4, 11, 17, 23, 29]
    batch = trained(tmp_path, dict(share=1.0, max_new_tokens=20, eos_token_id=ends)).batches[0]
    written = [row[row != -100].tolist() for row in batch["labels"]]
    ended = [row for row in written if row[-1] in ends]
    assert ended and not any(token in ends for row in written for token in row[:-1])
    assert all(len(row) == 20 for row in written if row not in ended)
    assert batch["written"].length == sum(map(len, written)) / 4


def test_the_end_of_text_is_the_tokenizer_s_or_the_model_s():
    model = support.model("llama")
    assert ends_of(OnPolicy(), model, None) == [model.generation_config.eos_token_id] == [2]
    model.generation_config.eos_token_id = [9, 2]
    assert ends_of(OnPolicy(), model, None) == [9, 2]
    tokenizer = support.by_word()
    assert tokenizer.eos_token is None
    assert ends_of(OnPolicy(), model, tokenizer) == [tokenizer.sep_token_id]  # as the data of recipe files end
    tokenizer.eos_token = "on"
    assert ends_of(OnPolicy(), model, tokenizer) == [tokenizer.eos_token_id, 9, 2]
    assert ends_of(OnPolicy(eos_token_id=5), model, tokenizer) == [5]
    assert ends_of(OnPolicy(eos_token_id=(5, 6)), model, tokenizer) == [5, 6]


def test_rows_without_a_token_are_left_out(tmp_path):
    def half(features):
        batch = support.collate(features)
        batch["attention_mask"][::2] = 0
        return batch

    done = trained(tmp_path, ALL, collator=half)
    assert len(done.batches[0]["input_ids"]) == 2 and logged(done, "distill.reverse_kl.loss")[0] > 0

    def none(features):
        batch = support.collate(features)
        return {**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])}

    done = trained(tmp_path, ALL, collator=none)
    assert logged(done, "loss") == [0.0] and logged(done, "grad_norm") == [0.0]


# --- what is trained


@pytest.mark.parametrize("chunked", [False, 4])
def test_the_loss_is_the_divergence_of_the_written_tokens_alone(chunked, tmp_path):
    done = trained(tmp_path, ALL, more=dict(chunked=chunked))
    batch = done.batches[0]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        student, teacher = (
            model.eval()(**inputs).logits[:, :-1][batch["labels"][:, 1:] != -100]
            for model in (support.model("llama", seed=1), support.model("llama", 32, seed=2))
        )
    expected = reverse_kl(student, teacher).item()
    entry = done.state.log_history[0]
    assert entry["loss"] == pytest.approx(expected, rel=1e-4) == entry["distill.reverse_kl.loss"]
    assert "task_loss" not in entry and entry["on_policy.fraction"] == 1
    assert entry["on_policy.length"] == batch["written"].length and entry["on_policy.seconds"] > 0


@pytest.mark.parametrize(("chunked", "smoothing"), [(False, 0.0), (4, 0.0), (False, 0.1)])  # chunks refuse smoothing
def test_the_host_s_own_loss_has_no_weight_on_written_texts(chunked, smoothing, tmp_path):
    terms = [dict(type="ReverseKL", weight=0.0)]
    settings = dict(terms=terms, max_steps=2, label_smoothing_factor=smoothing, more=dict(chunked=chunked))
    done = trained(tmp_path, ALL, **settings)
    assert_same(weights(done), support.quiet(support.model("llama", seed=1)).state_dict())
    plain = trained(tmp_path, None, **settings)
    assert not torch.equal(plain.model.lm_head.weight, done.model.lm_head.weight)


def test_in_the_other_steps_it_has(tmp_path):
    # Steps of the data set follow steps on written texts, and their losses are in the log by themselves.
    done = trained(tmp_path, dict(share=0.5), max_steps=6, logging_steps=6, learning_rate=0.0)
    plain = trained(tmp_path, None, max_steps=6, learning_rate=0.0)
    chosen = [done._writer.settings.chooses(1, step) for step in range(6)]
    hard = [value for value, one in zip(logged(plain, "task_loss"), chosen, strict=True) if not one]
    (entry,) = [entry for entry in done.state.log_history if "task_loss" in entry]
    assert entry["task_loss"] == pytest.approx(np.mean(hard), rel=1e-5)
    assert entry["on_policy.fraction"] == pytest.approx(np.mean(chosen))


def test_minillm_is_computed_text_by_text(tmp_path):
    done = trained(tmp_path, dict(share=1.0, mix=0.2), terms=["MiniLLM"])
    batch = done.batches[0]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    student = support.quiet(support.model("llama", seed=1))
    models = (student, support.model("llama", 32, seed=2).eval())
    logits = [model(**inputs).logits for model in models]
    total, count = torch.zeros(()), 0
    for row, labels in enumerate(batch["labels"]):
        place = (labels[1:] != -100).nonzero().flatten()
        both = logits[0][row, place], logits[1][row, place].detach()
        total = total + minillm(*both, labels[1:][place], torch.zeros_like(place), 0.2).sum()
        count += len(place)
    (total / count).backward()
    assert logged(done, "loss")[0] == pytest.approx(float(total.detach()) / count, rel=1e-4)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(done.found[name], parameter.grad, rtol=1e-3, atol=1e-6)


def test_minillm_on_texts_of_the_data_set_is_the_reverse_kl(tmp_path):
    ours, plain = (
        trained(tmp_path, dict(share=0.0), terms=[dict(type=kind, name="term")]) for kind in ("MiniLLM", "ReverseKL")
    )
    assert_same(*map(weights, (ours, plain)))


# --- how the steps are divided does not matter


def same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=2e-3, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("terms", [["MiniLLM", "HiddenStates"], ["GeneralizedJSD"]])
def test_accumulated_batches_are_one_batch(terms, tmp_path):
    runs = [
        trained(
            tmp_path,
            dict(share=1.0, mix=0.2),
            terms=terms,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
        )
        for size in (8, 4, 1)
    ]
    for run in runs[1:]:
        same(runs[0].found, run.found)
        for name in ("loss", "on_policy.fraction", "on_policy.length"):
            assert logged(run, name)[0] == pytest.approx(logged(runs[0], name)[0], rel=1e-4)


def test_two_processes_are_one(tmp_path):
    first, second = found_by_two("on_policy_ranks", tmp_path, str(tmp_path), host="transformers")
    alone = trained(tmp_path, dict(share=1.0, mix=0.2), terms=["MiniLLM"], per_device_train_batch_size=8)
    same(alone.found, first["gradient"])
    texts = [row[row != -100].tolist() for labels in (first["labels"], second["labels"]) for row in labels]
    assert texts == [row[row != -100].tolist() for row in alone.batches[0]["labels"]]
    for name in ("distill.mini_llm.loss", "on_policy.fraction", "on_policy.length"):
        assert first["log"][name] == pytest.approx(logged(alone, name)[0], rel=1e-4)


# --- seeds, resuming, and the host


def test_the_same_seed_gives_the_same_texts_and_another_others(tmp_path):
    one, same, other = (trained(tmp_path, dict(ALL, seed=seed)) for seed in (3, 3, 4))
    assert_same(*map(weights, (one, same)))
    assert not torch.equal(one.batches[0]["input_ids"][:, :2], other.batches[0]["input_ids"][:, :2])


@pytest.mark.parametrize("terms", [["ReverseKL", "HiddenStates"], ["MiniLLM"]])
def test_a_resumed_run_ends_bit_for_bit_alike(terms, tmp_path):
    settings = dict(terms=terms, max_steps=6, save_strategy="steps", save_steps=2, family="gpt2")

    def run(**more):
        return trained(
            tmp_path / "run", dict(share=0.5, mix=0.2), model=support.model("gpt2", seed=1), **settings, **more
        )

    whole = run()
    expected, chosen = weights(whole), [whole._writer.settings.chooses(1, step) for step in range(6)]
    assert {*chosen[:2]} | {*chosen[2:]} == {True, False} and any(chosen[2:])
    for step in (4, 6):
        shutil.rmtree(tmp_path / "run" / f"checkpoint-{step}")
    again = run(resume=True)
    assert len(again.batches) == 4
    assert_same(weights(again), expected)


def test_the_student_and_the_host_are_as_before(tmp_path):
    torch.manual_seed(5)
    expected = draw()
    student, told = support.model("gpt2", seed=1), OnPolicy(share=1.0, max_new_tokens=4, mix=0.2)
    trainer = DistillTrainer(
        model=student,
        teacher=support.model("gpt2", seed=2),
        terms=["MiniLLM"],
        args=support.arguments(tmp_path),
        train_dataset=support.samples(4, "causal"),
        data_collator=support.collate,
        on_policy=told,
    )
    before = json.dumps([student.config.to_dict(), student.generation_config.to_dict()], default=str)
    student.train()
    student.transformer.h[1].eval()
    modes = [module.training for module in student.modules()]
    torch.manual_seed(5)
    np.random.seed(5)
    batch = support.collate(support.samples(4, "causal"))
    given = {name: value.clone() for name, value in batch.items()}
    written = trainer.written(batch)
    assert_same(batch, given)
    assert draw()[0] == expected[0]
    assert [module.training for module in student.modules()] == modes
    assert json.dumps([student.config.to_dict(), student.generation_config.to_dict()], default=str) == before
    assert all(p.grad is None for p in student.parameters()) and not written["input_ids"].requires_grad
    trainer.train()
    greedy = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    plain = support.model("gpt2", seed=1)
    plain.load_state_dict(student.state_dict())
    ids = torch.tensor([[1, 9]])
    assert torch.equal(student.eval().generate(ids, **greedy), plain.eval().generate(ids, **greedy))
    assert not any(module._forward_hooks for module in student.modules())


def test_a_trainer_that_is_there_already_is_wrapped(tmp_path):
    trainer = Trainer(
        model=support.quiet(support.model("llama", seed=1)),
        args=support.arguments(tmp_path, max_steps=2),
        train_dataset=support.samples(8, "causal"),
        data_collator=support.collate,
    )
    distill(trainer, teacher=support.model("llama", seed=2), recipe="gkd", on_policy=dict(share=1.0, max_new_tokens=3))
    trainer.train()
    assert logged(trainer, "on_policy.fraction") == [1, 1] and "task_loss" not in trainer.state.log_history[0]


def test_a_student_with_adapters_writes_with_them(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    student = peft.get_peft_model(support.quiet(support.model("llama", seed=1)), config)
    done = trained(tmp_path, dict(ALL, eos_token_id=[]), model=student, learning_rate=0.0)
    text = done.batches[0]["input_ids"][0]
    numbers, merged = done._writer.settings.numbers(1, 0, 0), student.merge_and_unload().eval()
    assert by_hand(merged, merged, text[:1], numbers, 0.0).tolist() == text.tolist()


def test_the_moving_average_of_the_student_may_teach(tmp_path):
    done = trained(tmp_path, ALL, teacher=Itself(momentum=0.9), max_steps=2, learning_rate=0.1)
    assert len(logged(done, "distill.reverse_kl.loss")) == 2


# --- refused


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (dict(share=1.5), r"share must be in \[0, 1\], got 1.5"),
        (dict(share=True), r"share must be in \[0, 1\], got True"),
        (dict(mix=1.0), "mix must be below 1"),
        (dict(mix=-0.1), r"mix must be in \[0, 1\]"),
        (dict(max_new_tokens=0), "max_new_tokens must be a whole number >= 1, got 0"),
        (dict(prompt=2.5), "prompt must be a whole number >= 1"),
        (dict(temperature=0), "temperature must be a number > 0"),
        (dict(top_k=0), "top_k must be a whole number >= 1"),
        (dict(top_p=0), "top_p must be a number > 0"),
        (dict(top_p=1.5), r"top_p must be in \[0, 1\]"),
        (dict(seed=-1), "seed must be a whole number >= 0"),
        (dict(eos_token_id=["end"]), "eos_token_id must be a whole number"),
        (dict(mix=0.2, top_k=5), "mix draws from whole distributions"),
        (dict(shares=0.5), "on_policy takes no argument 'shares'; did you mean 'share'"),
        ("half", "on_policy is OnPolicy"),
    ],
)
def test_settings_that_make_no_sense(told, message, tmp_path):
    with pytest.raises(DistillError, match=message) as caught:
        DistillTrainer(
            model=support.model("llama"),
            teacher=support.model("llama"),
            terms=["ReverseKL"],
            args=support.arguments(tmp_path),
            on_policy=told,
        )
    assert "\n" not in str(caught.value)


def refused(tmp_path, message, on_policy=None, **settings):
    student = settings.pop("model", None) or support.model("llama")
    given = dict(teacher=support.model("llama", seed=2), terms=["ReverseKL"], args=support.arguments(tmp_path))
    given |= settings
    with pytest.raises(DistillError, match=message) as caught:
        DistillTrainer(model=student, on_policy={"max_new_tokens": 4, **(on_policy or {})}, **given)
    assert "\n" not in str(caught.value)
    assert not hasattr(student, "distill_link")  # it is plain again


def test_trainers_that_cannot(tmp_path):
    bert = dict(model=support.model("bert"), teacher=support.model("bert"), terms=["SoftTargets"])
    refused(tmp_path, "on_policy is for causal language models, and BertForSequenceClassification is none", **bert)
    refused(tmp_path, "nothing says what to learn", terms=None)
    refused(tmp_path, "nothing is compared on the student's texts", terms=[], teacher=None)
    auto = [dict(type="ReverseKL", weight="auto")]
    refused(
        tmp_path,
        "weight='auto', which compares with the host's own loss, and the student's texts have none",
        terms=auto,
    )
    peer = Peer(support.model("llama", seed=3))
    refused(tmp_path, "the peer 'teacher' trains on labels", teacher=peer)
    refused(tmp_path, "mix needs one frozen teacher", dict(mix=0.2), teacher=Itself(momentum=0.9))
    two = dict(a=support.model("llama", seed=2), b=support.model("llama", seed=3))
    both = [dict(type="ReverseKL", source=name) for name in two]
    refused(tmp_path, "mix needs one frozen teacher", dict(mix=0.2), teacher=None, teachers=two, terms=both)


def test_texts_that_do_not_fit(tmp_path):
    refused(
        tmp_path, r"prompt=8 and max_new_tokens=60 need 68 positions, and the student has 64", dict(max_new_tokens=60)
    )
    small = support.model("llama", seed=2, max_position_embeddings=10)
    refused(tmp_path, "need 12 positions, and the teacher has 10; lower max_new_tokens", teacher=small)
    with pytest.raises(
        DistillError, match="a prompt of 9 tokens leaves 1 of the teacher's 10 positions for max_new_tokens=2"
    ):
        trained(
            tmp_path,
            dict(share=1.0, max_new_tokens=2),
            teacher=small,
            data=[dict(input_ids=[5] * 9, labels=[-100] * 9)] * 8,
        )


def test_teachers_with_tokens_of_their_own(tmp_path):
    ours, theirs = support.by_word(), support.by_letter()
    collator = DistillCollator(DataCollatorWithPadding(ours), theirs, text="text")
    refused(tmp_path, "it has a tokenizer of its own", terms=["UniversalLogits"], data_collator=collator)
    cached = DistillCollator(support.collate, cache=TeacherCache(id="id"))
    refused(tmp_path, "a cache knows the texts of the data set alone", data_collator=cached)


@pytest.mark.parametrize(
    ("told", "settings", "message"),
    [
        (None, {}, "give the trainer on_policy=OnPolicy"),
        (dict(top_k=5), {}, "leave top_k and top_p out of on_policy"),
        (dict(temperature=0.5), {}, "here 1, there 0.5"),
        ({}, dict(temperature=2.0), "here 2, there 1"),
        ({}, dict(tokens="valid"), "leave tokens out"),
    ],
)
def test_minillm_where_it_has_no_meaning(told, settings, message, tmp_path):
    with pytest.raises(WiringError, match=message):
        DistillTrainer(
            model=support.model("llama"),
            teacher=support.model("llama"),
            terms=[dict(type="MiniLLM", **settings)],
            args=support.arguments(tmp_path),
            on_policy=told if told is None else {"max_new_tokens": 4, **told},
        )


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (dict(clip=0), "clip must be a number > 0"),
        (dict(long_term=1), "long_term"),
        (dict(standardize=True), "standardize"),
    ],
)
def test_settings_of_minillm(told, message):
    with pytest.raises(DistillError, match=message):
        MiniLLM(**told)


def test_batches_that_cannot_be_continued(tmp_path):
    def flattened(features):
        return DataCollatorWithFlattening(return_position_ids=True)(features)

    def with_images(features):
        return {**support.collate(features), "pixel_values": torch.zeros(4, 3, 2, 2)}

    with pytest.raises(DistillError, match="packed rows hold several"):
        trained(tmp_path, ALL, collator=flattened)
    with pytest.raises(DistillError, match="from tokens alone, and the batch has pixel_values"):
        trained(tmp_path, ALL, collator=with_images)
    with pytest.raises(DistillError, match="the batch has no input_ids but inputs_embeds"):
        trained(tmp_path, ALL, collator=lambda rows: {"inputs_embeds": torch.zeros(4, 3, 16)})


# --- recipe files


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file of text, and the folder of a teacher with its tokenizer."""
    folder = tmp_path_factory.mktemp("files")
    rows = [json.dumps({"text": f"one word {i} and a second word {i % 3}"}) for i in range(24)]
    (folder / "a.jsonl").write_text("\n".join(rows))
    sizes = "model_type: llama, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 16"
    (folder / "recipe.yaml").write_text(
        f"task: causal\ndata: {{train: {folder}/a.jsonl, eval: {folder}/a.jsonl, length: 16}}\ntokenizer: {{vocab_size: 60}}\n"
        f"student: {{{sizes}, max_position_embeddings: 32}}\n"
        "training: {use_cpu: true, max_steps: 2, save_strategy: 'no', logging_steps: 1, disable_tqdm: true}\n"
    )
    assert main(["train", str(folder / "recipe.yaml"), "--work-dir", str(folder / "teacher")]) == 0
    return folder


@pytest.mark.parametrize(
    ("recipe", "told"),
    [("gkd", "{share: 1.0, max_new_tokens: 8}"), ("minillm", "{share: 1.0, mix: 0.2, max_new_tokens: 8}")],
)
def test_recipe_files(recipe, told, files, tmp_path, capsys):
    options = [f"teacher={files}/teacher", f"recipe={recipe}", f"on_policy={told}"]
    path = str(files / "recipe.yaml")
    assert main(["check", path, "--cfg-options", *options]) == 0
    said = capsys.readouterr().out
    term = f"distill.{dict(gkd='generalized_jsd', minillm='mini_llm')[recipe]}"
    assert f"{term}.loss " in said and f"{term}.loss, on-policy " in said and "gradient share" in said
    assert main(["train", path, "--work-dir", str(tmp_path / "out"), "--cfg-options", *options]) == 0
    said = capsys.readouterr().out
    assert "'on_policy.fraction': '1'" in said and "perplexity" in said
    assert main(["test", path, str(tmp_path / "out"), "--cfg-options", *options]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["on_policy={share: 2}", "recipe=gkd"], r"on_policy: share must be in \[0, 1\], got 2"),
        (["on_policy={shares: 1}", "recipe=gkd"], "on_policy takes no argument 'shares'; did you mean 'share'"),
        (
            ["on_policy=half", "recipe=gkd"],
            "on_policy is a mapping, such as {share: 0.5, max_new_tokens: 64}; got 'half'",
        ),
        (["on_policy={share: 1}", "teacher=null"], "on_policy needs teacher"),
        (["on_policy={share: 1}", "task=masked", "student.model_type=bert"], "on_policy needs task: causal"),
        (
            ["on_policy={share: 1}", "recipe=gkd"],
            "prompt=8 and max_new_tokens=64 need 72 positions, and the student has 32",
        ),
    ],
)
def test_mistakes_in_recipe_files(options, message, files, capsys):
    assert main(["check", str(files / "recipe.yaml"), "--cfg-options", f"teacher={files}/teacher", *options]) == 2
    said = capsys.readouterr().err
    assert message.replace("\\", "") in said and len(said.strip().splitlines()) == 1


def test_language_models_on_blocks_of_text_have_a_prompt(tmp_path):
    tokenizer = support.by_word()
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    data = [dict(input_ids=[5, 6, 7, 8, 9, 10])] * 8
    batch = trained(
        tmp_path, dict(share=1.0, prompt=4), collator=collator, data=data, more=dict(processing_class=tokenizer)
    ).batches[0]
    assert batch["input_ids"][:, :4].tolist() == [[5, 6, 7, 8]] * 4 and (batch["labels"][:, :4] == -100).all()
    assert (batch["labels"][:, 4] != -100).all()
