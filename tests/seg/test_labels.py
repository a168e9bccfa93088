"""Labels of pixels and standardised scores of real segmentors, against formulas written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kdgraft import DistillError
from support.labelled import decoupled
from support.seg import batch, build, distilled, played, segmentor

DKD = dict(type="DKD", alpha=0.5, beta=2.0, temperature=2.0, name="term")


def model_of(teacher, **term):
    return build(distilled(segmentor(dropout=0.0), teacher, terms=[{**term, "name": "term"}]))


def scores():
    generator = torch.Generator().manual_seed(0)
    return [2 * torch.randn(2, 11, 8, 8, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("grid", ["teacher", "labels"])
def test_pixels_with_a_label_are_compared(teacher, grid):
    samples = batch(ignored=0.3)[1]
    truth = torch.cat([sample.gt_sem_seg.data for sample in samples])
    student, target = scores()
    losses, slope = played(model_of(teacher, **DKD, grid=grid), student, target, samples)
    labels = truth[:, 4::8, 4::8] if grid == "teacher" else truth
    size = labels.shape[-2:]
    keep = labels != 255
    rows = [F.interpolate(x, size=size, mode="bilinear").movedim(1, -1)[keep] for x in (student, target)]
    expected = decoupled(*rows, labels[keep], 2.0, 0.5, 2.0).mean()
    torch.testing.assert_close(losses["distill.term.loss"], expected, rtol=1e-4, atol=1e-6)
    if grid == "teacher":
        assert not slope.movedim(1, -1)[~keep].any() and slope.movedim(1, -1)[keep].any(-1).all()


@pytest.mark.parametrize("term", ["DKD", "NKD"])
def test_ignored_pixels_change_nothing_and_alone_give_0(teacher, term):
    samples = batch(ignored=0.3)[1]
    outside = torch.cat([sample.gt_sem_seg.data for sample in samples])[:, 4::8, 4::8] == 255
    student, target = scores()
    found = []
    for junk in (0.0, torch.inf):
        maps = [x.movedim(1, -1).masked_fill(outside[..., None], junk).movedim(-1, 1) for x in (student, target)]
        losses, slope = played(model_of(teacher, type=term), *maps, samples)
        found.append((losses["distill.term.loss"], slope))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    losses, slope = played(model_of(teacher, type=term), student, target, batch(ignored=1.0)[1])
    assert losses["distill.term.loss"] == 0 and not slope.any()


def test_standardised_scores(teacher):
    samples = batch(ignored=0.3)[1]
    keep = torch.cat([sample.gt_sem_seg.data for sample in samples])[:, 4::8, 4::8] != 255
    student, target = scores()
    losses, _ = played(
        model_of(teacher, type="SoftTargets", standardize=True, temperature=2.0), student, target, samples
    )
    rows = [x.movedim(1, -1)[keep] for x in (student, target)]
    s, t = ((x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True) / 2 for x in rows)
    expected = 4 * (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(losses["distill.term.loss"], expected, rtol=1e-4, atol=1e-6)


def test_segmentors_regress_no_numbers(teacher):
    with pytest.raises(
        DistillError, match=r"^BoundedRegression needs regressed numbers, such as boxes: a segmentor predicts"
    ):
        model_of(teacher, type="BoundedRegression")
