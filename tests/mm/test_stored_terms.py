"""From a store every term computes what it computes with the teacher, or says that it needs the teacher; of every term of both hosts."""

from __future__ import annotations

import copy
from itertools import count

import pytest
import torch
from mmengine.logging import MessageHub
from mmengine.registry import DefaultScope

from kdgraft import DistillError
from support.methods import spec
from support.tensors import gradients

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
from kdgraft_bench.costs.mm import fill_by_batch
from kdgraft_mm.sources import identity_of
from support import det, det_masks, det_methods, seg, seg_methods
from support.det_stages import STAGED

pytestmark = pytest.mark.slow
RUN = {"WeightMatching", "MasKD", "FreeKD"}
"""Terms that need their teacher in each step: its weights, or its own loss, in every host."""
ON_PROPOSALS = {name for name, model in det_methods.MODELS.items() if model in STAGED}
_names = count()


def enter(scope):
    name = f"stored_{scope}_{next(_names)}"
    DefaultScope.get_instance(name, scope_name=scope)
    MessageHub.get_instance(name)


def check(kind, refused, built, batch, spec_of_teacher, folder):
    """A term that needs its teacher is refused, any other one is compared."""
    identity = identity_of(spec_of_teacher)
    if kind not in refused:
        compared(built({}), built, batch, identity, folder)
        return
    with pytest.raises(DistillError, match=r"would run on the student's proposals|or reads its weights"):
        compared(built({}), built, batch, identity, folder)


def compared(running, built, batch, identity, folder):
    """Three steps of both models, from the same weights, give the same losses and gradients."""
    fill_by_batch(running, batch(running), identity, str(folder))
    stored = built({"store": str(folder)})
    stored.load_state_dict(running.state_dict())
    stored.distiller.terms.load_state_dict(running.distiller.terms.state_dict())
    for _ in range(3):
        found = []
        for model in (running, stored):
            torch.manual_seed(0)
            model.train()
            losses = model.loss(*batch(model))
            total, _ = model.parse_losses(losses)
            model.zero_grad()
            total.backward()
            found.append((losses, gradients(model)))
        (expected, slopes), (ours, own) = found
        assert expected.keys() == ours.keys() and slopes.keys() == own.keys()
        for name, value in expected.items():
            for one, other in zip(*(v if isinstance(v, list) else [v] for v in (value, ours[name])), strict=True):
                assert torch.equal(one, other), name
        assert all(torch.equal(slopes[name], own[name]) for name in slopes)
    assert any(key.startswith("distill.") and float(value) for key, value in expected.items())
    assert all(parameter.is_meta for parameter in stored.distiller.teacher.model.parameters())


@pytest.mark.parametrize("kind", det_methods.USABLE)
def test_of_a_detector(kind, tmp_path, monkeypatch):
    enter("mmdet")
    monkeypatch.setattr("kdgraft_bench.costs.mm.VALUES", "float32")
    teacher = det_methods.model(kind, width=6, channels=12)
    checkpoint = det.save_teacher(tmp_path / "teacher.pth", teacher)
    term = spec(det_methods.OWN[kind], "neck[*]", **det_methods.SETTINGS.get(kind, {}))

    def built(more):
        entry = det.distilled(det_methods.model(kind), teacher, checkpoint, terms=[term])
        entry["teacher"] |= more
        model = det.build(entry)
        model.start_distilling(det.CLASSES)
        return model

    def batch(model):
        found = model.data_preprocessor(copy.deepcopy(det.raw_batch()), True)
        for place, sample in enumerate(found["data_samples"]):
            sample.set_metainfo({"view": (0, place)})
        return found["inputs"], found["data_samples"]

    check(kind, RUN | ON_PROPOSALS | {"CrossHead", "KDDETR"}, built, batch, dict(config=teacher), tmp_path / "store")


@pytest.mark.parametrize("kind", ["RTMDet-Ins", "Mask2Former"])
def test_of_the_masks_of_a_detector_without_proposals(kind, tmp_path, monkeypatch):
    enter("mmdet")
    monkeypatch.setattr("kdgraft_bench.costs.mm.VALUES", "float32")
    teacher = det_masks.model(kind, width=6)
    checkpoint = det.save_teacher(tmp_path / "teacher.pth", teacher)
    terms = [dict(type="InstanceMasks", name="term"), dict(type="SoftTargets")]

    def built(more):
        entry = det.distilled(det_masks.model(kind, frozen_bn=True), teacher, checkpoint, terms=terms)
        entry["teacher"] |= more
        model = det.build(entry)
        model.start_distilling(det.CLASSES)
        return model

    def batch(model):
        found = model.data_preprocessor(det_masks.batch(), True)
        for place, sample in enumerate(found["data_samples"]):
            sample.set_metainfo({"view": (0, place)})
        return found["inputs"], found["data_samples"]

    compared(built({}), built, batch, identity_of(dict(config=teacher)), tmp_path / "store")


@pytest.mark.parametrize("kind", seg_methods.USABLE)
def test_of_a_segmentor(kind, tmp_path, monkeypatch):
    enter("mmseg")
    monkeypatch.setattr("kdgraft_bench.costs.mm.VALUES", "float32")
    teacher = seg.save_teacher(tmp_path / "teacher.pth")
    term = spec(seg_methods.OWN[kind], "backbone[2]", **seg_methods.SETTINGS.get(kind, {}))

    def built(more):
        student = seg.segmentor(dropout=0.0, frozen_bn=True)
        model = seg.build(seg.distilled(student, {**teacher, **more}, terms=[term]))
        model.start_distilling(seg.CLASSES)
        return model

    def batch(model):
        inputs, samples = seg.batch(4, ignored=0.3)
        for place, sample in enumerate(samples):
            sample.set_metainfo({"view": (0, place)})
        return inputs, samples

    check(kind, RUN | {"GradientTransfer"}, built, batch, dict(config=teacher["config"]), tmp_path / "store")
