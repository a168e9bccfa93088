"""LayerDrop: a pair whose layer does not run takes no part in that step."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers

from kdgraft import WiringError
from kdgraft_nlp import DistillTrainer
from kdgraft_nlp.student import graft
from kdgraft_nlp.tokens import read_batch
from support import nlp as support
from support.tensors import gradients

TERMS = {
    "hidden": dict(type="HiddenStates", layers="last", adapter="none"),
    "patient": dict(type="PatientStates", layers="last"),
    "scores": dict(type="AttentionMaps", layers="last"),
    "relations": dict(type="Relations", layers="last", of=("query", "value")),
    "embeddings": dict(type="Embeddings", adapter="none"),
}


def speech(kind="Wav2Vec2", seed=1, layers=3, **settings):
    sizes = dict(
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8, 8),
        conv_stride=(4, 2),
        conv_kernel=(8, 4),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        num_labels=3,
        classifier_proj_size=8,
        mask_time_prob=0.0,
        mask_feature_prob=0.0,
        layerdrop=0.1,
        **dict.fromkeys(
            ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "final_dropout"), 0.0
        ),
    )
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **settings})
    return getattr(transformers, f"{kind}ForSequenceClassification")(config)


def bart(seed=1, layers=3, **settings):
    config = transformers.BartConfig(
        d_model=16,
        encoder_layers=layers,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        vocab_size=support.VOCABULARY,
        max_position_embeddings=64,
        dropout=0.0,
        encoder_layerdrop=0.1,
        **settings,
    )
    torch.manual_seed(seed)
    return transformers.BartForConditionalGeneration(config)


def sound(count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"input_values": torch.randn(count, 200, generator=generator), "labels": torch.arange(count) % 3}


@pytest.fixture
def left_out(monkeypatch):
    """Decides which layers the next pass leaves out, instead of chance."""
    script: list[bool] = []
    draw = torch.rand

    def rand(*size, **settings):
        if size == ([],) and script:
            return torch.tensor(0.0 if script.pop(0) else 1.0)
        return draw(*size, **settings)

    monkeypatch.setattr(torch, "rand", rand)
    return lambda layers, gone: script.extend(layer in gone for layer in range(layers))


def heard(model, batch, layers):
    """Of a plain model, in order: each layer's input and output, and its queries and values as ``(B, H, L, d)``."""
    found = []
    for layer in layers:
        parts = {}
        attention = layer.attention if hasattr(layer, "attention") else layer.self_attn
        hooks = [
            layer.register_forward_pre_hook(lambda _, args, p=parts: p.update(given=args[0])),
            layer.register_forward_hook(
                lambda _, args, out, p=parts: p.update(output=out[0] if isinstance(out, tuple) else out)
            ),
            *(
                getattr(attention, f"{name}_proj").register_forward_hook(
                    lambda _, args, out, p=parts, n=name: p.update({n: out.unflatten(-1, (2, -1)).transpose(1, 2)})
                )
                for name in "qkv"
            ),
        ]
        found.append((parts, hooks))
    with torch.no_grad():
        model.eval()(**batch)
    for _, hooks in found:
        for hook in hooks:
            hook.remove()
    return [parts for parts, _ in found]


def by_hand(name, student, teacher, batch, gone):
    """Sum and number of items of the pairs (0, 1), (1, 2), (2, 3) whose layer ran; no padding."""
    student = copy.deepcopy(student)
    layers = student.wav2vec2.encoder.layers
    kept = [k for k in range(len(layers)) if k not in gone]
    student.wav2vec2.encoder.layers = torch.nn.ModuleList(layers[k] for k in kept)
    ours = dict(zip(kept, heard(student, batch, student.wav2vec2.encoder.layers), strict=True))
    theirs = heard(teacher, batch, teacher.wav2vec2.encoder.layers)
    total, count = 0.0, 0
    for k in kept:
        s, t = ours[k], theirs[k + 1]
        if name == "embeddings":
            if k:
                continue
            items = (s["given"] - theirs[0]["given"]).square().mean((1, 2))
        elif name == "hidden":
            items = (s["output"] - t["output"]).square().mean((1, 2))
        elif name == "patient":
            first = [F.normalize(x["output"][:, 0], dim=-1) for x in (s, t)]
            items = (first[0] - first[1]).square().sum(-1)
        elif name == "scores":
            maps = [x["q"] @ x["k"].transpose(-1, -2) / 8**0.5 for x in (s, t)]
            items = (maps[0] - maps[1]).square().mean((1, 2, 3))
        else:
            items = 0.0
            for kind in "qv":
                related = [(x[kind] @ x[kind].transpose(-1, -2) / 8**0.5).log_softmax(-1) for x in (s, t)]
                items = items + F.kl_div(related[0], related[1], log_target=True, reduction="none").sum(-1).mean((1, 2))
        total, count = total + items.sum(), count + len(items)
    return total, count


