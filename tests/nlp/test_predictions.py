"""Whose predictions are compared, and along which axis: multi-label models, segmentors, models that see and hear."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers

import nlp_support as support
from kdgraft import DistillError, WiringError
from kdgraft_nlp.student import graft


def built(kind, seed, **settings):
    """A small random model of a class of the library, without dropout."""
    found = getattr(transformers, kind)
    torch.manual_seed(seed)
    model = support.quiet(found(found.config_class(**settings)))
    with torch.no_grad():  # freshly initialised models say nothing much
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def distilled(student, batch):
    """The distillation loss of one step, and the gradient."""
    student.train().zero_grad()
    loss = support.loss_of(student, batch)
    loss.backward()
    return loss.detach(), support.distillation_gradient(student)


def outputs(model, batch, train=False, **more):
    """What a model by itself gives; a student with normalisation over the batch in training."""
    with torch.no_grad():
        return model.train(train)(**{k: v for k, v in batch.items() if k != "labels"}, **more)


def kl(student, teacher, temperature=1.0, dim=-1):
    """KL(teacher ‖ student) written out."""
    p, q = (F.log_softmax(x / temperature, dim) for x in (teacher, student))
    return (p.exp() * (p - q)).sum(dim)


# Classes that are right or wrong each on its own.


def bernoulli(student, teacher, temperature):
    """T²·KL of the two Bernoulli distributions of each class, written out."""
    p, q = (torch.sigmoid(x.double() / temperature) for x in (teacher, student))
    return temperature**2 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())


def multi_label(count=4):
    batch = support.collate(support.samples(count))
    batch["labels"] = torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])[:count]
    return batch


def berts(**settings):
    return [support.quiet(support.model("bert", 16, seed=seed, **settings)) for seed in (1, 2)]


@pytest.mark.parametrize("said", ["by the labels", "by the config"])
def test_soft_targets_of_a_multi_label_model_are_those_of_each_class(said):
    settings = dict(problem_type="multi_label_classification") if said == "by the config" else {}
    batch = multi_label()
    if said == "by the config":
        del batch["labels"]
    plain = [outputs(model, batch).logits for model in berts()]
    student = graft(*berts(**settings), [dict(type="SoftTargets", temperature=2.0)])
    loss, gradient = distilled(student, batch)
    torch.testing.assert_close(loss, bernoulli(*plain, 2.0).mean().float(), rtol=1e-4, atol=1e-6)
    assert gradient["classifier.weight"].abs().sum() > 0
    # Moving all of the teacher's logits alike, to which softmax is blind, changes it.
    with torch.no_grad():
        student.distiller.teacher.model.classifier.bias += 1
    moved = bernoulli(plain[0], plain[1] + 1, 2.0).mean().float()
    torch.testing.assert_close(distilled(student, batch)[0], moved, rtol=1e-4, atol=1e-6)


def test_without_float_labels_soft_targets_are_over_all_classes():
    batch = support.collate(support.samples(4))
    plain = [outputs(model, batch).logits for model in berts()]
    loss, _ = distilled(graft(*berts(), [dict(type="SoftTargets", temperature=2.0)]), batch)
    torch.testing.assert_close(loss, 4 * kl(*plain, 2.0).mean(), rtol=1e-4, atol=1e-6)


def test_labels_that_are_shares_of_one_class_keep_softmax_where_the_config_says_so():
    batch = multi_label()
    plain = [outputs(model, batch).logits for model in berts()]
    student = graft(*berts(problem_type="single_label_classification"), [dict(type="SoftTargets", temperature=2.0)])
    own = {k: v for k, v in batch.items() if k != "labels"}
    student._distill.batch = student._distill.read(batch)
    torch.testing.assert_close(distilled(student, own)[0], 4 * kl(*plain, 2.0).mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("term", ["ForwardKL", "ReverseKL", "GeneralizedJSD", "SkewedKL"])
def test_other_divergences_of_multi_label_models_are_refused(term):
    with pytest.raises(WiringError, match=r"each class on its own \(multi_label_classification.*use SoftTargets"):
        graft(*berts(problem_type="multi_label_classification"), [term])
    with pytest.raises(DistillError, match=r"each class on its own.*use SoftTargets"):
        distilled(graft(*berts(), [term]), multi_label())


def test_outputs_that_do_not_mean_the_same_are_refused():
    student, teacher = berts()
    teacher.config.problem_type = "single_label_classification"
    with pytest.raises(DistillError, match="set problem_type in the student's config"):
        distilled(graft(student, teacher, ["SoftTargets"]), multi_label())
    student, teacher = berts(problem_type="multi_label_classification")
    teacher.config.problem_type = "single_label_classification"
    with pytest.raises(WiringError, match="their outputs do not mean the same"):
        graft(student, teacher, ["SoftTargets"])


def test_numbers_to_be_predicted_are_refused_at_the_first_batch():
    batch = support.collate(support.samples(4))
    student = graft(*berts(), ["SoftTargets"]).train()
    student._distill.batch = student._distill.read({**batch, "labels": torch.rand(4)})
    del batch["labels"]
    with pytest.raises(DistillError, match=r"floats \(4,\) beside logits \(4, 3\) are numbers to be predicted"):
        student(**batch)


def test_multi_label_images_too():
    models = [support.model("vit", seed=seed) for seed in (1, 2)]
    batch = support.collate(support.samples(3, "image"))
    batch["labels"] = torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 1]])
    plain = [outputs(support.quiet(support.model("vit", seed=seed)), batch).logits for seed in (1, 2)]
    loss, _ = distilled(graft(*(support.quiet(m) for m in models), ["SoftTargets"]), batch)
    torch.testing.assert_close(loss, bernoulli(*plain, 2.0).mean().float(), rtol=1e-4, atol=1e-6)


# Segmentors.


def segformers(**settings):
    sizes = dict(
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[8, 8],
        patch_sizes=[3, 3],
        strides=[2, 2],
        num_attention_heads=[1, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=8,
        image_size=16,
        num_labels=5,
        drop_path_rate=0.0,
    )
    return [
        built("SegformerForSemanticSegmentation", seed, **{**sizes, "decoder_hidden_size": 8 * seed, **settings})
        for seed in (1, 2)
    ]


def pictures(ignored=255):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (2, 24, 20), generator=generator)
    labels[0, :10] = ignored
    labels[1, :, 3] = ignored
    return {"pixel_values": torch.rand(2, 3, 24, 20, generator=generator), "labels": labels}


def resized(models, batch):
    """The scores of student and teacher at the labels' size."""
    found = (outputs(model, batch, train=train).logits for model, train in zip(models, (True, False), strict=True))
    return [F.interpolate(logits, size=batch["labels"].shape[-2:], mode="bilinear") for logits in found]


