"""Estimators of depth, which mmseg builds of the same parts: features are distilled without classes of pixels, scores are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmengine.structures import PixelData

from kdgraft.errors import WiringError
from support.seg import batch, build, distilled, losses_of, save_teacher, segmentor

SCORES = ("SoftTargets", "DIST", "ChannelWise", "AdversarialMask")


def depth_estimator(width: int = 16) -> dict[str, Any]:
    """The ``model`` entry of a small ``DepthEstimator``."""
    plain = segmentor(width=width)
    channels = [width * 2**i for i in range(4)]
    backbone = dict(plain["backbone"], strides=(1, 2, 2, 2), dilations=(1, 1, 1, 1), contract_dilation=False)
    head = dict(
        type="VPDDepthHead",
        in_channels=channels,
        embed_dim=8,
        feature_dim=64,
        num_deconv_layers=3,
        num_deconv_filters=(8, 8, 8),
    )
    return dict(
        type="DepthEstimator",
        data_preprocessor=plain["data_preprocessor"],
        backbone=backbone,
        decode_head=head,
        train_cfg=dict(),
        test_cfg=dict(mode="whole"),
    )


def depths(content: tuple[int, int] | None = None) -> tuple[torch.Tensor, list[Any]]:
    """A batch whose samples hold depths in place of classes."""
    inputs, samples = batch(content=content)
    for sample in samples:
        shape = sample.gt_sem_seg.data.shape
        del sample.gt_sem_seg
        sample.gt_depth_map = PixelData(data=1 + torch.rand(shape, generator=torch.Generator().manual_seed(3)))
    return inputs, samples


@pytest.mark.parametrize("region", ["all", None])
def test_features_of_a_depth_estimator_are_distilled_where_the_image_is(tmp_path, region):
    teacher = save_teacher(tmp_path / "teacher.pth", depth_estimator(), classes=None)
    term = dict(type="FeatureImitation", tap="backbone[2]", adapter="none") | ({"region": region} if region else {})
    model = build(distilled(depth_estimator(), teacher, terms=[term]))
    inputs, samples = depths(content=(64, 32))
    losses = losses_of(model, inputs, samples)
    # Stride 16: of 4 columns the left 2 lie in the image.
    plain = build(depth_estimator())
    plain.load_state_dict(model.state_dict())
    ours = plain.train().backbone(inputs)[2][..., :2]
    theirs = model.distiller.teacher.model.backbone(inputs)[2][..., :2]
    expected = F.mse_loss(ours, theirs)
    assert losses["distill.feature_imitation.loss"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert losses["decode.loss_silog"] > 0


def test_depth_estimators_and_segmentors_share_features(tmp_path):
    depth, scores = depth_estimator(), segmentor(width=16)
    term = dict(type="PairwiseAffinity", tap="backbone[2]")
    for student, teacher, data in ((depth, scores, depths()), (scores, depth, batch())):
        spec = save_teacher(tmp_path / "teacher.pth", teacher, classes=None)
        losses = losses_of(build(distilled(student, spec, terms=[term])), *data)
        assert losses["distill.pairwise_affinity.loss"] > 0


def test_depths_are_no_class_outputs(tmp_path):
    spec = save_teacher(tmp_path / "teacher.pth", depth_estimator(), classes=("a", "b"))
    model = build(distilled(depth_estimator(), spec, terms=[dict(type="FeatureImitation", tap="decode_head")]))
    model.start_distilling(("b", "a"))
    assert losses_of(model, *depths())["distill.feature_imitation.loss"] > 0


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_terms_on_class_scores_are_refused(tmp_path, kind, side):
    depth, scores = depth_estimator(), segmentor(width=16)
    spec = save_teacher(tmp_path / "teacher.pth", scores if side == "student" else depth, classes=None)
    student = scores if side == "teacher" else depth
    owner = "teacher" if side == "teacher" else "student"
    with pytest.raises(WiringError, match=rf"the {owner}, a DepthEstimator, scores no classes of pixels") as caught:
        build(distilled(student, spec, terms=[dict(type=kind)]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["ClassPrototypes", "CrossImageRelations"])
def test_terms_that_group_pixels_by_class_are_refused_of_a_student_without(tmp_path, kind):
    spec = save_teacher(tmp_path / "teacher.pth", depth_estimator(), classes=None)
    with pytest.raises(WiringError, match="needs classes of pixels, and the student, a DepthEstimator"):
        build(distilled(depth_estimator(), spec, terms=[dict(type=kind, tap="backbone[2]")]))
    model = build(distilled(segmentor(width=16), spec, terms=[dict(type=kind, tap="backbone[2]")]))
    assert all(loss.isfinite() for name, loss in losses_of(model, *batch()).items() if name.startswith("distill."))
