"""MMPretrain's models as teachers of features of segmentors, and as their backbones, where MMPretrain can be imported."""

from __future__ import annotations

import pytest

from support import pretrain
from support.seg import batch, build, distilled, losses_of, save_teacher, segmentor


@pytest.fixture(scope="module", autouse=True)
def library():
    pretrain.require()


def test_it_teaches_a_segmentor(tmp_path):
    spec, _ = pretrain.by_file(tmp_path / "vit.pth")
    term = dict(type="FeatureImitation", tap="backbone[2]")
    model = build(distilled(segmentor("PSPNet", width=4), spec, terms=[term]))
    assert losses_of(model, *batch())["distill.feature_imitation.loss"] > 0


def test_its_backbones_are_students_and_teachers_in_segmentation(tmp_path):
    teacher, student = (segmentor("PSPNet", width=width) for width in (8, 4))
    head = teacher["decode_head"]["in_channels"]
    dilated = dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4))
    teacher["backbone"] = dict(pretrain.RESNET, **dilated, base_channels=head // 8, stem_channels=head // 8)
    terms = [dict(type="FeatureImitation", tap="backbone[3]"), "SoftTargets"]
    taught = distilled(student, save_teacher(tmp_path / "teacher.pth", teacher), terms=terms)
    model = build(taught)
    assert type(model.distiller.teacher.model.backbone).__module__.startswith("mmpretrain.")
    found = losses_of(model, *batch())
    assert found["distill.feature_imitation.loss"] > 0 and found["distill.soft_targets.loss"] > 0