@pytest.mark.parametrize("gone", [(), (1,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("name", TERMS)
def test_layers_that_ran_by_hand(name, gone, left_out):
    student, teacher, batch = speech(), speech(seed=2, layers=4).eval(), sound()
    total, count = by_hand(name, student, teacher, {"input_values": batch["input_values"]}, gone)
    student = graft(student, teacher, [TERMS[name]], dry_run=batch).train()
    left_out(3, gone)
    loss = support.loss_of(student, batch)
    torch.testing.assert_close(loss.detach(), torch.as_tensor(total / max(count, 1)), rtol=1e-4, atol=1e-6)
    if count:
        loss.backward()
        assert gradients(student)
    assert not any(student.distiller.dropped.values())
    assert student.distiller.counts(read_batch(batch, "other")) == {}  # only the pass can tell


@pytest.mark.parametrize("gone", [(1,), (0, 1, 2)])
def test_adapters_of_layers_that_did_not_run_stay_in_the_graph(gone, left_out):
    student = graft(speech(), speech(seed=2), ["HiddenStates"], dry_run=sound()).train()
    left_out(3, gone)
    support.loss_of(student, sound()).backward()
    gradients = [
        [p.grad for p in adapter.parameters()] for adapter in student.distiller.terms["hidden_states"].adapters
    ]
    for layer, found in enumerate(gradients):
        assert all(g is not None for g in found)
        assert bool(found[0].any()) == (layer not in gone)


@pytest.mark.parametrize("name", ["hidden", "scores", "relations", "patient"])
def test_processes_that_leave_out_other_layers_are_one(name, left_out, monkeypatch):
    """Two processes, each with its own samples and its own layers left out: all items that were seen weigh alike."""
    student, teacher = speech(), speech(seed=2, layers=4).eval()
    batches, gone = (sound(3, seed=1), sound(2, seed=2)), ((0,), (0, 1, 2))
    hand = [
        by_hand(name, student, teacher, {"input_values": batch["input_values"]}, out)
        for batch, out in zip(batches, gone, strict=True)
    ]
    expected = sum(total for total, _ in hand) / sum(count for _, count in hand)
    student = graft(student, teacher, [TERMS[name]], dry_run=batches[0]).train()
    sums = []

    def keep(values):
        sums.append(values.clone())
        return values

    monkeypatch.setattr("kdgraft.step.sum_over_ranks", keep)
    for batch, out in zip(batches, gone, strict=True):
        left_out(3, out)
        student(**batch)
    whole = sums[0] + sums[1]
    monkeypatch.setattr("kdgraft.step.sum_over_ranks", lambda values: whole)
    monkeypatch.setattr("kdgraft.step.world_size", lambda: 2)
    parts = []
    for batch, out in zip(batches, gone, strict=True):
        left_out(3, out)
        parts.append(support.loss_of(student, batch).detach())
    torch.testing.assert_close(torch.stack(parts).mean(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("build", [speech, lambda **s: speech("Hubert", **s), bart], ids=["wav2vec2", "hubert", "bart"])
def test_training_goes_on(build, tmp_path):
    seq2seq = build is bart
    data = (
        support.samples(8, "seq2seq", longest=5)
        if seq2seq
        else [{"input_values": x, "labels": int(y)} for x, y in zip(*sound(8).values(), strict=True)]
    )
    student, teacher = build(seed=1), build(seed=2)
    for model in (student, teacher):
        for module in model.modules():
            if hasattr(module, "layerdrop"):
                module.layerdrop = 0.5
        model.config.layerdrop = 0.5
    trainer = DistillTrainer(
        model=student,
        teacher=teacher,
        dry_run=None if seq2seq else sound(2),
        terms=["HiddenStates", "AttentionMaps", "Relations"],
        args=support.arguments(tmp_path, max_steps=12, per_device_train_batch_size=2),
        train_dataset=data,
        data_collator=support.collate,
    )
    trainer.train()
    logged = [entry["distill.hidden_states.loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 12 and all(value == value for value in logged) and max(logged) > 0


def test_a_layer_that_never_runs_without_layerdrop_is_an_error():
    student = graft(speech(layerdrop=0.0), speech(seed=2), [TERMS["hidden"]], dry_run=sound()).train()
    assert student.distiller.counts(read_batch(sound(), "other"))
    student.wav2vec2.encoder.forward = lambda states, *args, **settings: transformers.modeling_outputs.BaseModelOutput(
        states
    )
    with pytest.raises(WiringError, match="never fired"):
        student(**sound())


def test_taps_on_layers_that_are_left_out_are_refused():
    for tap in ("wav2vec2.encoder.layers.1", "wav2vec2.encoder.layers[1]", "wav2vec2.encoder.layers.1.feed_forward"):
        with pytest.raises(WiringError, match=r"hint: LayerDrop skips the layer of tap .* use HiddenStates"):
            graft(speech(), speech(seed=2), [dict(type="Hint", tap=tap)], dry_run=sound())
    for tap in ("wav2vec2.feature_extractor.conv_layers.1", "wav2vec2.feature_projection[0]"):
        term = dict(type="Hint", tap=tap, adapter="none")
        assert graft(speech(), speech(seed=2), [term], dry_run=sound()).distiller.rows
    built = graft(bart(), bart(seed=2), [dict(type="Hint", tap="model.decoder.layers.0", adapter="none")])
    assert built.distiller.rows  # it is the encoder that leaves layers out
