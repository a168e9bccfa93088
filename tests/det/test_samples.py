"""Relations between images of detectors: padding is left out, images are remembered by their id, proposals are no samples."""

from __future__ import annotations

import copy

import pytest
import torch

from kdgraft import WiringError
from kdgraft.losses import rkd_distance
from support.det import build, detector, distilled, losses, raw_batch, save_teacher
from support.det_stages import staged

SIZES = [(96, 96), (96, 64), (64, 96), (64, 64)]


def student(tmp_path, model=detector, **settings):
    teacher = model(channels=12)
    return build(distilled(model(), teacher, save_teacher(tmp_path / "teacher.pth", teacher), **settings))


def test_padding_is_left_out_by_hand(tmp_path):
    built = student(
        tmp_path, lambda **sizes: detector(frozen_bn=True, **sizes), recipe=dict(type="rkd", angle=0, name="term")
    )
    batch = raw_batch(sizes=SIZES)
    loss = losses(built, batch)["distill.term.loss"]
    inputs = built.data_preprocessor(copy.deepcopy(batch), True)["inputs"]
    vectors = []
    for net in (built, built.distiller.teacher.model):
        maps = net.backbone(inputs)[-1]
        stride = inputs.shape[-1] // maps.shape[-1]
        cut = [(round(height / stride), round(width / stride)) for height, width in SIZES]
        vectors.append(torch.stack([x[:, :h, :w].mean((1, 2)) for x, (h, w) in zip(maps, cut, strict=True)]))
    torch.testing.assert_close(loss, rkd_distance(*vectors))
    assert len(set(cut)) == 4


def test_images_are_remembered_by_their_id(tmp_path):
    built = student(tmp_path, recipe=dict(type="crd", name="term", width=4))
    for _ in range(2):
        losses(built, raw_batch())
    term = built.distiller.terms["term"]
    assert term._places == {0: 0, 1: 1, 2: 2, 3: 3}
    assert (term.classes < 0).all()  # an image has no one class


def test_proposals_are_no_samples(tmp_path):
    with pytest.raises(WiringError, match="gives no vector per sample"):
        student(
            tmp_path,
            lambda **sizes: staged("Faster R-CNN", **sizes),
            terms=[dict(type="RKD", tap="roi_head.bbox_roi_extractor")],
        )
