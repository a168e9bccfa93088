"""Every term trains a real detector, or says why detectors lack what it needs; those on heads: ``test_support.py``, for every head."""

from __future__ import annotations

import pytest

from kdgraft import DistillError, FeatureTerm
from kdgraft_det import TERMS
from kdgraft_det.reader import DetReader
from support import det_table
from support.det import build, detector, distilled, losses, raw_batch, save_teacher
from support.det_methods import LACKING, MODELS, OWN, SETTINGS, USABLE, model
from support.det_stages import with_masks
from support.methods import assert_falls, assert_shared, sharing, spec, trained


@pytest.mark.parametrize("kind", USABLE)
def test_trains_a_detector(kind, tmp_path):
    teacher = model(kind, width=6, channels=12)
    term = spec(OWN[kind], "neck[*]", **SETTINGS.get(kind, {}))
    built = build(distilled(model(kind), teacher, save_teacher(tmp_path / "teacher.pth", teacher), terms=[term]))
    batch = with_masks(raw_batch()) if MODELS.get(kind) == "Mask R-CNN" else raw_batch()
    assert_falls(trained(lambda: losses(built, batch), built.parameters()))
    if issubclass(OWN[kind], FeatureTerm) and term["tap"] == "neck[*]":
        assert len(built.distiller.rows) == len(built.neck.fpn_convs)
        assert built.distiller.terms["term"].adapter_kind == "any" or "8→12" in built.distiller.rows[0].adapter


@pytest.mark.parametrize("kind", sharing(TERMS))
@pytest.mark.parametrize("share", [0.25, 0.0])
def test_takes_a_share_of_a_detector_s_losses(kind, share, tmp_path):
    teacher = detector()
    terms = [dict(type=kind, name="term", share=share), "SoftTargets"]
    built = build(distilled(detector(), teacher, save_teacher(tmp_path / "teacher.pth", teacher), terms=terms))
    plain = build(detector())
    plain.load_state_dict(built.state_dict())
    assert_shared(losses(built, raw_batch()), losses(plain, raw_batch()), share)


@pytest.mark.parametrize("kind", LACKING)
def test_what_detectors_lack_is_said(kind, tmp_path):
    teacher = detector()
    with pytest.raises(DistillError) as caught:
        build(distilled(detector(), teacher, save_teacher(tmp_path / "teacher.pth", teacher), terms=[kind]))
    reasons = [reason for need, reason in DetReader.lacks.items() if need in OWN[kind].needs]
    assert any(str(caught.value).endswith(reason) for reason in reasons) and "\n" not in str(caught.value)


def test_detection_s_own_terms_are_in_the_support_table():
    shown = {det_table.TECHNIQUES[technique]["type"] for technique in det_table.TECHNIQUES}
    assert {name for name in OWN if OWN[name].__module__.startswith("kdgraft_det")} <= shown
