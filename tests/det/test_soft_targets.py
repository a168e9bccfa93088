"""Soft targets on dense class outputs, by hand from the heads' raw outputs."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from det_support import build, detector, distilled, losses, raw_batch, save_teacher


def _outputs(model):
    """Class logits of student and teacher as ``(all anchors of the batch, C)``."""
    data = model.train().data_preprocessor(copy.deepcopy(raw_batch()), True)
    with torch.no_grad():
        pair = model(data["inputs"], mode="tensor"), model.distiller.teacher.model(data["inputs"], mode="tensor")
    return [torch.cat([level.permute(0, 2, 3, 1).reshape(-1, 10) for level in out[0]]) for out in pair]


@pytest.mark.parametrize(("student", "teacher"), [("GFL", "ATSS"), ("ATSS", "GFL")])
def test_on_all_anchors_it_is_the_binary_kl_over_the_teachers_scores(student, teacher, tmp_path):
    other = detector(teacher, width=6, channels=12)
    checkpoint = save_teacher(tmp_path / "teacher.pth", other)
    terms = [
        dict(type="SoftTargets", temperature=2.0),
        dict(type="SoftTargets", name="focused", focus=1.0, classes="mean"),
    ]
    model = build(distilled(detector(student, frozen_bn=True), other, checkpoint, terms=terms))
    found = losses(model, raw_batch())
    s, t = _outputs(model)
    p_s, p_t = (s / 2).sigmoid(), (t / 2).sigmoid()
    kl = p_t * (p_t / p_s).log() + (1 - p_t) * ((1 - p_t) / (1 - p_s)).log()
    count = t.sigmoid().amax(1).sum()  # the number of objects as the teacher sees them
    assert found["distill.soft_targets.loss"].item() == pytest.approx((4 * kl.sum() / count).item(), rel=1e-4)
    bce = F.binary_cross_entropy_with_logits(s, t.sigmoid(), reduction="none")
    entropy = F.binary_cross_entropy_with_logits(t, t.sigmoid(), reduction="none")
    focused = ((bce - entropy) * (t.sigmoid() - s.sigmoid()).abs()).mean(1).sum() / count
    assert found["distill.focused.loss"].item() == pytest.approx(focused.item(), rel=1e-4)
