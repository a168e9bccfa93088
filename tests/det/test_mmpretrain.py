"""MMPretrain's models as teachers of features of detectors, and as their backbones, where MMPretrain can be imported."""

from __future__ import annotations

import pytest
import torch

from support import pretrain
from support.det import build, detector, distilled, losses, raw_batch, save_teacher


@pytest.fixture(scope="module", autouse=True)
def library():
    pretrain.require()


def test_it_teaches_a_detector_and_hears_the_loaded_images(tmp_path):
    spec, network = pretrain.by_file(tmp_path / "vit.pth")
    heard = []

    def loss(student, teacher, dim=1, reduction="none"):
        heard.append(teacher)
        return (student - teacher).square().mean(dim)

    model = build(
        dict(distilled(detector(frozen_bn=True), None, ""), teacher=spec)
        | dict(terms=[dict(type="FeatureImitation", tap="neck[0]", loss=loss)])
    )
    model.start_distilling()
    batch = raw_batch()
    heard.clear()
    found = losses(model, batch)
    mean, std = (torch.tensor(pretrain.PIXELS[key])[:, None, None] for key in ("mean", "std"))
    images = torch.stack([(pixels.flip(0).float() - mean) / std for pixels in batch["inputs"]])  # loaded in BGR
    with torch.no_grad():
        torch.testing.assert_close(heard[0], network.backbone(images)[-1], rtol=1e-4, atol=1e-4)
    found["distill.feature_imitation.loss"].backward()
    assert sum(float(p.grad.abs().sum()) for p in model.backbone.parameters() if p.grad is not None) > 0


def test_its_backbones_are_students_and_teachers_in_detection(tmp_path):
    entry = detector()
    entry["backbone"], entry["neck"]["in_channels"] = dict(pretrain.RESNET, norm_eval=True), [64, 128, 256, 512]
    terms = [dict(type="FeatureImitation", tap="backbone[2]"), "SoftTargets"]
    taught = distilled(entry, entry, save_teacher(tmp_path / "teacher.pth", entry), terms=terms)
    model = build(taught)
    assert type(model.backbone).__module__.startswith("mmpretrain.")
    assert type(model.distiller.teacher.model.backbone).__module__.startswith("mmpretrain.")
    found = losses(model, raw_batch())
    assert found["distill.feature_imitation.loss"] > 0 and found["distill.soft_targets.loss"] > 0
