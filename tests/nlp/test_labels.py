"""Labels, standardised logits and regressed numbers of Hugging Face models, against formulas written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers

from kdgraft import DistillError, WiringError
from kdgraft_nlp.student import graft
from support import nlp as support
from support.labelled import decoupled

DKD = dict(type="DKD", alpha=0.5, beta=2.0, temperature=2.0)
SETTINGS = (2.0, 0.5, 2.0)
KINDS = {
    "sequence": ("bert", ""),
    "tokens": ("electra", ""),
    "masked": ("roberta", ""),
    "causal": ("gpt2", ""),
    "seq2seq": ("t5", ""),
    "image": ("vit", ""),
}


def models(task):
    family, kind = KINDS[task]
    return [support.quiet(support.model(family, width, 2, 4, seed=width, kind=kind)) for width in (16, 32)]


def outputs(model, batch):
    with torch.no_grad():
        return model.eval()(**batch)


def labelled(task, logits, labels):
    """The logits and labels of the items that have one, by the rules of the models' own losses."""
    if task == "causal":
        logits, labels = logits[:, :-1], labels[:, 1:]
    keep = labels != -100
    return logits[keep], labels[keep]


def given(task):
    batch = support.collate(support.samples(5, task))
    if task in ("sequence", "image"):
        batch["labels"][1] = -100
    return batch


@pytest.mark.parametrize("task", list(KINDS))
def test_items_with_a_label_are_compared(task):
    batch = given(task)
    found = [outputs(model, batch).logits for model in models(task)]
    student, labels = labelled(task, found[0], batch["labels"])
    teacher, _ = labelled(task, found[1], batch["labels"])
    assert 0 < len(labels) < batch["labels"].numel()
    built = graft(*models(task), [DKD]).train()
    loss, slope = support.distilled_step(built, batch)
    expected = decoupled(student, teacher, labels, *SETTINGS).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    assert any(gradient.abs().sum() > 0 for gradient in slope.values())
    # What counts is known before the pass, so that accumulated batches are one.
    assert built.distiller.counts(built.distill_link.read(batch))["dkd"] == len(labels)


def test_all_valid_tokens_are_asked_for_and_those_with_a_label_count():
    batch = given("masked")
    both = [graft(*models("masked"), [{**DKD, "tokens": tokens}]).train() for tokens in ("valid", "labelled")]
    losses = [support.distilled_step(built, batch)[0] for built in both]
    assert losses[0] == losses[1] > 0


@pytest.mark.parametrize("term", [DKD, dict(type="NKD"), dict(type="SoftTargets", temperature=2, standardize=True)])
def test_chunks_of_a_language_model_give_the_same(term):
    batch = support.collate(support.samples(5, "causal"))
    plain, chunked = (
        graft(*(support.model("llama", seed=seed) for seed in (1, 2)), [term], **settings).train()
        for settings in ({}, dict(chunk=3))
    )
    found = []
    for student in (plain, chunked):
        student.zero_grad()
        output = student(**batch)
        (value,) = (v for k, v in student.distill_link.last.losses.items() if k.endswith(".loss"))
        whole = output.loss if student is chunked else output.loss + value
        whole.backward()
        found.append((value.detach(), student.lm_head.weight.grad, student.model.embed_tokens.weight.grad))
    assert found[0][0] > 0
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def questions(extra=0):
    batch = support.collate(support.samples(5, "question"), extra=extra)
    batch["start_positions"][2] = 99  # an answer that was cut off
    return batch


def answerers():
    return [support.quiet(support.model("bert", w, 2, 4, seed=w, kind="BertForQuestionAnswering")) for w in (16, 32)]


@pytest.mark.parametrize("standardize", [False, True])
def test_answers_are_the_classes_of_questions_and_padding_is_none(standardize):
    batch = questions()
    found = [outputs(model, batch) for model in answerers()]
    parts = []
    for field, place in (("start_logits", "start_positions"), ("end_logits", "end_positions")):
        items = []
        for i in (0, 1, 3, 4):
            real = batch["attention_mask"][i].bool()
            rows = [getattr(out, field)[i][real] for out in found]
            if standardize:
                rows = [(x - x.mean()) / (x.std(correction=0) + 1e-7) for x in rows]
            items.append(decoupled(*(row[None] for row in rows), batch[place][i : i + 1], *SETTINGS))
        parts.append(torch.cat(items).mean())
    student = graft(*answerers(), [{**DKD, "standardize": standardize}]).train()
    loss, _ = support.distilled_step(student, batch)
    torch.testing.assert_close(loss, sum(parts) / 2, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(support.distilled_step(student, questions(extra=4))[0], loss, rtol=1e-4, atol=1e-6)
    assert student.distiller.counts(student.distill_link.read(batch))["dkd"] == 4


def test_pixels_with_a_label_are_compared():
    torch.manual_seed(0)
    sizes = dict(hidden_sizes=[8, 8], depths=[1, 1], num_encoder_blocks=2, sr_ratios=[2, 1], patch_sizes=[3, 3])
    sizes |= dict(strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], num_labels=5, drop_path_rate=0.0)

    def segformers():
        kind = transformers.SegformerForSemanticSegmentation
        found = []
        for width in (8, 16):
            torch.manual_seed(width)
            found.append(support.quiet(kind(kind.config_class(**sizes, decoder_hidden_size=width))))
        return found

    labels = torch.randint(5, (2, 8, 8), generator=torch.Generator().manual_seed(0))
    labels[0, :5] = 255
    batch = dict(pixel_values=torch.rand(2, 3, 8, 8), labels=labels)
    student = graft(*segformers(), [DKD]).train()
    loss, _ = support.distilled_step(student, batch)
    with torch.no_grad():
        both = [model.train(i == 0)(batch["pixel_values"]).logits for i, model in enumerate(segformers())]
    rows = [F.interpolate(x, size=(8, 8), mode="bilinear").movedim(1, -1)[labels != 255] for x in both]
    expected = decoupled(*rows, labels[labels != 255], *SETTINGS).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)


