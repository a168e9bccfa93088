"""Attention under fast kernels: what is captured is what an eager model computes."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers.modeling_utils import AttentionInterface

from kdgraft import WiringError
from kdgraft.taps import Tap
from kdgraft_nlp.attention import AttentionCall, AttentionRecorder, attention_call, layer_pairs, stacks
from kdgraft_nlp.student import graft
from kdgraft_nlp.tasks import example, task_of
from support import nlp as support

FAMILIES = list(support.TASKS)


def record(model: nn.Module, **inputs):
    layers = [layer for stack in stacks(model).values() for layer in stack]
    taps = [Tap.parse(f"{layer.attention}.attention()") for layer in layers]
    recorder = AttentionRecorder(model, taps)
    with recorder.record(model) as recording:
        output = model(**inputs)
    return output, [attention_call(recording, tap) for tap in taps]


def padded_example(model: nn.Module):
    inputs = example(model)
    if "attention_mask" in inputs:
        inputs["attention_mask"][1, 3:] = 0
    return inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_scores_are_the_eager_models(family, monkeypatch):
    fast = support.model(family).eval()
    eager = support.model(family).eval()
    if family != "deberta":  # has but one way to attend
        assert fast.config._attn_implementation == "sdpa"
        eager.set_attn_implementation("eager")
    inputs = padded_example(fast)
    seen: list[torch.Tensor] = []
    softmax = nn.functional.softmax
    monkeypatch.setattr(nn.functional, "softmax", lambda x, *a, **k: (seen.append(x), softmax(x, *a, **k))[1])
    with torch.no_grad():
        eager(**inputs)
        monkeypatch.undo()
        plain = fast(**inputs)
        output, calls = record(fast, **inputs)
    assert torch.equal(output.logits, plain.logits)
    assert len(calls) == len(seen) >= 2
    # The eager model masks before its softmax; in its order of layers, which for two stacks is ours, cross last.
    order = calls if family != "t5" else [calls[i] for i in (0, 1, 2, 4, 3, 5)]
    for call, scores in zip(order, seen, strict=True):
        allowed = call.allowed()
        mask = torch.ones_like(scores, dtype=torch.bool) if allowed is None else allowed.expand_as(scores)
        mask = mask & (scores > -1e30)
        assert mask.any()
        torch.testing.assert_close(call.scores()[mask], scores[mask], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_reaches_the_student(family):
    model = support.model(family).train()
    _, calls = record(model, **padded_example(model))
    sum(call.scores().square().mean() for call in calls).backward()
    first = stacks(model)[next(iter(stacks(model)))][0].attention
    grads = [p.grad for p in model.get_submodule(first).parameters() if p.grad is not None]
    assert grads and any(g.abs().sum() > 0 for g in grads)


@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "deberta"])
def test_dropout_of_the_student_does_not_reach_the_maps(family):
    model = support.quiet(support.model(family)).eval()
    for module in model.modules():  # of the attention probabilities alone
        for name in ("dropout", "attn_dropout"):
            if "ttention" in type(module).__name__ and isinstance(getattr(module, name, None), nn.Dropout):
                getattr(module, name).p = 0.9
    first = next(iter(stacks(model).values()))[0].attention
    taps = [Tap.parse(f"{first}.attention()")]
    maps = []
    for training in (False, True):
        model.train(training)
        with torch.no_grad(), AttentionRecorder(model, taps).record(model) as recording:
            model(**padded_example(model))
        maps.append(attention_call(recording, taps[0]).scores())
    assert torch.equal(*maps)


def test_nothing_is_left_behind():
    look_up = AttentionInterface.get_interface
    model = support.model("bert").eval()
    names = [set(vars(module)) for module in model.modules()]
    with torch.no_grad():
        record(model, **example(model))
    assert AttentionInterface.get_interface is look_up
    assert names == [set(vars(module)) for module in model.modules()]
    model = support.model("deberta").eval()
    names = [set(vars(module)) for module in model.modules()]
    with torch.no_grad():
        record(model, **example(model))
    assert names == [set(vars(module)) for module in model.modules()]


def test_two_models_are_heard_apart():
    one, two = support.model("bert", seed=1).eval(), support.model("bert", seed=2).eval()
    tap = Tap.parse("bert.encoder.layer.0.attention.self.attention()")
    with torch.no_grad(), AttentionRecorder(one, [tap]).record(one) as first:
        two(**example(two))
        with AttentionRecorder(two, [tap]).record(two) as second:
            one(**example(one))
            two(**example(two))
    assert first.calls(tap) == 1 and second.calls(tap) == 1
    assert not torch.equal(attention_call(first, tap).scores(), attention_call(second, tap).scores())


def test_teacher_stops_behind_the_last_tap():
    model = support.model("bert", layers=4).eval()
    recorder = AttentionRecorder(model, [Tap.parse("bert.encoder.layer.1.attention.self.attention()")], "teacher")
    recorder.rehearse(model, lambda: model(**example(model)))
    ran = []
    model.bert.encoder.layer[2].register_forward_hook(lambda *_: ran.append(2))
    recording = recorder.record_prefix(model, lambda: model(**example(model)))
    assert recording.calls(recorder.taps[0]) == 1
    assert not ran


def test_shared_layers_are_refused():
    from transformers import AlbertConfig, AlbertForSequenceClassification

    config = AlbertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=32,
        vocab_size=40,
        embedding_size=8,
    )
    model = AlbertForSequenceClassification(config).eval()
    with pytest.raises(WiringError, match=r"layers share this attention, and its scores are not those of one layer"):
        record(model, **example(model))


def test_a_tap_on_something_else_says_what_can_be_heard():
    model = support.model("bert")
    with pytest.raises(WiringError, match=r"BertSelfOutput at .* is not an attention module.*these can: bert\.encoder"):
        AttentionRecorder(model, [Tap.parse("bert.encoder.layer.0.attention.output.attention()")], "student")
    with pytest.raises(WiringError, match=r"has no module .bert\.layer\.0."):
        AttentionRecorder(model, [Tap.parse("bert.layer.0.attention()")], "student")


def test_scores_by_hand():
    query = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])  # two heads, one query
    key = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])  # one group of keys for both, two keys
    call = AttentionCall(query, key, key, None, 0.5, None, False, None)
    assert call.scores().tolist() == [[[[0.5, 1.0]], [[1.5, 2.0]]]]
    assert call._replace(bias=torch.ones(1, 2, 1, 2)).scores().tolist() == [[[[1.5, 2.0]], [[2.5, 3.0]]]]
    capped = call._replace(softcap=2.0).scores()
    torch.testing.assert_close(capped, 2 * torch.tanh(torch.tensor([[[[0.5, 1.0]], [[1.5, 2.0]]]]) / 2))
    assert call.vectors("query").tolist() == [[[1, 2, 3, 4]]]
    assert call.allowed() is None
    square = call._replace(query=key, causal=True)
    assert square.allowed().tolist() == [[True, False], [True, True]]
    mask = torch.tensor([[[[0.0, torch.finfo(torch.float32).min]]]])
    assert call._replace(mask=mask).allowed().tolist() == [[[[True, False]]]]


@pytest.mark.parametrize(
    ("spec", "students", "teachers", "pairs"),
    [
        ("uniform", 2, 4, [(0, 1), (1, 3)]),
        ("uniform", 3, 4, [(0, 1), (1, 2), (2, 3)]),
        ("uniform", 4, 12, [(0, 2), (1, 5), (2, 8), (3, 11)]),  # TinyBERT's 4 of BERT's 12
        ("last", 2, 4, [(0, 2), (1, 3)]),
        ("skip", 6, 12, [(0, 1), (1, 3), (2, 5), (3, 7), (4, 9)]),  # PKD-Skip: layers 2, 4, 6, 8, 10
        ("final", 2, 4, [(1, 3)]),
        ([(0, -1), (-1, 0)], 2, 4, [(0, 3), (1, 0)]),
    ],
)
def test_layer_pairs(spec, students, teachers, pairs):
    assert layer_pairs(spec, students, teachers, "term") == pairs


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("first", "layers must be 'uniform', 'last', 'skip', 'final' or pairs"),
        ([(0, 4)], "the teacher has layers 0 to 1, got 4"),
        ([], "layers must be the name of a rule or pairs"),
        ([0, 1], "layers must be the name of a rule or pairs"),
        ("uniform", "needs a teacher at least as deep as the student, got 2 and 3"),
    ],
)
def test_wrong_layers(spec, message):
    with pytest.raises(WiringError, match=message):
        layer_pairs(spec, 3, 2, "term")


def test_skip_of_one_layer():
    with pytest.raises(WiringError, match="leaves out the final layer"):
        layer_pairs("skip", 1, 4, "term")


@pytest.mark.parametrize("family", FAMILIES)
def test_tasks(family):
    assert task_of(support.model(family)) == support.TASKS[family][1]


def test_stacks():
    assert list(stacks(support.model("t5"))) == ["encoder", "decoder", "cross"]
    assert [layer.path for layer in stacks(support.model("gpt2"))["layers"]] == ["transformer.h.0", "transformer.h.1"]
    assert stacks(nn.Linear(2, 2)) == {}


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
        apart.append(support.loss_of(grafted, long_batch()).detach())
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
        support.loss_of(graft(mistral(1, ours), mistral(2, theirs), [term]).train(), long_batch()).detach()
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
    assert [layer.path for layer in stacks(clip)["layers"]] == [
        "text_model.encoder.layers.0",
        "text_model.encoder.layers.1",
    ]


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("extra", [{}, dict(bias=True), dict(softcap=2.0)])
def test_scores_averaged_in_one_product(groups, extra):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query, key = draw(2, 6, 5, 4), draw(2, groups, 7, 4)
    bias = draw(1, 6, 5, 7) if "bias" in extra else None
    call = AttentionCall(query, key, key, None, 0.5, bias, False, extra.get("softcap"))
    torch.testing.assert_close(call.mean_scores(), call.scores().mean(1, keepdim=True))
    low = call._replace(query=query.bfloat16(), key=key.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert low.mean_scores().dtype is (torch.float64 if bias is not None else torch.float32)
