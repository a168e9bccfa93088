"""Mixup in segmentation: one mixture for student and teacher, without labels."""

from __future__ import annotations

import pytest
import torch

from kdgraft import WiringError
from kdgraft_seg.mixing import mixed_batch
from support.mm import history, run
from support.seg import batch, build, config, distilled, losses_of, save_teacher, segmentor

STUDENT = segmentor(dropout=0.0, frozen_bn=True)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("mixing") / "teacher.pth")


def test_a_mixture_by_hand():
    inputs, samples = batch(3, ignored=0.3)
    before = [sample.gt_sem_seg.data.clone() for sample in samples]
    torch.manual_seed(1)
    share = max(drawn := torch.rand(()).item(), 1 - drawn)
    torch.manual_seed(1)
    images, found = mixed_batch(inputs, samples, 255)
    assert 0.5 < share < 0.99
    for place in range(3):
        torch.testing.assert_close(images[place], share * inputs[place] + (1 - share) * inputs[place - 1])
        own, other = before[place], before[place - 1]
        expected = own.clone()
        expected[other == 255] = 255
        assert torch.equal(found[place].gt_sem_seg.data, expected)
        assert found[place].img_shape == samples[place].img_shape
        assert torch.equal(samples[place].gt_sem_seg.data, before[place])  # the delivered samples stay


def test_student_and_teacher_see_the_mixture_alone(teacher):
    mixing = build(distilled(STUDENT, teacher, recipe="funmatch", mixup=True))
    plain = build(distilled(STUDENT, teacher, recipe="funmatch"))
    plain.load_state_dict(mixing.state_dict())
    for model in (mixing, plain):
        model.start_distilling()
    inputs, samples = batch(4, ignored=0.3)
    found = losses_of(mixing, inputs, samples)
    torch.manual_seed(0)
    expected = losses_of(plain, *mixed_batch(inputs, samples, 255))
    other = losses_of(plain, inputs, samples)
    key = "distill.soft_targets.loss"
    torch.testing.assert_close(found[key], expected[key])
    assert found[key].item() != pytest.approx(other[key].item(), rel=1e-3)
    host = [value for name, value in found.items() if "loss" in name and not name.startswith("distill")]
    assert host
    assert all(value == 0 for value in host)
    # In eval mode and without gradients nothing is mixed.
    mixing.eval(), plain.eval()
    for ours, theirs in zip(mixing.loss(inputs, samples).values(), plain.loss(inputs, samples).values(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_segmentor_trains_on_mixtures(tmp_path, scenes, teacher):
    runner = run(config(distilled(STUDENT, teacher, recipe="funmatch", mixup=True), scenes, tmp_path))
    losses = history(runner, "distill.soft_targets.loss")
    assert len(losses) == 4
    assert all(value > 0 for value in losses)
    assert history(runner, "loss") == pytest.approx(losses)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            dict(terms=["SoftTargets"]),
            r"mixed images have no labels for the student's own loss; add dict\(type='TaskShare'\)",
        ),
        (dict(terms=["ClassPrototypes", "TaskShare"]), "mixup: class_prototypes needs labels"),
        (dict(terms=["DKD", "TaskShare"]), "mixup: dkd needs labels"),
        (dict(terms=[]), "mixup is for distillation"),
    ],
)
def test_what_mixtures_cannot_have(teacher, settings, message):
    with pytest.raises(WiringError, match=message):
        build(distilled(STUDENT, teacher, mixup=True, **settings))
