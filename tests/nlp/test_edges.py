"""Where Trainer, tokenizers and attention meet awkwardly: each of these once went wrong."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from transformers import DataCollatorWithPadding, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer

import nlp_support as support
from taskdistill import DistillError, WiringError
from taskdistill_nlp import DistillCollator, DistillTrainer, distill
from taskdistill_nlp.chunked import Head, chunked_losses
from taskdistill_nlp.student import graft
from taskdistill_nlp.tasks import example
from taskdistill_nlp.tokens import carried_over, read_batch


def loss_of(student, batch):
    student(**batch)
    return torch.stack([v for k, v in student._distill.losses.items() if k.endswith(".loss")]).sum()


# --- two tokenizers


@pytest.mark.parametrize("align", ["position", "text"])
def test_universal_logits_across_tokenizers(align):
    ours = support.by_word()
    texts = ["the cat sat", "a dog", "the dog sat on the cat"]
    losses = []
    for side in ("left", "right"):
        collator = DistillCollator(DataCollatorWithPadding(ours), support.by_letter(side), text="text")
        batch = collator([{**ours(text), "text": text} for text in texts])
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batch["labels"][:, :2] = -100  # a prompt of one word
        student = support.model("llama", vocab_size=11, seed=1)
        teacher = support.model("llama", 32, vocab_size=28, seed=2)
        grafted = graft(
            student, teacher, [dict(type="UniversalLogits", align=align)], facts={"vocabulary": "different"}
        )
        losses.append(loss_of(support.quiet(grafted).train(), batch).detach())
        tokens = read_batch(batch, "causal").extra["tokens"]
        assert tokens.teacher.labelled.shape == batch["teacher_inputs"]["input_ids"].shape
    assert losses[0] > 0
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)


def test_labels_carried_over_by_hand():
    labelled = torch.tensor([[False, False, True, True, False]])
    pairs = torch.tensor([[[1, 2], [2, 5], [3, 7], [-1, -1]]])
    real = torch.tensor([[True] * 9 + [False]])
    # Up to token 4 the last paired one is the student's 1, which has no label; from 5 on it is 2, then 3.
    assert carried_over(labelled, pairs, real).tolist() == [[False] * 5 + [True] * 4 + [False]]
    assert carried_over(None, pairs, real) is None
    assert not carried_over(labelled, pairs[:, :0], real).any()


def test_a_decoder_with_other_tokens_needs_its_own_targets():
    batch = support.collate(support.samples(2, "seq2seq"))
    batch["teacher_inputs"] = {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 3)}
    student = graft(support.model("t5", seed=1), support.model("t5", 32, seed=2), ["HiddenStates"]).train()
    with pytest.raises(DistillError, match="teacher_decoder_input_ids or teacher_labels"):
        student(**batch)


def test_truncated_samples_are_paired():
    ours = support.by_word()
    text = "the cat sat on the dog"
    feature = {**ours(text, truncation=True, max_length=5), "text": text}
    batch = DistillCollator(DataCollatorWithPadding(ours), support.by_letter(), text="text")([feature])
    assert [tuple(pair) for pair in batch["token_pairs"][0].tolist()] == [(1, 2), (2, 6), (3, 10)]


def test_generation_in_the_evaluation(tmp_path):
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path),
        max_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        predict_with_generate=True,
        save_strategy="no",
    )
    data = [{**sample, "teacher_token_type_ids": torch.zeros(3)} for sample in support.samples(4, "seq2seq")]
    trainer = Seq2SeqTrainer(
        model=support.model("t5", seed=1),
        args=arguments,
        train_dataset=data,
        eval_dataset=data,
        data_collator=DistillCollator(support.collate),
        compute_metrics=lambda predicted: {"rows": float(len(predicted.predictions))},
    )
    distill(trainer, teacher=support.model("t5", 32, seed=2), terms=["ForwardKL"])
    trainer.args.remove_unused_columns = False
    trainer.train()
    assert trainer.evaluate(max_new_tokens=3)["eval_rows"] == 4


# --- attention


def gemma(seed, kinds, window=4):
    config = transformers.Gemma3TextConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        intermediate_size=32,
        vocab_size=40,
        sliding_window=window,
        layer_types=kinds,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    return support.quiet(transformers.Gemma3ForCausalLM(config))


def long_batch():
    ids = torch.randint(5, 40, (2, 12), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@pytest.mark.parametrize("of", ["scores", "distributions"])
def test_layers_with_windows_of_their_own(of):
    mixed = ["sliding_attention", "full_attention"]
    apart = []
    for layers in ([(0, 0)], [(1, 1)], [(0, 0), (1, 1)]):
        grafted = graft(gemma(1, mixed), gemma(2, mixed), [dict(type="AttentionMaps", of=of, layers=layers)]).train()
        apart.append(loss_of(grafted, long_batch()).detach())
    torch.testing.assert_close(apart[2], (apart[0] + apart[1]) / 2)


def test_keys_that_one_model_cannot_see_do_not_count():
    def mistral(seed, window):
        sizes = dict(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=32
        )
        torch.manual_seed(seed)
        return transformers.MistralForCausalLM(
            transformers.MistralConfig(**sizes, vocab_size=40, sliding_window=window)
        )

    term = dict(type="AttentionMaps", of="distributions", layers=[(0, 0)])
    one, other, both, neither = (
        loss_of(graft(mistral(1, ours), mistral(2, theirs), [term]).train(), long_batch()).detach()
        for ours, theirs in ((4, None), (None, 4), (4, 4), (None, None))
    )
    torch.testing.assert_close(one, both)
    torch.testing.assert_close(other, both)
    assert not torch.isclose(neither, both)


def test_towers_and_windows_are_told_apart():
    swin = transformers.SwinForImageClassification(
        transformers.SwinConfig(
            image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4
        )
    )
    with pytest.raises(WiringError, match="runs on windows"):
        graft(swin, copy.deepcopy(swin), [dict(type="AttentionMaps", layers=[(0, 0)])])
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=dict(
                hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=40
            ),
            vision_config=dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16),
        )
    )
    from taskdistill_nlp.attention import stacks

    assert [layer.path for layer in stacks(clip)["layers"]] == [
        "text_model.encoder.layers.0",
        "text_model.encoder.layers.1",
    ]


# --- chunks


def test_chunks_keep_small_gradients_in_half_precision():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 8, generator=generator).half().requires_grad_()
    weight = torch.randn(4096, 8, generator=generator).requires_grad_()
    targets = torch.tensor([1, 2, 3, 4])
    total, _ = chunked_losses(hidden, Head(weight, None), targets, torch.tensor(1 / 8192), None, None, [], 2)
    (total * 65536).backward()
    plain = weight.detach().clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(hidden.detach().float() @ plain.t(), targets, reduction="sum") / 8192
    (loss * 65536).backward()
    torch.testing.assert_close(weight.grad, plain.grad, rtol=0.05, atol=0.02)
    assert hidden.grad.isfinite().all()


def test_what_chunks_cannot_do_is_refused():
    config = transformers.Qwen2MoeConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        vocab_size=40,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
    )
    with pytest.raises(WiringError, match="adds something of its own"):
        graft(transformers.Qwen2MoeForCausalLM(config), support.model("llama", seed=2), ["ForwardKL"], chunk=4)
    with pytest.raises(DistillError, match="belongs to a distillation"):
        graft(support.model("llama"), None, [], chunk=4)


def test_chunks_beside_terms_on_layers_alone():
    student = graft(
        support.quiet(support.model("llama", seed=1)), support.model("llama", 32, seed=2), ["HiddenStates"], chunk=4
    )
    batch = support.collate(support.samples(4, "causal"))
    plain = support.quiet(support.model("llama", seed=1))
    torch.testing.assert_close(student.train()(**batch).loss, plain(**batch).loss, rtol=1e-5, atol=1e-6)


# --- the Trainer


def trainer_of(folder, kind=DistillTrainer, **settings):
    more = (
        dict(teacher=support.model("bert", 32, seed=2), terms=["SoftTargets", "HiddenStates"])
        if kind is DistillTrainer
        else {}
    )
    return kind(
        model=support.model("bert", seed=1),
        args=support.arguments(folder, **settings),
        train_dataset=support.samples(12),
        eval_dataset=support.samples(4),
        data_collator=support.collate,
        **more,
    )


def test_distilling_after_an_evaluation_in_mixed_precision(tmp_path):
    trainer = trainer_of(tmp_path, Trainer, bf16=True, bf16_full_eval=False)
    trainer.evaluate()
    distill(trainer, teacher=support.model("bert", 32, seed=2), terms=["HiddenStates"])
    trainer.train()
    assert any("distill.hidden_states.loss" in entry for entry in trainer.state.log_history)


def test_a_patched_forward_is_said(tmp_path):
    student = support.model("bert")
    student.forward = lambda **inputs: None
    with pytest.raises(DistillError, match="something has replaced the forward"):
        graft(student, support.model("bert", seed=2), ["SoftTargets"])


def test_figures_of_a_second_run_and_after_resuming(tmp_path):
    trainer = trainer_of(tmp_path, logging_steps=2, save_strategy="steps", save_steps=1, learning_rate=0.0)
    trainer.train()
    trainer.train()
    resumed = trainer_of(tmp_path, logging_steps=2, learning_rate=0.0)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for found in (trainer, resumed):
        entries = [entry for entry in found.state.log_history if "task_loss" in entry]
        for entry in entries if found is trainer else entries[-1:]:
            parts = [v for k, v in entry.items() if k.startswith("distill.") or k == "task_loss"]
            assert sum(parts) == pytest.approx(entry["loss"], rel=1e-3)


def test_a_copy_of_a_student_in_training(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    twin = copy.deepcopy(trainer.model)
    batch = support.collate(support.samples(2))
    twin.eval(), trainer.model.eval()
    assert torch.equal(twin(**batch).logits, trainer.model(**batch).logits)


def test_outputs_that_are_no_classes_are_refused():
    models = [support.model("bert", seed=s, num_labels=1) for s in (1, 2)]
    with pytest.raises(WiringError, match="a single output"):
        graft(*models, ["SoftTargets"])
    models = [support.model("bert", seed=s, problem_type="multi_label_classification") for s in (1, 2)]
    with pytest.raises(WiringError, match="multi_label_classification"):
        graft(*models, ["SoftTargets"])


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (
            "BartForSequenceClassification",
            dict(
                d_model=16,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=16,
                decoder_ffn_dim=16,
                vocab_size=40,
            ),
        ),
        ("T5ForSequenceClassification", dict(d_model=16, d_kv=8, num_layers=1, num_heads=2, d_ff=16, vocab_size=40)),
        ("GPT2ForSequenceClassification", dict(n_embd=16, n_layer=1, n_head=2, vocab_size=40)),
        ("ResNetForImageClassification", dict(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])),
    ],
)
def test_the_dry_run_is_made_for_awkward_models(kind, settings):
    cls = getattr(transformers, kind)
    model = cls(cls.config_class(**settings)).eval()
    with torch.no_grad():
        assert model(**example(model)).logits.ndim == 2


def test_images_cut_into_other_positions():
    with pytest.raises(WiringError, match="cut images into 5 and 17 positions"):
        graft(support.model("vit"), support.model("vit", patch_size=4), [dict(type="HiddenStates", layers="final")])


# --- recipe files


def test_a_share_of_the_data_keeps_all_classes(tmp_path):
    from taskdistill_nlp.run import build

    rows = [{"text": f"word {i}", "label": "rare" if i == 0 else "common"} for i in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    student = dict(model_type="bert", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config = dict(
        task="classification", data=dict(train=str(tmp_path / "a.jsonl"), fraction=0.1), tokenizer=dict(vocab_size=60)
    )
    trainer = build(dict(**config, student=student, output=str(tmp_path), training=dict(use_cpu=True)))
    assert len(trainer.train_dataset) == 2
    assert trainer.model.config.num_labels == 2
    with pytest.raises(DistillError, match="training: ") as caught:
        build(
            dict(
                **config,
                student=student,
                output=str(tmp_path),
                training=dict(load_best_model_at_end=True, eval_strategy="no"),
            )
        )
    assert "\n" not in str(caught.value)


def test_nothing_to_resume(tmp_path):
    from taskdistill_nlp.run import train

    rows = [{"text": f"word {i}", "label": i % 2} for i in range(8)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"task: classification\ndata: {{train: {tmp_path}/a.jsonl}}\ntokenizer: {{vocab_size: 60}}\ntraining: {{use_cpu: true}}\n"
        "student: {model_type: bert, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 16}\n"
    )
    with pytest.raises(DistillError, match="nothing to resume: there is no checkpoint"):
        train(recipe, work_dir=str(tmp_path / "out"), resume="auto")
    with pytest.raises(DistillError, match="is no checkpoint's folder"):
        train(recipe, work_dir=str(tmp_path / "out"), resume="nowhere")
