"""Labels of detectors' class scores: assigned classes of proposals, of positive anchors, and of matched queries."""

from __future__ import annotations

import pytest
import torch

from kdgraft import WiringError
from support.det import build, detector, distilled, losses, raw_batch, save_teacher
from support.det_stages import detr, staged
from support.labelled import decoupled

DKD = dict(type="DKD", alpha=0.5, beta=2.0, temperature=2.0, name="term")
SETTINGS = (2.0, 0.5, 2.0)


def taught(student, teacher, folder, **settings):
    checkpoint = save_teacher(folder / "teacher.pth", teacher)
    return build(distilled(student, teacher, checkpoint, terms=[settings]))


def compared(model):
    """The pairs that the term is given in a step, and its loss."""
    seen, scores = [], model.distiller.terms["term"].predictions
    pairs = scores.pairs
    scores.pairs = lambda *given: seen.append(pairs(*given)) or seen[-1]
    found = losses(model, raw_batch())
    return seen[0], found["distill.term.loss"]


@pytest.mark.parametrize("anchors", ["all", "main"])
@pytest.mark.parametrize("kind", ["Faster R-CNN", "Cascade R-CNN"])
def test_proposals_have_their_assigned_classes(kind, anchors, tmp_path):
    model = taught(staged(kind, frozen_bn=True), staged(kind, width=6), tmp_path, **DKD, anchors=anchors)
    head = model.roi_head.bbox_head
    targets = []
    for one in head if kind == "Cascade R-CNN" else [head]:
        made = one.get_targets
        one.get_targets = lambda *a, made=made, **k: targets.append(made(*a, **k)) or targets[-1]
    stages, loss = compared(model)
    expected = []
    for pairs, (labels, *_) in zip(stages, targets, strict=True):
        assert (labels < 10).any() and (labels == 10).any()  # objects and background
        keep = labels <= 10 if anchors == "all" else labels < 10
        rows = (x.detach()[keep] for x in (pairs.student, pairs.teacher))
        expected.append(decoupled(*rows, labels[keep], *SETTINGS).mean())
    torch.testing.assert_close(loss.detach(), torch.stack(expected).mean(), rtol=1e-4, atol=1e-6)


def test_positive_anchors_have_a_class_where_classes_share_a_softmax(tmp_path):
    model = taught(detector(frozen_bn=True), detector(width=6, channels=12), tmp_path, **DKD, activation="softmax")
    (pairs,), loss = compared(model)
    keep = pairs.labels < 10
    assert 0 < keep.sum() < len(keep)
    expected = decoupled(pairs.student.detach()[keep], pairs.teacher[keep], pairs.labels[keep], *SETTINGS).mean()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-6)
    main = taught(
        detector(frozen_bn=True), detector(width=6, channels=12), tmp_path, **DKD, activation="softmax", anchors="main"
    )
    (chosen,), same = compared(main)
    torch.testing.assert_close(same, loss)
    assert torch.equal(chosen.labels, pairs.labels[keep])
    # Object i has label i: each class of the batch is among those of the positives.
    assert set(chosen.labels.tolist()) == {
        label for sample in raw_batch()["data_samples"] for label in sample.gt_instances.labels.tolist()
    }


def test_matched_queries_have_the_classes_of_their_objects(tmp_path):
    entry = lambda width: detr("DeformableDETR", width=width)  # noqa: E731
    model = taught(entry(4), entry(6), tmp_path, **DKD, activation="softmax")
    (pairs,), loss = compared(model)
    objects = torch.cat([sample.gt_instances.labels for sample in raw_batch()["data_samples"]])
    assert torch.equal(pairs.labels, objects)
    expected = decoupled(pairs.student.detach(), pairs.teacher, objects, *SETTINGS).mean()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("term", ["DKD", "NKD"])
def test_sigmoid_classes_are_refused_when_built(term, tmp_path):
    with pytest.raises(WiringError, match="these models score each class on its own; use SoftTargets"):
        taught(detector(), detector(width=6, channels=12), tmp_path, type=term)


@pytest.mark.parametrize(
    "settings",
    [dict(activation="softmax"), dict(activation="softmax", anchors="main"), dict(kind="lsgan", anchors="main")],
)
def test_a_critic_of_class_scores_sees_the_positives_alone(settings, tmp_path):
    teacher = detector(width=6, channels=12)
    model = taught(detector(frozen_bn=True), teacher, tmp_path, type="AdversarialScores", name="term", **settings)
    opponent, seen = model.distiller.terms["term"].opponent, []
    learn = opponent.learn
    opponent.learn = lambda real, fake, labels=None: seen.append((real, labels)) or learn(real, fake, labels=labels)
    (pairs,), loss = compared(model)
    positive = (pairs.labels < 10).sum()
    ((real, labels),) = seen
    assert real.shape == (positive, 10) and loss > 0
    assert (labels is None) == ("kind" in settings)


def test_a_critic_of_proposals_sees_the_background_as_a_class(tmp_path):
    model = taught(
        staged("Cascade R-CNN", frozen_bn=True),
        staged("Cascade R-CNN", width=6),
        tmp_path,
        type="AdversarialScores",
        name="term",
    )
    stages, loss = compared(model)
    assert len(stages) == 2 and loss > 0
    assert model.distiller.terms["term"].opponent.critic.last.out_features == 11 + 2
