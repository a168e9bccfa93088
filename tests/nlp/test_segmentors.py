"""Segmentors: classes are compared pixel by pixel on the grid of the labels, or on maps, without the pixels that are ignored."""

from __future__ import annotations

import pytest
import torch
import transformers

from kdgraft import WiringError
from kdgraft.schedules import Step
from kdgraft_nlp import DistillTrainer
from kdgraft_nlp.link import StudentStep
from kdgraft_nlp.student import graft
from support import nlp as support
from support.nlp import kl, outputs
from support.segmentors import pictures, resized, segformers
from support.tensors import gradients

SOFT = dict(type="SoftTargets", temperature=2.0)


def distilled(student, batch):
    """The distillation loss of one step, and the gradient."""
    student.train().zero_grad()
    loss = support.loss_of(student, batch)
    loss.backward()
    return loss.detach(), gradients(student)


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
    counts = student.distiller.counts(student.distill_link.read(batch))
    assert counts["soft_targets"] == (batch["labels"] != ignored).sum()


def test_a_segmentors_ignored_pixels_alone_are_zero_with_a_live_graph():
    batch = pictures()
    batch["labels"][:] = 255
    student = graft(*segformers(), [SOFT]).train()
    own = {"pixel_values": batch["pixel_values"]}
    with student.distill_link.asking(StudentStep(Step(), batch)):  # the host's own cross-entropy of nothing is NaN
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
    torch.testing.assert_close(distilled(graft(student, teacher, [SOFT]), batch)[0], expected, rtol=1e-4, atol=1e-6)


def test_segmentors_whose_scores_mean_something_else_are_refused():
    with pytest.raises(WiringError, match="student and teacher have 5 and 4 classes"):
        graft(segformers()[0], segformers(num_labels=4)[1], [SOFT])
    with pytest.raises(WiringError, match="a single output"):
        graft(*segformers(num_labels=1), [SOFT])


def correlation(first, second):
    """Pearson's correlation of two vectors."""
    return torch.corrcoef(torch.stack([first, second]))[0, 1]


def test_dist_correlates_the_classes_of_labelled_pixels_by_hand():
    batch = pictures()
    scores = (logits.softmax(1).movedim(1, -1) for logits in resized(segformers(), batch))
    s, t = (probabilities[batch["labels"] != 255] for probabilities in scores)
    between = torch.stack([correlation(a, b) for a, b in zip(s, t, strict=True)])
    within = torch.stack([correlation(a, b) for a, b in zip(s.T, t.T, strict=True)])
    expected = (1 - between).mean() + 2 * (1 - within).mean()
    loss, _ = distilled(graft(*segformers(), [dict(type="DIST", gamma=2.0)]), batch)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-5)


def at_centres(batch, size):
    """The labelled pixels on a smaller grid, by the pixel at each centre."""
    labels = batch["labels"]
    rows, columns = (
        [int((k + 0.5) * old / new) for k in range(new)] for new, old in zip(size, labels.shape[-2:], strict=True)
    )
    return (labels != 255)[:, rows][:, :, columns]


def test_channel_wise_softmax_over_labelled_positions_by_hand():
    """Class scores are the default; each class's softmax is over the positions that are not ignored."""
    batch = pictures()
    models = segformers()
    s, t = (outputs(model, batch, train=train).logits for model, train in zip(models, (True, False), strict=True))
    counted = at_centres(batch, t.shape[-2:])
    assert 0 < counted.float().mean() < 1
    # T² times the KL over positions, of each class of each picture.
    expected = torch.stack([16 * kl(s[i][:, counted[i]], t[i][:, counted[i]], 4.0) for i in range(2)]).mean()
    loss, _ = distilled(graft(*segformers(), ["ChannelWise"]), batch)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-5)


TERMS = [
    SOFT,
    dict(type="DIST"),
    dict(type="ChannelWise"),
    dict(type="PairwiseAffinity", tap="decode_head.classifier:input", patch=1),
    dict(type="FeatureImitation", tap="decode_head.classifier:input"),
]


@pytest.mark.parametrize("term", TERMS, ids=lambda term: term["type"])
def test_what_a_teacher_says_of_ignored_pixels_reaches_nothing(term):
    """The lower half is ignored; there the teacher's features or scores, of half the size, are made infinite.

    A row of scores in between remains as it is: the host's resizing mixes it with the last row that counts.
    """
    batch = pictures()
    batch["labels"][:, 12:] = 255
    found = []
    for broken in (False, True):
        student, teacher = segformers()
        if broken:
            place = "dropout" if "tap" in term else "classifier"
            teacher.decode_head.get_submodule(place).register_forward_hook(
                lambda module, inputs, output: torch.cat(
                    [output[..., :7, :], torch.full_like(output[..., 7:, :], torch.inf)], -2
                )
            )
        student = graft(student, teacher, [{**term, "name": "term"}])
        found.append(distilled(student, batch))
        assert not student.distiller.dropped["term"] and found[-1][0] > 0
    torch.testing.assert_close(found[0][0], found[1][0])
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name])
        assert gradient.isfinite().all()


def trainer_of(kind, model, folder, steps, **settings):
    generator = torch.Generator().manual_seed(0)
    colours = torch.rand(5, 3, generator=generator)  # one for each class
    rows = []
    for _ in range(4):
        labels = torch.randint(5, (6, 5), generator=generator).repeat_interleave(4, 0).repeat_interleave(4, 1)
        image = colours[labels].movedim(-1, 0)
        labels[:4] = 255
        rows.append({"pixel_values": image, "labels": labels})
    return kind(
        model=model,
        args=support.arguments(folder, max_steps=steps, learning_rate=3e-3),
        train_dataset=rows,
        data_collator=lambda features: {k: torch.stack([f[k] for f in features]) for k in features[0]},
        **settings,
    )


def test_a_trainer_teaches_a_segmentor_by_a_bigger_one(tmp_path):
    student, teacher = segformers()
    trainer_of(transformers.Trainer, teacher, tmp_path / "teacher", 40).train()  # by the host alone
    trainer = trainer_of(DistillTrainer, student, tmp_path, 24, teacher=teacher, terms=TERMS)
    trainer.train()
    first, *_, last = [entry for entry in trainer.state.log_history if "task_loss" in entry]
    names = [name for name in first if name.startswith("distill.") and name.endswith(".loss")]
    assert len(names) == len(TERMS)
    assert all(last[name] < first[name] for name in names), [(name, first[name], last[name]) for name in names]
    assert last["task_loss"] < first["task_loss"]
