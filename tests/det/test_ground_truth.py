"""Detectors whose masks are those of the boxes' positives, which they find by ground truth: dry run, teacher, training."""

from __future__ import annotations

import copy

import pytest
import torch

from kdgraft.errors import WiringError
from support.det import CLASSES, build, detector, distilled, losses, raw_batch, save_teacher
from support.det_families import condinst, solov2
from support.det_stages import with_masks


@pytest.mark.parametrize("kind", ["CondInst", "BoxInst"])
@pytest.mark.parametrize("tap", ["mask_head.mask_feature_head", "bbox_head[1][*]", "bbox_head.cls_convs[0]"])
def test_heads_that_run_on_ground_truth_are_tapped(tmp_path, kind, tap):
    entry = condinst(kind)
    checkpoint = save_teacher(tmp_path / "teacher.pth", entry)
    term = dict(type="FeatureImitation", tap=tap, adapter="none", name="tapped")
    made = build(distilled(entry, entry, checkpoint, terms=[term]))
    made.start_distilling(CLASSES)
    rows = len(made.distiller.rows)
    assert rows == (1 if "mask" in tap else 3)
    if kind == "BoxInst":
        return  # its training needs the data_preprocessor of its own, with colours' similarities
    # The teacher's tensors are those of its own host's training pass on the same batch.
    batch = with_masks(raw_batch())
    found = losses(made, batch)
    teacher = made.distiller.teacher.model
    with torch.no_grad():
        ours, theirs = (tensors_of(model, tap, batch) for model in (made, teacher))
    expected = torch.stack([(s - t).square().mean() for s, t in zip(ours, theirs, strict=True)]).mean()
    assert found["distill.tapped.loss"].item() == pytest.approx(expected.item(), rel=1e-3)
    assert all(value.isfinite() for value in found.values())


def tensors_of(model, tap, batch):
    """What the parts of a model give on a batch, run by hand."""
    data = model.data_preprocessor(copy.deepcopy(batch), True)
    features = model.extract_feat(data["inputs"])
    if "mask" in tap:
        return [model.mask_head.mask_feature_head(features)]
    if "cls_convs" in tap:
        return [model.bbox_head.cls_convs[0](level) for level in features]
    return list(model.bbox_head(features)[1])


def test_a_teacher_without_ground_truth_in_its_head_is_run_as_before(tmp_path):
    checkpoint = save_teacher(tmp_path / "teacher.pth", solov2())
    term = dict(type="FeatureImitation", tap="mask_head[2]")
    model = build(distilled(solov2(), solov2(), checkpoint, terms=[term]))
    assert losses(model, with_masks(raw_batch()))["distill.feature_imitation.loss"] > 0


def test_a_head_that_cannot_run_without_training_is_told_of(tmp_path, monkeypatch):
    entry = detector()
    checkpoint = save_teacher(tmp_path / "teacher.pth", entry)
    from mmdet.models.detectors import GFL

    def refuse(self, *_):
        raise ValueError("no boxes here")

    monkeypatch.setattr(GFL, "_forward", refuse)
    with pytest.raises(WiringError) as caught:
        build(distilled(entry, entry, checkpoint, terms=[dict(type="FeatureImitation", tap="bbox_head.cls_convs[0]")]))
    message = str(caught.value)
    assert message.startswith("the student, a GFL, cannot run without ground truth (ValueError: no boxes here)")
    assert message.endswith("tap its backbone or neck") and "\n" not in message
