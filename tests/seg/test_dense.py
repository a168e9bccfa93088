"""What all segmentation terms share: which pixels count, on which grid the two models meet, what is not finite."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import DefaultScope
from mmseg.registry import DATASETS

from kdgraft.batch import Batch
from kdgraft.errors import WiringError
from kdgraft_seg.reader import EMBEDDINGS, counted, labels_on
from support.seg import (
    CLASSES,
    SMALL_CRITIC,
    batch,
    build,
    config,
    distilled,
    losses_of,
    played,
    save_teacher,
    segmentor,
    total,
)
from support.tensors import assert_same, distillation, gradients

LOGIT_TERMS = {
    "SoftTargets": dict(type="SoftTargets"),
    "DIST": dict(type="DIST"),
    "ChannelWise": dict(type="ChannelWise"),
    "AdversarialMask": dict(type="AdversarialMask", critic=SMALL_CRITIC),
    "AdversarialMask with image": dict(type="AdversarialMask", critic=SMALL_CRITIC, condition_on_image=True),
}
# Everything enters the memory and everything is compared, so that nothing is drawn.
RELATIONS = dict(
    type="CrossImageRelations", nodes=144, anchors=999, contrast=9999, pixels_per_class=300, regions_per_class=8
)
FEATURE_TERMS = {
    "PairwiseAffinity": dict(type="PairwiseAffinity"),
    "PairwiseAffinity max": dict(type="PairwiseAffinity", pool="max"),
    "PairwiseAffinity by channels": dict(type="PairwiseAffinity", patch=1),
    "ClassPrototypes": dict(type="ClassPrototypes"),
    "CrossImageRelations": dict(**RELATIONS, new_pixels=300),
    "ChannelWise features": dict(type="ChannelWise", tap=EMBEDDINGS),
    "FeatureImitation": dict(type="FeatureImitation", tap=EMBEDDINGS),
    "PearsonImitation": dict(type="PearsonImitation", tap=EMBEDDINGS),
    "MaskedGeneration": dict(type="MaskedGeneration", tap=EMBEDDINGS, mask_ratio=0, weight=1.0),
}
EVERY = {**LOGIT_TERMS, **FEATURE_TERMS}
every_term = pytest.mark.parametrize("kind", list(EVERY))


_built: dict[str, Any] = {}


def model_of(kind: str, teacher, student=None):
    """A student with one term. Those whose term remembers nothing of its steps are built once."""
    key = "" if student or kind.startswith(("AdversarialMask", "CrossImage")) else kind + teacher["checkpoint"]
    if key not in _built:
        terms = [{**EVERY[kind], "name": "term"}]
        _built[key] = build(distilled(student or segmentor(dropout=0.0), teacher, terms=terms))
    model = _built[key] if key else _built.pop(key)
    model.zero_grad()
    return model


def maps(kind: str, images: int = 2, size: int = 8, seed: int = 0):
    """Student's and teacher's class scores, or features of 16 and 32 channels."""
    generator = torch.Generator().manual_seed(seed)
    widths = (11, 11) if kind in LOGIT_TERMS else (16, 32)
    return [2 * torch.randn(images, width, size, size, generator=generator) for width in widths]


def play(kind, model, student, teacher, samples):
    return played(model, student, teacher, samples, tap="logits" if kind in LOGIT_TERMS else "features")


def own(model) -> list[torch.Tensor]:
    return list(model.distiller.terms.parameters())


def ignored_positions(samples) -> torch.Tensor:
    """Which of the 8×8 positions do not count: labels are in blocks of 8 pixels."""
    return torch.cat([sample.gt_sem_seg.data[:, 4::8, 4::8] for sample in samples]) == 255


# --- ignored pixels and padding


@every_term
def test_what_stands_at_ignored_pixels_changes_no_loss_and_no_gradient(teacher, kind):
    samples = batch(seed=1, ignored=0.3)[1]
    outside = ignored_positions(samples)[:, None]
    assert 20 < outside.sum() < 60
    noise = torch.randn(maps(kind)[0].shape, generator=torch.Generator().manual_seed(9))
    found = []
    # A teacher in half precision may be infinite where it has never seen a pixel that counts.
    for junk, target_junk in ((0.0, 0.0), (1e3, -1e3), (0.0, math.inf)):
        model = model_of(kind, teacher)
        student, target = maps(kind)
        student = torch.where(outside, junk * noise, student)
        losses, slope = play(kind, model, student, target.masked_fill(outside, target_junk), samples)
        assert (slope.masked_select(outside.expand_as(slope)) == 0).all()
        assert slope.abs().sum() > 0 and torch.isfinite(slope).all()
        found.append({**{k: v.detach() for k, v in losses.items() if k.startswith("distill.")}, "slope": slope})
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


@every_term
def test_labels_under_the_padding_do_not_count(teacher, kind):
    found = []
    for label in (255, 3):
        model = model_of(kind, teacher)
        samples = batch(content=(48, 40))[1]
        for sample in samples:
            sample.gt_sem_seg.data[:, 48:] = label
            sample.gt_sem_seg.data[:, :, 40:] = label
        losses, slope = play(kind, model, *maps(kind), samples)
        assert (slope[:, :, 6:] == 0).all() and (slope[:, :, :, 5:] == 0).all() and slope.abs().sum() > 0
        found.append({"loss": losses["distill.term.loss"].detach(), "slope": slope})
    assert_same(*found)


# A critic of whole masks sees how large the padding is (0 in both masks), not what is in it.
@pytest.mark.parametrize("kind", [kind for kind in EVERY if not kind.startswith("AdversarialMask")])
def test_growing_the_padding_changes_no_loss_and_no_gradient(teacher, kind):
    found = []
    for size in (64, 96):
        model = model_of(kind, teacher)
        samples = batch(size=size, content=(64, 64), ignored=0.0)[1]
        label = batch(size=64, seed=5)[1]
        for sample, given in zip(samples, label, strict=True):
            sample.gt_sem_seg.data[:, :64, :64] = given.gt_sem_seg.data
        grown = [F.pad(each, (0, size // 8 - 8) * 2, value=7.0) for each in maps(kind)]
        losses, slope = play(kind, model, *grown, samples)
        found.append((losses["distill.term.loss"], slope[:, :, :8, :8], slope.abs().sum()))
    for small, large in zip(*found, strict=True):
        torch.testing.assert_close(small, large, rtol=2e-4, atol=1e-6)


@every_term
def test_all_pixels_ignored_is_zero_with_a_live_graph(teacher, kind):
    model = model_of(kind, teacher)
    inputs, samples = batch()
    for sample in samples:
        sample.gt_sem_seg.data.fill_(255)
    losses = losses_of(model, inputs, samples)
    assert losses["distill.term.loss"] == 0 and "distill.term.dropped" not in losses
    losses["distill.term.loss"].backward()
    reached = gradients(model)
    assert any(name.startswith("backbone") for name in reached)
    assert all(torch.isfinite(gradient).all() and (gradient == 0).all() for gradient in reached.values())
    # The term's own parameters stay in the graph, for DDP.
    assert all(p.grad is not None for p in own(model))
    # And the next step is as if nothing had been.
    samples[0].gt_sem_seg.data[:, :32] = 2
    losses = losses_of(model, inputs, samples)
    assert torch.isfinite(losses["distill.term.loss"]) and losses["distill.term.loss"] != 0


@every_term
def test_an_image_without_a_pixel_that_counts_takes_no_part(teacher, kind):
    found = []
    for images in (1, 2):
        model = model_of(kind, teacher)
        samples = batch(images=2, seed=2)[1][:images]
        for sample in samples[1:]:
            sample.gt_sem_seg.data.fill_(255)
        losses, slope = play(kind, model, *(each[:images] for each in maps(kind)), samples)
        assert losses["distill.term.loss"] != 0 and torch.isfinite(slope).all()
        assert (slope[1:] == 0).all()
        found.append((losses["distill.term.loss"].detach(), slope[0]))
    if kind.startswith("AdversarialMask"):  # the mixing of the penalty is drawn for as many images as there are
        torch.testing.assert_close(found[0], found[1], rtol=0.05, atol=1e-4)
    else:
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


@every_term
def test_classes_that_the_batch_lacks(teacher, kind):
    model = model_of(kind, teacher)
    samples = batch(classes=3)[1]
    losses, slope = play(kind, model, *maps(kind), samples)
    assert torch.isfinite(losses["distill.term.loss"]) and losses["distill.term.loss"] != 0
    assert torch.isfinite(slope).all() and slope.abs().sum() > 0
    for sample in samples:
        sample.gt_sem_seg.data.fill_(4)  # one class alone
    losses, slope = play(kind, model, *maps(kind), samples)
    assert torch.isfinite(losses["distill.term.loss"]) and torch.isfinite(slope).all()


@every_term
def test_constant_maps_give_a_finite_gradient(teacher, kind):
    # As at the very start of training, or of a dead layer: a correlation or a cosine of nothing.
    model = model_of(kind, teacher)
    student, target = maps(kind)
    for flat in ((torch.zeros_like(student), target), (student, torch.zeros_like(target)), (student * 0, target * 0)):
        losses, slope = play(kind, model, *flat, batch()[1])
        assert torch.isfinite(losses["distill.term.loss"]) and torch.isfinite(slope).all()
        assert "distill.term.dropped" not in losses


# --- which labels


@pytest.mark.parametrize("kind", ["SoftTargets", "ClassPrototypes", "CrossImageRelations"])
def test_another_ignore_index(teacher, kind):
    student = segmentor(dropout=0.0)
    student["decode_head"]["ignore_index"] = 7
    found = []
    for label, entry in ((255, segmentor(dropout=0.0)), (7, student)):
        model = model_of(kind, teacher, entry)
        samples = batch(classes=6, ignored=0.3)[1]
        for sample in samples:
            data = sample.gt_sem_seg.data
            data[data == 255] = label
        if label == 7:
            assert model._batch(torch.zeros(2, 3, 64, 64), samples).valid.float().mean() < 0.9
        losses, slope = play(kind, model, *maps(kind), samples)
        found.append({"loss": losses["distill.term.loss"].detach(), "slope": slope})
    assert_same(*found)


def test_reduce_zero_label_is_the_datasets_and_what_it_ignores_counts_nowhere(scenes, tmp_path):
    # The ten digits alone: the dataset shifts the labels by one and turns the background into 255.
    entry = segmentor(classes=10, dropout=0.0)
    teacher = save_teacher(tmp_path / "t.pth", segmentor("PSPNet", width=8, classes=10), classes=CLASSES[1:])
    model = build(distilled(entry, teacher, terms=[*EVERY.values()]))
    spec = config(entry, scenes, tmp_path).train_dataloader.dataset.to_dict()
    spec.update(reduce_zero_label=True, metainfo=dict(classes=CLASSES[1:]))
    spec["pipeline"][1]["reduce_zero_label"] = True
    DefaultScope.get_instance("reduce_zero_label", scope_name="mmseg")
    items = [DATASETS.build(spec)[place] for place in range(2)]
    labels = torch.cat([item["data_samples"].gt_sem_seg.data for item in items])
    assert 255 in labels and labels[labels != 255].max() <= 9
    data = model.train().data_preprocessor(
        dict(inputs=[i["inputs"] for i in items], data_samples=[i["data_samples"] for i in items]), True
    )
    seen = model._batch(data["inputs"], data["data_samples"])
    assert torch.equal(seen.valid, labels != 255)
    losses = model.loss(data["inputs"], data["data_samples"])
    total(losses).backward()
    assert not any(name.endswith(".dropped") for name in losses)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())
    # The memory knows the digits of these images, and no background.
    seen_classes = set(labels[labels != 255].unique().tolist())
    remembered = set(model.distiller.terms["cross_image_relations"].seen[0].nonzero().flatten().tolist())
    assert remembered and remembered <= seen_classes


def test_positions_count_as_the_pixel_at_their_centre_does():
    batch_of = Batch(labels=torch.arange(64).view(1, 8, 8), valid=torch.ones(1, 8, 8, dtype=torch.bool))
    batch_of.valid[0, 2, 2] = batch_of.valid[0, 0, 0] = False
    # A position of a 4×4 grid covers 2×2 pixels; the pixel at its centre is the last of them.
    assert counted(batch_of, (4, 4)).all()
    batch_of.valid[0, 1, 1] = False
    assert counted(batch_of, (4, 4))[0].tolist() == [[False, True, True, True], *[[True] * 4] * 3]
    assert labels_on(batch_of, (4, 4))[0].tolist() == [
        [-1, 11, 13, 15],
        [25, 27, 29, 31],
        [41, 43, 45, 47],
        [57, 59, 61, 63],
    ]
    assert labels_on(batch_of, (8, 8))[0, 2, 2] == -1


# --- which grid


@pytest.mark.parametrize("corners", [False, True])
def test_scores_meet_on_the_labels_grid_as_the_host_resizes_them(tmp_path, corners):
    student, other = segmentor(dropout=0.0), segmentor("PSPNet", width=8)
    for entry in (student, other):
        entry["decode_head"]["align_corners"] = corners
    teacher = save_teacher(tmp_path / "t.pth", other)
    scores = [torch.randn(2, 11, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    model = build(distilled(student, teacher, terms=[dict(type="SoftTargets", grid="labels")]))
    samples = batch(ignored=0.0)[1]
    losses, _ = played(model, *scores, samples)
    # The host's own loss resizes with its resize(); so does this.
    from mmseg.models.utils import resize

    s, t = (resize(input=x, size=(64, 64), mode="bilinear", align_corners=corners) for x in scores)
    expected = (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(losses["distill.soft_targets.loss"], expected)
    other_way = [F.interpolate(x, size=(64, 64), mode="bilinear", align_corners=not corners) for x in scores]
    wrong = (other_way[1].softmax(1) * (other_way[1].log_softmax(1) - other_way[0].log_softmax(1))).sum(1).mean()
    assert abs(wrong - expected) > 1e-3


@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("kind", ["SoftTargets", "ChannelWise"])
def test_a_student_of_another_stride_is_resized_to_the_teachers_grid(teacher, kind, corners):
    student = segmentor("SegFormer", dropout=0.0)  # stride 4, the teacher's is 8
    student["decode_head"]["align_corners"] = corners
    model = model_of(kind, teacher, student)
    fine, coarse = maps(kind, size=16)[0], maps(kind, seed=1)[1]
    losses, slope = played(model, fine, coarse, batch(ignored=0.0)[1])
    assert slope.shape == fine.shape and "resize" in model.distiller.rows[0].adapter
    s = F.interpolate(fine, size=(8, 8), mode="bilinear", align_corners=corners)
    if kind == "SoftTargets":
        expected = (coarse.softmax(1) * (coarse.log_softmax(1) - s.log_softmax(1))).sum(1).mean()
    else:
        s, t = (x.flatten(2) / 4 for x in (s, coarse))
        expected = 16 * (t.softmax(2) * (t.log_softmax(2) - s.log_softmax(2))).sum(2).mean()
    torch.testing.assert_close(losses["distill.term.loss"], expected, rtol=1e-4, atol=1e-6)


@every_term
def test_strides_may_differ_either_way(tmp_path, kind):
    for student, other in (("SegFormer", "PSPNet"), ("FCN", "SegFormer")):
        path = tmp_path / f"{other}.pth"
        teacher = save_teacher(path, segmentor(other, width=8))
        model = model_of(kind, teacher, segmentor(student))
        losses = losses_of(model, *batch(content=(56, 64)))
        distillation(losses).backward()
        found = gradients(model)
        assert losses["distill.term.loss"] != 0 and all(torch.isfinite(g).all() for g in found.values())
        assert any(g.any() for name, g in found.items() if name.startswith("backbone"))


# --- what is not finite, and half precision


@every_term
def test_a_term_that_is_not_finite_is_dropped_and_counted_and_the_student_goes_on(teacher, kind):
    found = []
    for broken in (False, True):
        entry = distilled(
            segmentor(dropout=0.0),
            teacher,
            terms=[{**EVERY[kind], "name": "term"}, dict(type="ChannelWise", tap="backbone[2]", name="other")],
        )
        model = build(entry)
        head = model.distiller.teacher.model.decode_head
        if broken:
            if kind in LOGIT_TERMS:
                head.forward = lambda inputs: torch.full((2, 11, 8, 8), math.nan)
            else:
                head.forward = lambda inputs, h=head: h.cls_seg(torch.full((2, 32, 8, 8), math.nan))
        losses = losses_of(model, *batch())
        found.append((losses, model))
    losses, model = found[1]
    if kind.startswith("AdversarialMask"):
        assert losses["distill.term.skipped"] == 1  # the student's own masks are fine: the critic alone stands still
    else:
        assert losses["distill.term.loss"] == 0 and losses["distill.term.dropped"] == 1
        assert model.distiller.dropped == {"term": 1, "other": 0}
    for name, value in found[0][0].items():
        if not name.startswith("distill.term"):
            assert torch.equal(value, losses[name]), name
    total(losses).backward()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())
    assert all(p.grad is not None for p in model.parameters())


@every_term
def test_losses_under_autocast_are_finite_and_in_float32(teacher, kind):
    model = model_of(kind, teacher)
    exact = losses_of(copy.deepcopy(model) if "Adversarial" not in kind else model_of(kind, teacher), *batch())
    with torch.autocast("cpu", torch.bfloat16):
        losses = losses_of(model, *batch())
    value = losses["distill.term.loss"]
    assert value.dtype == torch.float32 and torch.isfinite(value) and value != 0
    assert value.item() == pytest.approx(exact["distill.term.loss"].item(), rel=0.3, abs=1e-3)
    distillation(losses).backward()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())


# --- wiring


@pytest.mark.parametrize("kind", ["SoftTargets", "DIST", "AdversarialMask", "ChannelWise"])
def test_class_counts_that_differ_are_refused(kind):
    teacher = dict(config=segmentor("PSPNet", width=8, classes=7), checkpoint="absent.pth")
    with pytest.raises(WiringError, match=r"scores 11 classes, the teacher's decode_head 7") as caught:
        model_of(kind, teacher)
    assert "\n" not in str(caught.value)


def test_features_of_teachers_with_other_classes_are_compared(tmp_path):
    teacher = save_teacher(tmp_path / "t.pth", segmentor("PSPNet", width=8, classes=7), classes=None)
    for kind in FEATURE_TERMS:
        if kind != "CrossImageRelations":
            assert losses_of(model_of(kind, teacher), *batch())["distill.term.loss"] > 0
