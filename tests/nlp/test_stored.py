"""Training from a store: what the running teacher gave, without the teacher."""

from __future__ import annotations

import copy
import json
from itertools import pairwise

import pytest
import torch
from datasets import Dataset
from transformers import DataCollatorForLanguageModeling, DataCollatorWithFlattening, Trainer

from kdgraft import DistillError, WiringError
from kdgraft.cli import main
from kdgraft_nlp import DistillTrainer, ForwardKL, Stored, distill, fill_store
from kdgraft_nlp.stored import texts_in
from kdgraft_nlp.student import graft
from support import nlp as support
from support.killing import assert_kills_change_nothing

CAUSAL = ["ForwardKL", dict(type="GeneralizedJSD", beta=0.5, weight=0.5), "HiddenStates"]
TERMS = {
    "llama": CAUSAL,
    "gpt2": ["ReverseKL", dict(type="SoftTargets", temperature=2.0)],
    "bert": ["SoftTargets", "HiddenStates"],
    "roberta": ["ForwardKL", "Embeddings"],
    "electra": ["SoftTargets", "PatientStates"],
    "vit": ["SoftTargets", "SampleEmbeddings"],
}


def student(family="llama"):
    return support.quiet(support.model(family, seed=1))


def teacher(family="llama"):
    width = 16 if family == "electra" else 32
    return support.model(family, width, 2 if family == "electra" else 4, seed=2)


def trainer_of(
    folder,
    given,
    terms,
    family="llama",
    data=None,
    collator=support.collate,
    kind=DistillTrainer,
    processing=None,
    **settings,
):
    task = support.TASKS[family][1]
    rows = support.samples(12, task) if data is None else data
    return kind(
        model=student(family),
        teacher=given,
        terms=terms,
        args=support.arguments(folder, **settings),
        train_dataset=rows,
        data_collator=collator,
        processing_class=None if processing is None else sized(processing),
    )


def sized(entries):
    """A tokenizer with so many entries."""
    found = support.by_letter()
    found.add_tokens([f"<{place}>" for place in range(entries - len(found))])
    return found


def filled(folder, terms, family="llama", **settings):
    trainer = trainer_of(folder / "filling", teacher(family), terms, family)
    return fill_store(trainer, folder / "store", progress=False, **settings)


def loss_of(given, terms, family="llama", batch=None, chunk=None):
    one = graft(student(family), given, copy.deepcopy(terms), chunk=chunk)
    batch = support.collate(support.samples(12, support.TASKS[family][1])[3:9]) if batch is None else batch
    one.train()(**batch)
    return {key: value.detach() for key, value in one.distill_link.last.losses.items() if key.endswith(".loss")}