def by_hand(models, batch, ignored=255, temperature=2.0):
    """T²·KL over the classes of every labelled pixel, at the labels' size."""
    scores = resized(models, batch)
    counted = batch["labels"] != ignored
    return temperature**2 * kl(*scores, temperature, dim=1)[counted].mean()


@pytest.mark.parametrize("ignored", [255, 4])
def test_a_segmentors_classes_are_compared_pixel_by_pixel(ignored):
    settings = dict(semantic_loss_ignore_index=ignored)
    batch = pictures(ignored)
    expected = by_hand(segformers(**settings), batch, ignored)
    student = graft(*segformers(**settings), [dict(type="SoftTargets", temperature=2.0)])
    loss, gradient = distilled(student, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    assert gradient["decode_head.classifier.weight"].abs().sum() > 0
    assert student.distiller.rows[0].region == "labelled pixels"
    # What counts is known before the pass, so that accumulated batches are one.
    counts = student.distiller.counts(student._distill.read(batch))
    assert counts["soft_targets"] == (batch["labels"] != ignored).sum()


def test_a_segmentors_ignored_pixels_alone_are_zero_with_a_live_graph():
    batch = pictures()
    batch["labels"][:] = 255
    student = graft(*segformers(), ["SoftTargets"]).train()
    own = {"pixel_values": batch["pixel_values"]}
    student._distill.batch = student._distill.read(batch)  # the host's own cross-entropy of nothing is NaN
    loss = support.loss_of(student, own)
    loss.backward()
    assert loss == 0 and all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())


def test_a_segmentors_classes_are_compared_by_name():
    names = [dict(enumerate("abcde")), dict(enumerate("ebcda"))]
    batch = pictures()
    student, teacher = segformers()
    scores = resized((student, teacher), batch)
    student.config.id2label, teacher.config.id2label = names
    expected = 4 * kl(scores[0], scores[1][:, [4, 1, 2, 3, 0]], 2.0, dim=1)[batch["labels"] != 255].mean()
    torch.testing.assert_close(
        distilled(graft(student, teacher, ["SoftTargets"]), batch)[0], expected, rtol=1e-4, atol=1e-6
    )


def test_segmentors_whose_scores_mean_something_else_are_refused():
    with pytest.raises(WiringError, match="tell 5 and 4 classes apart"):
        graft(segformers()[0], segformers(num_labels=4)[1], ["SoftTargets"])
    with pytest.raises(WiringError, match="a single output"):
        graft(*segformers(num_labels=1), ["SoftTargets"])


class Tagger(transformers.BertPreTrainedModel):
    """A class of the user's own: nobody knows what its positions are."""

    def __init__(self, config):
        super().__init__(config)
        self.bert = transformers.BertModel(config)
        self.out = torch.nn.Linear(config.hidden_size, 3)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        states = self.bert(input_ids, attention_mask)[0]
        return transformers.modeling_outputs.TokenClassifierOutput(logits=self.shape(self.out(states)))

    def shape(self, logits):
        return logits


class Classifier(Tagger):
    """A class of the user's own, with one answer a sample."""

    def shape(self, logits):
        return logits[:, 0]


def own(kind, seed):
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=40
    )
    return support.quiet(kind(config))


def test_a_model_of_unknown_kind_with_an_answer_a_sample_is_a_classifier():
    batch = support.collate(support.samples(4))
    plain = [outputs(own(Classifier, seed), batch).logits for seed in (1, 2)]
    student = graft(own(Classifier, 1), own(Classifier, 2), ["ForwardKL"])
    torch.testing.assert_close(distilled(student, batch)[0], kl(*plain).mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("term", ["SoftTargets", "ForwardKL", "UniversalLogits"])
def test_other_predictions_of_a_model_of_unknown_kind_are_refused(term):
    message = "Tagger is a model of a kind that is not known here" if term != "UniversalLogits" else "language models"
    with pytest.raises(WiringError, match=message):
        graft(own(Tagger, 1), own(Tagger, 2), [term])
    graft(own(Tagger, 1), own(Tagger, 2), ["HiddenStates"])  # terms on layers work


def test_tokens_of_a_model_without_are_refused():
    with pytest.raises(WiringError, match="tokens='valid' is for models that predict per labelled token"):
        graft(*berts(), [dict(type="SoftTargets", tokens="valid")])
