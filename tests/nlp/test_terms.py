"""The terms on real models: what they count, padding, layers, wrong models."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import transformers

from kdgraft import DistillError, WiringError
from kdgraft_nlp.student import graft
from kdgraft_nlp.tasks import example
from kdgraft_nlp.tokens import read_batch
from support import nlp as support
from support.tensors import gradients

GENERAL = {
    "soft": dict(type="SoftTargets"),
    "scores": dict(type="AttentionMaps"),
    "distributions": dict(type="AttentionMaps", of="distributions"),
    "averaged": dict(type="AttentionMaps", heads="averaged", layers="final"),
    "averaged_distributions": dict(type="AttentionMaps", heads="averaged", of="distributions"),
    "relations": dict(type="Relations", layers="last"),
    "minilm": dict(type="Relations", of=("attention", "value")),
    "hidden": dict(type="HiddenStates"),
    "cosine": dict(type="HiddenStates", loss="cosine", layers="last"),
    "normalized": dict(type="HiddenStates", loss="normalized"),
    "embeddings": dict(type="Embeddings"),
    "patient": dict(type="PatientStates", layers="last"),
}
LANGUAGE = {
    "forward": dict(type="ForwardKL"),
    "reverse": dict(type="ReverseKL"),
    "jsd": dict(type="GeneralizedJSD"),
    "skewed": dict(type="SkewedKL"),
    "skewed_reverse": dict(type="SkewedKL", reverse=True),
    "uld": dict(type="UniversalLogits"),
    "valid": dict(type="SoftTargets", tokens="valid"),
    "labelled": dict(type="SoftTargets", tokens="labelled"),
    "dskd": dict(type="DSKD"),
}
CASES = [
    (family, name)
    for family in support.TASKS
    for name in (GENERAL | LANGUAGE if support.TASKS[family][1] in ("masked", "causal", "seq2seq") else GENERAL)
]


def sample(every: int, families=tuple(support.TASKS)):
    """Pairs of a family and a term; by default each family with one term in ``every``, each time others, the rest in the slow tier."""
    names = [*GENERAL, *LANGUAGE]
    return [
        pytest.param(
            family,
            name,
            marks=[pytest.mark.slow] * ((list(families).index(family) + names.index(name)) % every > 0),
        )
        for family, name in CASES
        if family in families
    ]


STACKS = [(stack, name) for stack in ("decoder", "cross") for name in ("scores", "distributions")] + [
    ("decoder", name) for name in ("relations", "hidden", "patient", "embeddings")
]


def pair(family, terms, kind="", **settings):
    student = support.quiet(support.model(family, 16, 2, 4, seed=1, kind=kind))
    teacher = support.model(family, 32, 4, 4, seed=2, kind=kind)
    return graft(student, teacher, terms, **settings).train()


def step(student, batch):
    """The distillation loss and its gradient, alone."""
    student.zero_grad()
    student(**batch)
    link = student.distill_link
    loss = torch.stack([value for key, value in link.last.losses.items() if key.endswith(".loss")]).sum()
    loss.backward()
    assert not any(key.endswith("dropped") for key in link.last.losses)
    return loss.detach(), gradients(student)


def close(one, other):
    torch.testing.assert_close(one[0], other[0], rtol=1e-4, atol=1e-6)
    for name in one[1].keys() | other[1].keys():
        a, b = (g[1].get(name, torch.zeros(())) for g in (one, other))
        torch.testing.assert_close(
            a, b.expand_as(a) if b.ndim == 0 else b, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(("family", "name"), sample(3))
def test_padding_changes_nothing_and_counts_are_known_ahead(family, name):
    spec = (GENERAL | LANGUAGE)[name]
    if family == "vit" and name == "scores":
        spec = dict(spec)
    student = pair(family, [spec])
    task = support.TASKS[family][1]
    data = support.samples(6, task)
    batch = support.collate(data)
    first = step(student, batch)
    assert first[0] > 0 and first[0].isfinite()
    assert any(g.abs().sum() > 0 for g in first[1].values())
    if task != "image":
        close(first, step(student, support.collate(data, extra=5)))
    # The count from the batch alone is the denominator of the pass: with it as the total nothing changes.
    counts = student.distiller.counts(read_batch(batch, task))
    assert counts, "every term knows its count before the pass"
    student.distill_link.totals = counts
    close(first, step(student, batch))
    student.distill_link.totals = {key: 2 * value for key, value in counts.items()}
    torch.testing.assert_close(step(student, batch)[0], first[0] / 2)


@pytest.mark.parametrize(("stack", "name"), STACKS)
def test_stacks_of_two_stack_models(stack, name):
    student = pair("t5", [{**GENERAL[name], "stack": stack}])
    data = support.samples(6, "seq2seq")
    first = step(student, support.collate(data))
    assert first[0] > 0
    assert all(
        f"{'decoder' if stack != 'encoder' else 'encoder'}.block" in row.student_tap for row in student.distiller.rows
    )
    close(first, step(student, support.collate(data, extra=3)))
    student.distill_link.totals = student.distiller.counts(read_batch(support.collate(data), "seq2seq"))
    close(first, step(student, support.collate(data)))


@pytest.mark.parametrize(("family", "name"), sample(2, ("bert", "llama", "t5", "vit")))
def test_samples_one_by_one_add_up_to_the_batch(family, name):
    student = pair(family, [(GENERAL | LANGUAGE)[name]])
    task = support.TASKS[family][1]
    data = support.samples(5, task)
    whole = step(student, support.collate(data))
    student.distill_link.totals = student.distiller.counts(read_batch(support.collate(data), task))
    parts = [step(student, support.collate([sample])) for sample in data]
    names = whole[1]
    total = (sum(p[0] for p in parts), {n: sum(p[1].get(n, 0 * names[n]) for p in parts) for n in names})
    close(whole, total)


def test_question_answering():
    kind = "BertForQuestionAnswering"
    student = pair("bert", [dict(type="SoftTargets", temperature=3.0)], kind=kind)
    data = support.samples(5, "question")
    first = step(student, support.collate(data))
    assert first[0] > 0
    close(first, step(student, support.collate(data, extra=4)))
    # By hand, one question: the mean over start and end of 9·KL over the real positions.
    batch = support.collate(data[:1])
    with torch.no_grad():
        teacher = student.distiller.teacher.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        own = student.plain_forward(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    parts = []
    for field in ("start_logits", "end_logits"):
        p, q = (F.log_softmax(out[field][0] / 3, -1) for out in (teacher, own))
        parts.append(9 * (p.exp() * (p - q)).sum())
    torch.testing.assert_close(step(student, batch)[0], sum(parts) / 2, rtol=1e-4, atol=1e-6)


def test_relations_and_averaged_maps_take_other_heads():
    student = support.model("bert", 16, 2, 2, seed=1)
    teacher = support.model("bert", 24, 2, 4, seed=2)
    terms = [
        dict(type="Relations"),
        dict(type="AttentionMaps", heads="averaged"),
        dict(type="Relations", heads=8, name="eight"),
    ]
    grafted = graft(student, teacher, terms).train()
    assert step(grafted, support.collate(support.samples()))[0] > 0


def test_distribution_of_averaged_heads_by_hand():
    student = pair("bert", [dict(type="AttentionMaps", heads="averaged", of="distributions", layers="final")])
    batch = support.collate(support.samples(1))
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    eager = copy.deepcopy(student.distiller.teacher.model)
    eager.set_attn_implementation("eager")
    plain = support.quiet(support.model("bert", 16, 2, 4, seed=1)).eval()
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        t = eager(**inputs, output_attentions=True).attentions[-1].mean(1)
        s = plain(**inputs, output_attentions=True).attentions[-1].mean(1)
    expected = (t * (t.log() - s.log())).sum(-1).mean()
    torch.testing.assert_close(step(student, batch)[0], expected, rtol=1e-4, atol=1e-6)


def test_a_causal_model_predicts_the_next_token():
    student = pair("gpt2", [dict(type="ForwardKL")])
    batch = support.collate(support.samples(2, "causal"))
    batch["labels"][:] = -100
    batch["labels"][0, 2] = 7  # predicted by the logits at position 1
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        teacher = student.distiller.teacher.model(**inputs).logits[0, 1].log_softmax(-1)
        own = student.plain_forward(**inputs).logits[0, 1].log_softmax(-1)
    expected = (teacher.exp() * (teacher - own)).sum()
    torch.testing.assert_close(step(student, batch)[0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [*GENERAL, *LANGUAGE])
def test_all_masked_is_zero_with_a_live_graph(name):
    student = pair("llama", [(GENERAL | LANGUAGE)[name]])
    batch = support.collate(support.samples(2, "causal"))
    batch["labels"][:] = -100
    batch["attention_mask"][:] = 0
    loss, gradient = step(student, batch)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradient.values())
    if name not in ("patient", "valid", "soft"):
        assert loss == 0


@pytest.mark.parametrize("name", [*GENERAL, "jsd", "uld"])
def test_computed_in_float32_under_autocast(name):
    student = pair("llama", [(GENERAL | LANGUAGE)[name]])
    batch = support.collate(support.samples(4, "causal"))
    exact = step(student, batch)
    student.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        student(**batch)
    for loss in (value for key, value in student.distill_link.last.losses.items() if key.endswith(".loss")):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.detach(), exact[0], rtol=0.15, atol=0.02)
        loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())


def test_class_names_are_compared_by_name():
    names = [{0: "sun", 1: "rain", 2: "snow"}, {0: "rain", 1: "snow", 2: "sun"}]
    student = support.quiet(support.model("bert", seed=1, id2label=names[0]))
    teacher = support.model("bert", seed=2, id2label=names[1])
    straight = support.model("bert", seed=2)
    grafted = graft(student, teacher, [dict(type="SoftTargets", temperature=2)]).train()
    batch = support.collate(support.samples(4))
    loss, _ = step(grafted, batch)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        t = straight.eval()(**inputs).logits[:, [2, 0, 1]]
        s = grafted.plain_forward(**inputs).logits
    expected = 4 * F.kl_div((s / 2).log_softmax(-1), (t / 2).log_softmax(-1), log_target=True, reduction="batchmean")
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(WiringError, match=r"other classes: it lacks \['hail'\]"):
        graft(support.model("bert", id2label={0: "sun", 1: "rain", 2: "hail"}), teacher, ["SoftTargets"])
    # Terms on layers do not ask for the same classes.
    graft(support.model("bert", id2label={0: "a", 1: "b"}, num_labels=2), teacher, ["HiddenStates"])


def test_vocabularies():
    def models(sizes):
        return (support.model("llama", vocab_size=size, seed=size) for size in sizes)

    with pytest.raises(WiringError, match=r"48 and 40 entries.*processing_class=tokenizer.*UniversalLogits"):
        graft(*models((48, 40)), ["ForwardKL"])
    with pytest.raises(WiringError, match="the tokenizer has 44 entries, the smaller model 40"):
        graft(*models((48, 40)), ["ForwardKL"], facts={"vocabulary_checked": 44})
    with pytest.raises(WiringError, match=r"different tokenizers.*UniversalLogits"):
        graft(*models((40, 40)), ["ForwardKL"], facts={"vocabulary": "different"})
    grafted = support.quiet(graft(*models((48, 40)), ["ForwardKL"], facts={"vocabulary_checked": 38})).train()
    batch = support.collate(support.samples(2, "causal"))
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    counted = torch.cat([batch["labels"][:, 1:] != -100, torch.zeros(2, 1, dtype=torch.bool)], 1)
    with torch.no_grad():
        t = grafted.distiller.teacher.model(**inputs).logits[..., :40].log_softmax(-1)
        s = grafted.plain_forward(**inputs).logits[..., :40].log_softmax(-1)
    expected = (t.exp() * (t - s)).sum(-1)[counted].mean()
    torch.testing.assert_close(step(grafted, batch)[0], expected, rtol=1e-4, atol=1e-6)
    grafted = graft(*models((48, 40)), ["UniversalLogits"], facts={"vocabulary": "different"}).train()
    assert step(grafted, batch)[0] > 0


@pytest.mark.parametrize(
    ("terms", "student", "teacher", "message"),
    [
        (["AttentionMaps"], {}, dict(heads=2), "4 heads, layer 0 of the teacher 2; use heads='averaged', or Relations"),
        (
            [dict(type="Relations", of="attention")],
            {},
            dict(heads=2),
            "'attention' needs equal numbers of heads, got 4 and 2",
        ),
        ([dict(type="Relations", heads=3)], {}, {}, "3 relation heads do not divide the query widths 16 and 16"),
        (["AttentionMaps"], dict(layers=3), {}, "needs a teacher at least as deep as the student"),
        ([dict(type="HiddenStates", adapter="none")], {}, dict(width=32), "adapter 'none' needs equal channels"),
        ([dict(type="HiddenStates", stack="decoder")], {}, {}, "the student has no stack 'decoder', but 'layers'"),
        (["SoftTargets"], {}, dict(num_labels=4), "student and teacher have 3 and 4 classes"),
        (
            ["SoftTargets"],
            {},
            dict(kind="BertForTokenClassification"),
            "different tasks: sequence (student, BertForSequence",
        ),
        (["AttentionMaps"], {}, dict(is_decoder=True), "only one of student and teacher is causal"),
        (
            [dict(type="SoftTargets", tokens="labelled")],
            {},
            {},
            "tokens='labelled' is for labels per token, which",
        ),
        (["UniversalLogits"], {}, {}, "compares the tokens of language models; use SoftTargets for sequence"),
    ],
)
def test_refused_when_built(terms, student, teacher, message):
    import re

    with pytest.raises(WiringError, match=re.escape(message)):
        graft(support.model("bert", seed=1, **student), support.model("bert", seed=2, **teacher), terms)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (dict(type="AttentionMaps", of="maps"), "AttentionMaps: of must be one of scores, distributions, got 'maps'"),
        (dict(type="AttentionMaps", head="equal"), "takes no argument 'head'; did you mean 'heads'"),
        (dict(type="SoftTargets", temperature=0), "temperature must be > 0"),
        (dict(type="SoftTargets", tokens="some"), "tokens must be one of auto, valid, labelled"),
        (dict(type="SkewedKL", alpha=2), r"alpha must be in \[0, 1\], got 2"),
        (dict(type="Relations", of=("query", "keys")), "of must be one of query, key, value, attention, got 'keys'"),
        (dict(type="PatientStates", loss="cosine"), "PatientStates takes no argument 'loss'.*use HiddenStates"),
        (dict(type="Embeddings", layers="last"), "term Embeddings takes no argument 'layers'"),
        (dict(type="Relations", of="attention", heads=4), "heads applies to query, key and value; leave it out"),
        (dict(type="SkewedKL", reverse="no"), "SkewedKL: reverse must be true or false, got 'no'"),
        (dict(type="UniversalLogits", temperature=2), "term UniversalLogits takes no argument 'temperature'"),
        (dict(type="PatientStates", variant="mean"), "variant must be one of paper, code"),
        (dict(type="HiddenStates", loss="l1"), "loss must be one of mse, cosine, normalized"),
        (dict(type="ChannelWise"), "ChannelWise needs a tap, or both student_tap and teacher_tap"),
        (dict(type="MaskedGeneration"), "MaskedGeneration needs a tap, or both student_tap and teacher_tap"),
        (dict(type="AttentionMap"), "did you mean 'AttentionMaps'"),
    ],
)
def test_wrong_settings(spec, message):
    with pytest.raises(DistillError, match=message):
        graft(support.model("bert", seed=1), support.model("bert", seed=2), [spec])


def test_families_apart():
    student, teacher = support.model("distilbert", 16, 2, 4, seed=1), support.model("bert", 32, 4, 4, seed=2)
    terms = ["SoftTargets", "AttentionMaps", "HiddenStates", "Embeddings", "PatientStates", "Relations"]
    grafted = graft(student, teacher, terms).train()
    batch = support.collate(support.samples())
    batch["token_type_ids"] = torch.ones_like(batch["input_ids"])  # DistilBERT takes none; BERT is given them
    with_types = step(grafted, batch)[0]
    assert with_types > 0
    del batch["token_type_ids"]
    assert step(grafted, batch)[0] != with_types


def test_the_teacher_computes_no_loss_and_stays_as_it_is():
    student = pair("bert", ["SoftTargets"])
    teacher = student.distiller.teacher.model
    before = copy.deepcopy(teacher.state_dict())
    seen = []
    teacher.register_forward_pre_hook(lambda _, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)
    step(student, support.collate(support.samples()))
    assert seen == [{"input_ids", "attention_mask"}]
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())


def test_outputs_that_are_no_classes_are_refused():
    models = [support.model("bert", seed=s, num_labels=1) for s in (1, 2)]
    with pytest.raises(WiringError, match="a single output"):
        graft(*models, ["SoftTargets"])
    models = [support.model("bert", seed=s, problem_type="multi_label_classification") for s in (1, 2)]
    with pytest.raises(WiringError, match="multi_label_classification"):
        graft(*models, ["ForwardKL"])


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
    with pytest.raises(WiringError, match="split images into 5 and 17 positions"):
        graft(support.model("vit"), support.model("vit", patch_size=4), [dict(type="HiddenStates", layers="final")])