def test_without_classes_it_is_refused():
    batch = support.collate(support.samples(4))
    del batch["labels"]
    with pytest.raises(
        DistillError, match=r"^dkd needs the class of each item, and the batch has none; add labels .* batch$"
    ):
        support.distilled_step(graft(*models("sequence"), [DKD]).train(), batch)
    many = [support.model("bert", seed=seed, problem_type="multi_label_classification") for seed in (1, 2)]
    with pytest.raises(WiringError, match="each class on its own"):
        graft(*many, [DKD])
    kind = transformers.Wav2Vec2ForCTC
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=10)
    sizes |= dict(conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=4)
    sizes |= dict(num_conv_pos_embedding_groups=2, mask_time_prob=0.0)
    with pytest.raises(WiringError, match="dkd needs the class of each item: CTC models have labels for sequences"):
        graft(*(kind(kind.config_class(**sizes)) for _ in range(2)), [DKD])


# --- numbers


def regressors(count=1, **settings):
    return [
        support.quiet(support.model("bert", width, 2, 4, seed=width, num_labels=count, **settings))
        for width in (16, 32)
    ]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("bounded", [True, False])
def test_numbers_by_hand(count, bounded):
    settings = dict(problem_type="regression") if count == 2 else {}
    batch = support.collate(support.samples(5))
    with torch.no_grad():
        s, t = (model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits for model in regressors(count))
    truth = 2 * t - s + torch.linspace(-1, 1, 5)[:, None]  # the teacher is better at some
    batch["labels"] = truth if count == 2 else truth[:, 0]
    errors, bounds = ((x - truth).square().sum(1) for x in (s, t))
    assert 0 < (errors > bounds).sum() <= 5
    expected = (errors * (errors > bounds)).mean() if bounded else (s - t).square().sum(1).mean()
    student = graft(*regressors(count, **settings), [dict(type="BoundedRegression", bounded=bounded, weight=1)]).train()
    loss, slope = support.distilled_step(student, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    assert slope["classifier.weight"].abs().sum() > 0
    assert student.distiller.counts(student.distill_link.read(batch))["bounded_regression"] == 5


def test_what_regresses_no_numbers_is_refused():
    term = "BoundedRegression"
    with pytest.raises(
        WiringError, match=r"the 3 outputs are class scores unless a config says otherwise; set problem_type"
    ):
        graft(*models("sequence"), [term])
    for task in ("causal", "tokens"):
        with pytest.raises(WiringError, match=r"compares regressed numbers, and \w+ predicts none; use SoftTargets"):
            graft(*models(task), [term])
    many = [support.model("bert", seed=seed, problem_type="multi_label_classification") for seed in (1, 2)]
    with pytest.raises(
        WiringError, match=r"these models predict classes \(multi_label_classification\); use SoftTargets"
    ):
        graft(*many, [term])
    with pytest.raises(WiringError, match=r"outputs \(\d, 2\) and \(\d, 3\) cannot be compared number by number"):
        graft(*(support.model("bert", num_labels=n, problem_type="regression") for n in (2, 3)), [term])
    batch = support.collate(support.samples(4))
    del batch["labels"]
    with pytest.raises(DistillError, match="bounded_regression needs the true numbers, and the batch has none"):
        support.distilled_step(graft(*regressors(), [term]).train(), batch)
    with pytest.raises(
        WiringError, match="softmax has no meaning for a single output; use BoundedRegression, which compares"
    ):
        graft(*regressors(), ["SoftTargets"])


# --- a critic


def test_a_critic_needs_classes_that_are_always_the_same():
    with pytest.raises(WiringError, match="its critic needs scores of one fixed number of classes"):
        graft(*answerers(), ["AdversarialScores"])
    many = [support.model("bert", seed=seed, problem_type="multi_label_classification") for seed in (1, 2)]
    with pytest.raises(WiringError, match="each class on its own"):
        graft(*many, ["AdversarialScores"])
    batch = support.collate(support.samples(4))
    del batch["labels"]
    for kind in ("lsgan", "hinge"):
        many = [support.model("bert", seed=seed, problem_type="multi_label_classification") for seed in (1, 2)]
        built = graft(*many, [dict(type="AdversarialScores", kind=kind)]).train()
        assert support.distilled_step(built, batch)[0].isfinite()


def test_a_critic_of_tokens_sees_those_with_a_label():
    batch = given("causal")
    built = graft(*models("causal"), [dict(type="AdversarialScores", name="term", width=8)]).train()
    opponent, seen = built.distiller.terms["term"].opponent, []
    learn = opponent.learn
    opponent.learn = lambda real, fake, labels=None: seen.append(labels) or learn(real, fake, labels=labels)
    assert support.distilled_step(built, batch)[0] > 0
    wanted = batch["labels"][:, 1:]
    assert torch.equal(seen[0], wanted[wanted != -100])