@pytest.mark.parametrize("family", TERMS)
def test_losses_are_those_of_the_running_teacher(tmp_path, family):
    terms = TERMS[family]
    filled(tmp_path, terms, family, top_k=support.VOCABULARY, values="float32", per_part=5)
    running, stored = loss_of(teacher(family), terms, family), loss_of(Stored(tmp_path / "store"), terms, family)
    assert running.keys() == stored.keys()
    for key, value in running.items():
        assert value > 0
        torch.testing.assert_close(stored[key], value, rtol=2e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("chunk", [None, 3])
def test_the_loss_grows_with_k_to_that_of_the_running_teacher(tmp_path, chunk):
    terms = ["ForwardKL"]
    values = []
    for k in (1, 2, 5, 10, 20, 39, 40):
        filled(tmp_path / str(k), terms, top_k=k, values="float32")
        values.append(loss_of(Stored(tmp_path / str(k) / "store"), terms, chunk=chunk)["distill.forward_kl.loss"])
    whole = loss_of(teacher(), terms)["distill.forward_kl.loss"]
    assert all(fewer <= more + 1e-6 for fewer, more in pairwise(values))
    assert values[0] < 0.9 * whole
    torch.testing.assert_close(values[-1], whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("top_k", [10, None])
def test_chunks_and_whole_logits_agree(tmp_path, top_k):
    filled(tmp_path, ["ForwardKL"], top_k=top_k, values="float32")
    losses = [loss_of(Stored(tmp_path / "store"), ["ForwardKL"], chunk=chunk) for chunk in (None, 3)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-6)
    if top_k is None:
        torch.testing.assert_close(losses[0], loss_of(teacher(), ["ForwardKL"]), rtol=1e-4, atol=1e-6)


def test_packed_rows_find_their_texts(tmp_path):
    filled(tmp_path, ["ForwardKL", "HiddenStates"], values="float32")
    data = support.samples(12, "causal")[2:8]
    both = [support.collate(data), DataCollatorWithFlattening()(data[::-1])]
    found = []
    for batch in both:
        one = student()
        one.config.use_cache = False
        grafted = graft(one, Stored(tmp_path / "store"), ["ForwardKL", "HiddenStates"])
        torch.manual_seed(0)
        grafted.train()(**batch)
        found.append({k: v.detach() for k, v in grafted.distill_link.last.losses.items() if k.endswith(".loss")})
    torch.testing.assert_close(
        found[0]["distill.forward_kl.loss"], found[1]["distill.forward_kl.loss"], rtol=1e-4, atol=1e-6
    )


def test_training_is_that_with_the_teacher(tmp_path):
    filled(tmp_path, CAUSAL, top_k=support.VOCABULARY, values="float32")
    runs = []
    for given in (teacher(), Stored(tmp_path / "store")):
        trainer = trainer_of(tmp_path / "run", given, CAUSAL, optim="sgd", learning_rate=0.05)
        trainer.train()
        runs.append({name: p.detach() for name, p in trainer.model.named_parameters() if "distiller" not in name})
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_no_weights_of_the_teacher_are_in_memory(tmp_path):
    filled(tmp_path, ["ForwardKL"])
    source = Stored(tmp_path / "store")
    assert all(parameter.is_meta for parameter in source.model.parameters())
    trainer = trainer_of(tmp_path / "run", source, ["ForwardKL"], save_strategy="steps", save_steps=2)
    trainer.train()
    assert trainer.state.log_history[0]["distill.forward_kl.loss"] > 0
    again = trainer_of(tmp_path / "again", Stored(tmp_path / "store"), ["ForwardKL"])
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert all(torch.equal(p, q) for p, q in zip(trainer.model.parameters(), again.model.parameters(), strict=True))


def test_half_precision_has_the_error_that_is_stated(tmp_path):
    filled(tmp_path / "half", ["ForwardKL"], top_k=40)
    exact = loss_of(teacher(), ["ForwardKL"])["distill.forward_kl.loss"]
    half = loss_of(Stored(tmp_path / "half" / "store"), ["ForwardKL"])["distill.forward_kl.loss"]
    torch.testing.assert_close(half, exact, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize(("entries", "each"), [(1000, 204), (128_256, 254)])
def test_fifty_entries_take_less_than_300_bytes_a_token(tmp_path, entries, each):
    rows = support.samples(12, "causal", longest=60)
    trainer = DistillTrainer(
        model=support.model("llama", 8, 1, seed=1, vocab_size=entries),
        teacher=support.model("llama", 8, 1, seed=2, vocab_size=entries),
        terms=["ForwardKL"],
        args=support.arguments(tmp_path),
        train_dataset=rows,
        data_collator=support.collate,
    )
    store = fill_store(trainer, tmp_path / "store", progress=False)
    tokens = sum(len(row["input_ids"]) for row in rows)
    columns = [store.whole(0, f"[logits]/{name}") for name in ("ids", "logs", "norms", "rests")]
    assert sum(column.nbytes for column in columns) == each * tokens
    assert store.size() / tokens <= 300


def test_an_sft_trainer_learns_from_a_store(tmp_path):
    pytest.importorskip("trl")
    from support.sft import chats, first_batch, step
    from support.sft import teacher as taught
    from support.sft import trainer_of as sft

    running = sft(tmp_path)
    distill(running, teacher=taught(), terms=[ForwardKL()])
    batch = first_batch(running)
    expected = step(running, batch)[0]
    # A store is filled from whole logits: by a DistillTrainer on the same data set and collator.
    filling = DistillTrainer(
        model=student(),
        teacher=taught(),
        terms=["ForwardKL"],
        args=support.arguments(tmp_path / "filling", remove_unused_columns=False),
        train_dataset=running.train_dataset,
        data_collator=running.data_collator,
    )
    fill_store(filling, tmp_path / "store", top_k=40, values="float32", progress=False)
    stored = sft(tmp_path, chats())
    distill(stored, teacher=Stored(tmp_path / "store"), terms=[ForwardKL()])
    torch.testing.assert_close(step(stored, batch)[0], expected, rtol=1e-4, atol=1e-5)
    stored.train()
    assert stored.state.log_history[0]["distill.forward_kl.loss"] > 0


REFUSED = {
    "other data": (
        ["ForwardKL"],
        "no stored output of sample with the tokens .* was filled from other data, or by another tokenizer",
    ),
    "another term": (["HiddenStates"], r"has \[logits\] of the teacher, not 'model\..*'; fill it with the terms"),
    "attention": (["AttentionMaps"], "reads attention .* whose maps are too large for a store"),
    "temperature": ([dict(type="SoftTargets", temperature=3.0)], "known at temperature 1, not at 3"),
    "whole classes": (
        ["LogitMatching"],
        "logit_matching compares all classes one by one, and the store has the largest",
    ),
    "permuted": (["DKPP"], "dkpp compares all classes one by one"),
    "standardised": ([dict(type="SoftTargets", standardize=True)], "compares all classes one by one"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_store_does_not_have_is_refused(tmp_path, name):
    filled(tmp_path, ["ForwardKL"], top_k=10)
    terms, said = REFUSED[name]
    batch = support.collate(support.samples(4, "causal", seed=5 if name == "other data" else 0))
    with pytest.raises((WiringError, DistillError), match=said):
        loss_of(Stored(tmp_path / "store"), terms, batch=batch)


def test_what_cannot_be_stored_is_refused(tmp_path):
    for terms, given, said in (
        (["AttentionMaps"], teacher(), "whose maps are too large for a store"),
        (["ForwardKL"], None, "a store holds the outputs of one frozen teacher"),
    ):
        settings = dict(teacher=given) if given is not None else dict(teachers=dict(a=teacher(), b=teacher()))
        terms = terms if given is not None else [dict(type="ForwardKL", source=s, name=s) for s in "ab"]
        trainer = DistillTrainer(
            model=student(),
            terms=terms,
            args=support.arguments(tmp_path),
            train_dataset=support.samples(4, "causal"),
            data_collator=support.collate,
            **settings,
        )
        with pytest.raises((WiringError, DistillError), match=said):
            fill_store(trainer, tmp_path / "store", progress=False)
    with pytest.raises(DistillError, match="a store is filled from whole logits; leave out chunked"):
        fill_store(
            DistillTrainer(
                model=student(),
                teacher=teacher(),
                terms=["ForwardKL"],
                chunked=True,
                args=support.arguments(tmp_path),
                train_dataset=support.samples(4, "causal"),
                data_collator=support.collate,
            ),
            tmp_path / "store",
        )


# From recipe files.


def recipe(folder, **told):
    words = ["the cat sat", "a dog on the cat", "the dog sat on a cat", "cat on dog", "a cat"]
    rows = [{"text": " ".join(words[(i + j) % 5] for j in range(1 + i % 3))} for i in range(40)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    support.model("llama", 32, 2, seed=2).save_pretrained(folder / "teacher")
    support.by_word().save_pretrained(folder / "teacher")
    support.by_word().save_pretrained(folder / "tokenizer")
    entries = {
        "task": "causal",
        "data": {"train": "train.jsonl", "length": 16, "joined": False},
        "tokenizer": "tokenizer",
        "student": {
            "model_type": "llama",
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "vocab_size": 40,
        },
        "teacher": "teacher",
        "recipe": "gkd",
        "training": {
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "report_to": [],
            "use_cpu": True,
        },
        "output": "out",
        **told,
    }
    (folder / "recipe.json.yaml").write_text(json.dumps(entries))
    return "recipe.json.yaml"


def test_from_a_recipe_file(tmp_path, monkeypatch, capfd):
    path = recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["cache", path, "--out", "store", "--top-k", "8"]) == 0
    said = capfd.readouterr().out
    assert "texts and" in said and "bytes a token" in said
    stored = json.dumps({"type": "Stored", "folder": "store"})
    assert main(["train", path, "--cfg-options", f"teacher={stored}"]) == 0
    assert "distill.generalized_jsd.loss" in capfd.readouterr().out
    # Another tokenizer reads other tokens.
    support.by_letter().save_pretrained(tmp_path / "letters")
    assert main(["train", path, "--cfg-options", f"teacher={stored}", "tokenizer=letters"]) == 2
    assert "was filled with another tokenizer" in capfd.readouterr().err
    for told, message in (
        ("0", "must be a whole number >= 1"),
        ("some", "--top-k must be a whole number >= 1, or 'all'"),
    ):
        assert main(["cache", path, "--out", "other", "--top-k", told]) == 2
        assert message in capfd.readouterr().err
    assert main(["cache", path, "--out", "store", "--top-k", "9"]) == 2
    assert "has a store of something else (taps differ)" in capfd.readouterr().err


SCRIPT = """
from kdgraft_nlp import filling
filling.PER_PART = 2
filling.fill_store.__kwdefaults__["per_part"] = 2
from kdgraft.cli import main
sys.exit(main(["cache", "recipe.json.yaml", "--out", sys.argv[1]]))
"""


@pytest.mark.slow
def test_ten_kills_leave_the_same_store_byte_for_byte(tmp_path):
    recipe(tmp_path)
    assert_kills_change_nothing(SCRIPT, tmp_path)


def test_the_store_of_a_data_set_of_datasets(tmp_path):
    rows = Dataset.from_list(support.samples(12, "causal"))
    trainer = trainer_of(tmp_path, teacher(), ["ForwardKL"], data=rows)
    fill_store(trainer, tmp_path / "store", progress=False)
    assert loss_of(Stored(tmp_path / "store"), ["ForwardKL"])["distill.forward_kl.loss"] > 0


# What a reviewer found.


def test_padding_on_the_left_changes_no_loss(tmp_path):
    """Not even where the first token of a text has a label, which only padding could predict."""
    tokenizer = support.by_letter("left")
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in ("a cat", "the dog sat", "on", "a cow and a hen")]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = trainer_of(tmp_path, teacher(), ["ForwardKL"], data=rows, collator=collator)
    fill_store(trainer, tmp_path / "store", top_k=40, values="float32", progress=False)
    losses = []
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = collator(rows)
        for given, chunk in ((teacher(), None), (Stored(tmp_path / "store"), None), (Stored(tmp_path / "store"), 3)):
            losses.append(loss_of(given, ["ForwardKL"], batch=batch, chunk=chunk)["distill.forward_kl.loss"])
    for loss in losses:
        torch.testing.assert_close(loss, losses[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("marks", [dict(), dict(return_seq_idx=True), dict(return_flash_attn_kwargs=True)])
def test_rows_that_are_packed_anew_find_their_texts(tmp_path, marks):
    rows, collator = support.samples(12, "causal"), DataCollatorWithFlattening(**marks)
    fill_store(
        trainer_of(tmp_path, teacher(), ["ForwardKL"], collator=collator, data=rows), tmp_path / "s", progress=False
    )
    one = student()
    one.config.use_cache = False
    grafted = graft(one, Stored(tmp_path / "s"), ["ForwardKL"]).train()
    grafted(**collator(rows[7:3:-1]))
    assert grafted.distill_link.last.losses["distill.forward_kl.loss"] > 0


def test_a_larger_vocabulary_of_the_teacher_is_cut_to_the_student_s(tmp_path):
    large = support.model("llama", 32, 2, seed=2, vocab_size=48)
    facts = dict(facts={"vocabulary_checked": 40})
    trainer = trainer_of(tmp_path, large, ["ForwardKL"], processing=support.VOCABULARY)
    fill_store(trainer, tmp_path / "store", top_k=40, values="float32", progress=False)
    batch = support.collate(support.samples(4, "causal"))
    losses = []
    for given in (large, Stored(tmp_path / "store")):
        one = graft(student(), given, ["ForwardKL"], **facts)
        one.train()(**batch)
        losses.append(one.distill_link.last.losses["distill.forward_kl.loss"].detach())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-6)


def test_a_store_is_the_only_source_under_any_name(tmp_path):
    filled(tmp_path, ["ForwardKL"])
    one = graft(student(), None, [dict(type="ForwardKL", source="a")], teachers=dict(a=Stored(tmp_path / "store")))
    one.train()(**support.collate(support.samples(4, "causal")))
    assert one.distill_link.last.losses["distill.forward_kl.loss"] > 0
    both = dict(a=Stored(tmp_path / "store"), b=teacher())
    with pytest.raises(DistillError, match="'a' is stored, which stands for one teacher; leave out other sources"):
        graft(student(), None, [dict(type="ForwardKL", source=s, name=s) for s in "ab"], teachers=both)
    with pytest.raises(DistillError, match="folder must be that of a store, got 5"):
        Stored(5)


def test_inputs_that_are_drawn_anew_are_refused(tmp_path):
    collator = DataCollatorForLanguageModeling(support.by_word(), mlm=True)
    rows = [{"input_ids": [1, 5, 6, 7, 8, 9, 2] * 3} for _ in range(4)]
    trainer = trainer_of(tmp_path, teacher("roberta"), ["ForwardKL"], "roberta", data=rows, collator=collator)
    with pytest.raises(DistillError, match="the inputs are drawn anew each time"):
        fill_store(trainer, tmp_path / "store", progress=False)


def test_another_data_set_is_not_taken_for_the_same(tmp_path):
    sets = [[[1, 5], [6, 7, 8, 9]], [[1, 5, 6], [7, 8, 9]], [[1, 5], [6, 7, 8, 10]]]
    for kind in (list, Dataset.from_list):
        folder = tmp_path / kind.__name__
        for place, ids in enumerate(sets):
            trainer = trainer_of(
                tmp_path, teacher(), ["ForwardKL"], data=kind([{"input_ids": row, "labels": row} for row in ids])
            )
            if place == 0:
                fill_store(trainer, folder, progress=False)
            else:
                with pytest.raises(DistillError, match=r"has a store of something else \(data differ\)"):
                    fill_store(trainer, folder, progress=False)


def test_numbers_beyond_half_precision_are_refused(tmp_path):
    loud = teacher()
    with torch.no_grad():
        loud.model.embed_tokens.weight.mul_(1e7)
    trainer = trainer_of(tmp_path, loud, [dict(type="Embeddings")])
    with pytest.raises(DistillError, match="exceed those of float16; take values='float32'"):
        fill_store(trainer, tmp_path / "store", progress=False)
    assert fill_store(trainer, tmp_path / "wide", values="float32", progress=False).missing() == []


def test_tokens_of_two_tokenizers_are_refused_where_places_are_compared(tmp_path):
    filled(tmp_path, ["ForwardKL"], top_k=10)
    batch = support.collate(support.samples(4, "causal"))
    pairs = torch.arange(batch["input_ids"].shape[1]).expand(4, -1)
    batch["token_pairs"] = torch.stack([pairs, pairs], -1)
    for given, chunk in ((Stored(tmp_path / "store"), None), (teacher(), 3)):
        with pytest.raises(DistillError, match="token by token, and the batch has those of two tokenizers"):
            loss_of(given, ["ForwardKL"], batch=batch, chunk=chunk)


def test_inputs_of_no_text_are_refused():
    inputs = {"input_ids": torch.ones(2, 3, dtype=torch.long), "pixel_values": torch.rand(8, 4)}
    with pytest.raises(DistillError, match="pixel_values cannot be told apart by texts"):
        texts_in(inputs)
    assert len(texts_in({"pixel_values": torch.rand(2, 3, 4, 4).bfloat16()})[0]) == 2


def test_what_is_no_trainer_of_a_teacher_is_refused(tmp_path):
    plain = Trainer(student(), support.arguments(tmp_path), train_dataset=support.samples(4, "causal"))
    with pytest.raises(DistillError, match="nothing is read of a teacher"):
        fill_store(plain, tmp_path / "store")
    with pytest.raises(DistillError, match="a data set without samples"):
        fill_store(trainer_of(tmp_path, teacher(), ["ForwardKL"], data=[]), tmp_path / "store")
