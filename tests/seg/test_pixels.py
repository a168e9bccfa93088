"""SoftTargets, DIST, ChannelWise, FeatureImitation and Hint on real segmentors: each against its formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mmseg.models.decode_heads import FCNHead
from mmseg.registry import MODELS

from kdgraft import DIST, ChannelWise, FeatureImitation, Hint, Region, SoftTargets
from kdgraft.errors import DistillError, WiringError
from kdgraft.losses import (
    channel_wise,
    dist_between_classes,
    dist_within_classes,
    masked_generation,
    soft_targets,
)
from kdgraft_seg import TERMS
from kdgraft_seg.reader import EMBEDDINGS
from support.seg import batch, build, distilled, losses_of, played, save_teacher, segmentor, total


def model_of(teacher, student=None, **term):
    return build(distilled(student or segmentor(dropout=0.0), teacher, terms=[{**term, "name": "term"}]))


def scores(classes: int = 11, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(2, classes, 8, 8, generator=generator) for _ in range(2)]


def valid_of(samples) -> torch.Tensor:
    return torch.cat([sample.gt_sem_seg.data[:, 4::8, 4::8] for sample in samples]) != 255


def loss_of(model, student, teacher, samples, tap="logits"):
    losses, slope = played(model, student, teacher, samples, tap=tap)
    return losses["distill.term.loss"], slope


# --- soft targets


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_soft_targets_by_hand(teacher, temperature):
    model = model_of(teacher, type="SoftTargets", temperature=temperature, weight=0.5)
    samples = batch(ignored=0.3)[1]
    student, target = scores()
    loss, slope = loss_of(model, student, target, samples)
    valid = valid_of(samples)
    s, t = (x.permute(0, 2, 3, 1)[valid] / temperature for x in (student, target))
    expected = 0.5 * temperature**2 * (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(loss, expected)
    # The gradient of a pixel's score: T (q - p) over the number of pixels.
    by_hand = 0.5 * temperature * (s.softmax(1) - t.softmax(1)) / valid.sum()
    torch.testing.assert_close(slope.permute(0, 2, 3, 1)[valid], by_hand)


def test_equal_scores_cost_nothing(teacher):
    same = scores()[0]
    for kind in ("SoftTargets", "DIST", "ChannelWise"):
        loss, slope = loss_of(model_of(teacher, type=kind), same, same, batch()[1])
        assert loss.abs() < 1e-5 and slope.abs().max() < 1e-5


@pytest.fixture
def binary(tmp_path):
    entry = segmentor(classes=2, dropout=0.0)
    entry["decode_head"].update(
        out_channels=1, threshold=0.5, loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=True)
    )
    del entry["auxiliary_head"]
    return entry, save_teacher(tmp_path / "binary.pth", entry, classes=("no", "yes"))


def test_a_binary_head_is_compared_as_a_sigmoid(binary):
    entry, teacher = binary
    model = model_of(teacher, entry, type="SoftTargets", temperature=2.0)
    samples = batch(classes=2, ignored=0.3)[1]
    student, target = scores(1)
    loss, slope = loss_of(model, student, target, samples)
    p, q = ((x[:, 0][valid_of(samples)] / 2).sigmoid() for x in (target, student))
    expected = 4 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    assert slope.abs().sum() > 0
    assert torch.isfinite(losses_of(model, *batch(classes=2))["distill.term.loss"])


def test_a_binary_head_has_no_correlation_between_classes(binary):
    entry, teacher = binary
    with pytest.raises(WiringError, match=r"score each class on its own; use SoftTargets"):
        model_of(teacher, entry, type="DIST")


# --- DIST


def test_dist_by_hand(teacher):
    model = model_of(teacher, type="DIST", beta=0.5, gamma=2.0)
    samples = batch(ignored=0.3)[1]
    student, target = scores()
    loss, _ = loss_of(model, student, target, samples)
    p, q = (x.permute(0, 2, 3, 1)[valid_of(samples)].softmax(1) for x in (student, target))
    between = torch.stack([1 - torch.corrcoef(torch.stack([a, b]))[0, 1] for a, b in zip(p, q, strict=True)]).mean()
    within = torch.stack([1 - torch.corrcoef(torch.stack([a, b]))[0, 1] for a, b in zip(p.T, q.T, strict=True)]).mean()
    torch.testing.assert_close(loss, 0.5 * between + 2 * within, rtol=1e-4, atol=1e-5)
    # And it is the core's two losses.
    weight = valid_of(samples)
    parts = [f(student, target, dim=1, weight=weight.float()) for f in (dist_between_classes, dist_within_classes)]
    torch.testing.assert_close(loss, 0.5 * parts[0] + 2 * parts[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_pixel_that_is_not_finite_drops_dist(teacher, value):
    model = model_of(teacher, type="DIST")
    target = scores()[1]
    target[0, 3, 4, 4] = value
    model.distiller.teacher.model.decode_head.forward = lambda inputs: target
    losses = losses_of(model, *batch(ignored=0.0))
    assert losses["distill.term.dropped"] == 1 and losses["distill.term.loss"] == 0
    total(losses).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


# --- channel-wise, and the core's feature terms


def test_channel_wise_is_the_core_loss_on_the_pixels_that_count(teacher):
    model = model_of(teacher, type="ChannelWise", weight=3.0, temperature=2.0)
    samples = batch(ignored=0.3)[1]
    student, target = scores()
    loss, _ = loss_of(model, student, target, samples)
    torch.testing.assert_close(loss, 3 * channel_wise(student, target, 2.0, valid=valid_of(samples)))
    assert not list(model.distiller.terms["term"].parameters())


def test_channel_wise_of_features_has_an_adapter_where_the_widths_differ(teacher):
    model = model_of(teacher, type="ChannelWise", tap="backbone[2]")
    term = model.distiller.terms["term"]
    assert not term.compares_classes and "ConvAdapter 16→32" in model.distiller.rows[0].adapter
    assert model_of(teacher, type="ChannelWise").distiller.terms["term"].compares_classes


@pytest.mark.parametrize(
    "taps", [["decode_head", "backbone[2]"], dict(student_tap="decode_head", teacher_tap="backbone[2]")]
)
def test_scores_and_features_are_not_mixed_in_one_channel_wise(teacher, taps):
    settings = taps if isinstance(taps, dict) else dict(tap=taps)
    with pytest.raises(DistillError, match="add a term for each"):
        model_of(teacher, type="ChannelWise", **settings)


@pytest.mark.parametrize("kind", ["FeatureImitation", "Hint"])
def test_features_are_imitated_where_pixels_count(teacher, kind):
    model = model_of(teacher, type=kind, tap=EMBEDDINGS)
    samples = batch(ignored=0.3)[1]
    generator = torch.Generator().manual_seed(0)
    student, target = (torch.randn(2, width, 8, 8, generator=generator) for width in (16, 32))
    loss, _ = loss_of(model, student, target, samples, tap="features")
    adapted = model.distiller.terms["term"].adapters[0](student, target)
    expected = (adapted - target).square().mean(1)[valid_of(samples)].mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    assert model.distiller.rows[0].region == "all"


class Everywhere(Region):
    """Ignored pixels too."""

    def __call__(self, batch, feature, scale=1.0):
        return torch.ones_like(feature[:, 0])


def test_other_regions_may_be_given(teacher):
    whole = model_of(teacher, type="FeatureImitation", tap="backbone[3]", region=Everywhere())
    part = model_of(teacher, type="FeatureImitation", tap="backbone[3]")
    given = batch(ignored=0.4)
    found = [losses_of(model, *given)["distill.term.loss"] for model in (whole, part)]
    assert found[0] != found[1]
    with pytest.raises(WiringError, match="region 'foreground' needs boxes, not given here"):
        model_of(teacher, type="FeatureImitation", tap="backbone[3]", region="foreground")


# --- heads


@MODELS.register_module()
class SeveralScoresHead(FCNHead):
    """Answers with a dict, as a head of masks and queries would."""

    def forward(self, inputs):
        return {"masks": super().forward(inputs)}


# --- masked generation


def test_masked_generation_has_the_authors_settings_and_is_the_core_loss_on_the_pixels_that_count(teacher):
    recipe = build(distilled(segmentor(dropout=0.0), teacher, recipe="mgd")).distiller
    term, (row,) = recipe.terms["mgd"], recipe.rows
    assert (term.mask_ratio, term.weight, row.region, row.student_tap) == (0.75, 2e-5, "all", "backbone[-1]")
    model = model_of(teacher, type="MaskedGeneration", tap=EMBEDDINGS, mask_ratio=0, weight=1.0)
    generator = torch.Generator().manual_seed(2)
    student, target = (torch.randn(2, channels, 8, 8, generator=generator) for channels in (16, 32))
    samples = batch(ignored=0.3)[1]
    loss, slope = loss_of(model, student, target, samples, tap="features")
    held, valid = model.distiller.terms["term"], valid_of(samples)
    keep = torch.ones_like(valid)
    with torch.no_grad():
        adapted = held.adapters[0](student, target)
        expected = masked_generation(adapted, target, held.parts[0], keep, valid=valid.float())
    torch.testing.assert_close(loss, expected)
    assert not slope.permute(0, 2, 3, 1)[~valid].any() and slope.any()


@pytest.mark.parametrize("kind", ["SoftTargets", "DIST", "ChannelWise", "AdversarialMask"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_head_that_yields_no_map_of_scores_is_refused(teacher, kind, side):
    odd = segmentor()
    odd["decode_head"]["type"] = "SeveralScoresHead"
    entry = (
        distilled(odd, teacher, terms=[kind])
        if side == "student"
        else distilled(segmentor(), dict(config=odd, checkpoint="absent.pth"), terms=[kind])
    )
    with pytest.raises(WiringError) as caught:
        build(entry)
    message = str(caught.value)
    assert f"'decode_head' of the {side} (SeveralScoresHead) yields a dict, no map of class scores" in message
    assert "\n" not in message


def pidnet(width: int = 4) -> dict:
    """PIDNet, whose head yields three maps in training and one in inference."""
    entry = segmentor(dropout=0.0)
    del entry["auxiliary_head"]
    entry["backbone"] = dict(
        type="PIDNet",
        in_channels=3,
        channels=width,
        ppm_channels=8,
        num_stem_blocks=1,
        num_branch_blocks=1,
        align_corners=False,
    )
    ohem = dict(type="OhemCrossEntropy", thres=0.9, min_kept=100, loss_weight=1.0)
    losses = [dict(type="CrossEntropyLoss", loss_weight=1.0), ohem, dict(type="BoundaryLoss", loss_weight=1.0), ohem]
    entry["decode_head"] = dict(
        type="PIDHead",
        in_channels=4 * width,
        channels=4 * width,
        num_classes=11,
        norm_cfg=dict(type="BN", requires_grad=True),
        align_corners=True,
        loss_decode=losses,
    )
    return entry


def test_a_real_time_head_with_several_outputs_in_training_is_compared_by_its_main_one(teacher):
    from mmengine.structures import PixelData

    model = model_of(teacher, pidnet(), type="SoftTargets").train()
    inputs, samples = batch()
    for sample in samples:
        sample.gt_edge_map = PixelData(data=(sample.gt_sem_seg.data % 2).clamp(max=1))
    recorded = {}
    own = model.decode_head.forward

    def forward(features):
        recorded["maps"] = own(features)
        return recorded["maps"]

    model.decode_head.forward = forward
    losses = model.loss(inputs, samples)
    assert len(recorded["maps"]) == 3
    with torch.no_grad():
        target = model.distiller.teacher.model(inputs, None, mode="tensor")
    main = F.interpolate(recorded["maps"][1], size=target.shape[-2:], mode="bilinear", align_corners=True)
    valid = torch.cat([s.gt_sem_seg.data for s in samples])[:, 4::8, 4::8] != 255
    expected = soft_targets(main, target, 1.0, dim=1, weight=valid.float())
    torch.testing.assert_close(losses["distill.term.loss"], expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SoftTargets(temperature=0), "temperature must be > 0"),
        (lambda: DIST(beta=-1), "beta must be a number >= 0"),
        (lambda: DIST(temperature=-1), "temperature must be > 0"),
        (lambda: ChannelWise(temperature=0), "temperature must be > 0"),
        (FeatureImitation, "needs a tap"),
        (lambda: TERMS.build(dict(type="PearsonImitation", tap="a", loss="hint")), "takes no argument 'loss'"),
        (lambda: TERMS.build(dict(type="MaskedGeneration", loss="hint")), "takes no argument 'loss'"),
        (lambda: TERMS.build(dict(type="ChannelWise", grid="labels")), "takes no argument 'grid'"),
        (lambda: Hint(tap="backbone[3]", region="vaild"), "no region is called 'vaild'"),
    ],
)
def test_wrong_settings(make, message):
    with pytest.raises(DistillError) as caught:
        make()
    assert message in str(caught.value) and "\n" not in str(caught.value)
