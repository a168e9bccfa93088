"""Soft targets on class outputs: dense ones by hand from the heads' raw outputs, and the mix with the host's own loss."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F

from kdgraft import DistillError, Step, WiringError
from kdgraft.terms import build_terms
from kdgraft_det.reader import DetReader
from support.det import CLASSES, build, detector, distilled, losses, raw_batch, save_teacher
from support.det_stages import STAGED, detr, staged
from support.det_zoo import zoo


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


def _proposals_alone(**settings):
    """A stand-alone network of proposals, from that of a Faster R-CNN."""
    model = staged("Faster R-CNN", **settings)
    cut = {key: model[key] for key in ("data_preprocessor", "backbone", "neck", "rpn_head")}
    return dict(cut, type="RPN", **{key: dict(rpn=model[key]["rpn"]) for key in ("train_cfg", "test_cfg")})


@pytest.mark.parametrize("kind", ["Faster R-CNN", "RPN"])
def test_a_sure_teacher_of_a_head_that_samples_is_worth_the_hosts_own_loss(kind, tmp_path):
    # Where no image has an object and the teacher is sure of that, soft and hard cross-entropy are one number.
    entry = _proposals_alone if kind == "RPN" else functools.partial(staged, kind)
    teacher = entry(width=6)
    checkpoint = save_teacher(tmp_path / "teacher.pth", teacher, classes=CLASSES[::-1])
    term = dict(type="SoftTargets", head="auto" if kind == "RPN" else "rpn_head", background_weight=1.0)
    model = build(distilled(entry(frozen_bn=True), teacher, checkpoint, terms=[term]))
    model.start_distilling(CLASSES)  # in another order, which objectness does not have
    output = model.distiller.teacher.model.get_submodule("bbox_head" if kind == "RPN" else "rpn_head").rpn_cls
    output.weight.zero_(), output.bias.fill_(-20)
    found = losses(model, raw_batch([[], []]))
    # mmdet counts one positive in an image that has none: two more than the sample's thousand.
    assert found["distill.soft_targets.loss"].item() == pytest.approx(found["loss_rpn_cls"].item(), rel=3e-3)


# --- the mix with the host's own loss

HEADS = {
    "GFL": ({}, {"loss_cls"}),
    "YOLOX": ({}, {"loss_cls", "loss_obj"}),
    "Faster R-CNN": ({}, {"loss_cls"}),
    "RPN": ({"head": "rpn_head"}, {"loss_rpn_cls"}),
    "FCOS as RPN": ({"head": "rpn_head"}, {"rpn_loss_cls"}),
    "Cascade R-CNN": ({}, {"s0.loss_cls", "s1.loss_cls"}),
    "DeformableDETR": ({}, {"loss_cls"}),
}
"""Detector: the term's settings and the host's losses that it shares."""


def _entry(kind, **settings):
    if kind == "DeformableDETR":
        return detr(kind, **settings)
    if kind not in ("RPN", "FCOS as RPN", *STAGED):
        return zoo(kind, **settings)
    model = staged(kind if kind in STAGED else "Faster R-CNN", **settings)
    if kind == "FCOS as RPN":
        model["rpn_head"] = dict(zoo("FCOS")["bbox_head"], num_classes=1)
    return model


@pytest.mark.parametrize("kind", list(HEADS))
def test_the_share_of_the_hosts_loss(kind, tmp_path):
    settings, shared = HEADS[kind]
    teacher = _entry(kind, width=6)
    checkpoint = save_teacher(tmp_path / "teacher.pth", teacher)
    terms = [
        dict(type="SoftTargets", name="whole", **settings),
        dict(type="SoftTargets", name="mixed", hard_weight=0.25, **settings),
        dict(type="SoftTargets", name="resting", hard_weight=0.5, weight=0.0, **settings),
        dict(type="SoftTargets", name="hard", hard_weight=1.0, **settings),
    ]
    model = build(distilled(_entry(kind, frozen_bn=True), teacher, checkpoint, terms=terms))
    found = losses(model, raw_batch())
    with torch.no_grad():
        host = losses(model, raw_batch())  # without gradient the host's loss is its own alone
    assert not any(key.startswith("distill") for key in host)
    for key, value in host.items():
        share = 0.25 if key in shared else 1.0
        assert found[key].item() == pytest.approx(share * value.item(), rel=1e-6), key
    assert shared <= set(host) and all(host[key] > 0 for key in shared)
    whole = found["distill.whole.loss"].item()
    assert whole > 0
    assert found["distill.mixed.loss"].item() == pytest.approx(0.75 * whole, rel=1e-6)
    assert found["distill.hard.loss"].item() == found["distill.resting.loss"].item() == 0


def test_a_schedule_at_0_leaves_the_hosts_loss_whole(teacher_model, teacher_checkpoint, monkeypatch):
    term = dict(type="SoftTargets", hard_weight=0.25, schedule=dict(type="WarmUp", end=2))
    model = build(distilled(detector(frozen_bn=True), teacher_model, teacher_checkpoint, terms=[term]))
    with torch.no_grad():
        host = losses(model, raw_batch())["loss_cls"].item()
    for iteration, share in ((0, 1.0), (2, 0.25)):
        monkeypatch.setattr(model.distill_context.hub, "step", lambda iteration=iteration: Step(iteration, 0))
        assert losses(model, raw_batch())["loss_cls"].item() == pytest.approx(share * host, rel=1e-6)


def test_a_dropped_term_leaves_the_hosts_loss_whole(teacher_model, teacher_checkpoint):
    terms = [dict(type="SoftTargets", hard_weight=0.25), dict(type="BoundedRegression")]
    model = build(distilled(detector(frozen_bn=True), teacher_model, teacher_checkpoint, terms=terms))
    with torch.no_grad():
        host = losses(model, raw_batch())["loss_cls"].item()
    model.start_distilling(CLASSES)
    bias = model.distiller.teacher.model.bbox_head.gfl_cls.bias
    kept = bias.clone()
    for value, share in ((torch.full_like(kept, torch.nan), 1.0), (kept, 0.25)):
        bias.copy_(value)
        assert losses(model, raw_batch())["loss_cls"].item() == pytest.approx(share * host, rel=1e-6)
    assert model.distiller.dropped == {"soft_targets": 1, "bounded_regression": 0}


def test_a_head_that_proposes_knows_no_order_of_classes(tmp_path):
    # An FCOS head as RPN scores objects alone; that the teacher's classes stand in another order is no matter to it.
    teacher = _entry("FCOS as RPN", width=6)
    term = dict(type="SoftTargets", head="rpn_head")
    values = []
    for classes in (CLASSES, CLASSES[::-1]):
        checkpoint = save_teacher(tmp_path / "teacher.pth", teacher, classes=classes)
        model = build(
            distilled(
                _entry("FCOS as RPN", frozen_bn=True),
                teacher,
                checkpoint,
                terms=[term, dict(type="SoftTargets", name="classes")],
            )
        )
        model.start_distilling(CLASSES)
        found = losses(model, raw_batch())
        values.append([found[f"distill.{name}.loss"].item() for name in ("soft_targets", "classes")])
    assert values[0][0] == values[1][0] > 0
    assert values[0][1] != values[1][1]


def test_the_backgrounds_weight_by_hand(teacher_model, teacher_checkpoint):
    terms = [
        dict(type="SoftTargets", name="heavy", background_weight=1.5),
        dict(type="SoftTargets", name="even", background_weight=1.0, temperature=2.0, classes="mean"),
    ]
    model = build(distilled(detector(frozen_bn=True), teacher_model, teacher_checkpoint, terms=terms))
    found = losses(model, raw_batch())
    s, t = _outputs(model)
    count = t.sigmoid().amax(1).sum()
    # Each class and its complement as two classes of torch's own weighted cross-entropy.
    two = torch.stack([s.flatten(), torch.zeros(s.numel())], 1)
    target = torch.stack([t.flatten(), torch.zeros(t.numel())], 1).softmax(1)
    crossed = F.cross_entropy(two, target, weight=torch.tensor([1.0, 1.5]), reduction="sum")
    assert found["distill.heavy.loss"].item() == pytest.approx((crossed / count).item(), rel=1e-4)
    even = 4 * F.binary_cross_entropy_with_logits(s / 2, (t / 2).sigmoid(), reduction="sum") / 10
    assert found["distill.even.loss"].item() == pytest.approx((even / count).item(), rel=1e-4)


# --- mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(temperature=0), "temperature must be > 0, got 0"),
        (
            dict(head="box_head"),
            "head must be one of auto, bbox_head, rpn_head, roi_head, panoptic_head, got 'box_head'",
        ),
        (dict(activation="tanh"), "activation must be one of auto, sigmoid, softmax, got 'tanh'"),
        (dict(anchors="foreground"), "anchors must be one of all, main, vlr, got 'foreground'"),
        (dict(region="main"), "takes no argument 'region'"),
        (dict(classes="max"), "classes must be one of sum, mean, got 'max'"),
        (dict(focus=-1), "focus must be a number >= 0, got -1"),
        (dict(focus=1, activation="softmax"), "focus needs sigmoid classes"),
        (dict(focus=1, background_weight=1.5), "focus must be 0 with a background_weight, got 1"),
        (dict(background_weight=0), "background_weight must be a number > 0, got 0"),
        (dict(background_weight="1.5"), "background_weight must be a number > 0, got '1.5'"),
        (dict(hard_weight=1.1), "hard_weight must be in [0, 1], got 1.1"),
        (dict(hard_weight="0.5"), "hard_weight must be in [0, 1], got '0.5'"),
    ],
)
def test_wrong_arguments(teacher_model, settings, message):
    with pytest.raises(DistillError) as caught:
        build(distilled(detector(), teacher_model, "nowhere.pth", terms=[dict(type="SoftTargets", **settings)]))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(margin=-1), "margin must be a number >= 0, got -1"),
        (dict(margin="0"), "margin must be a number >= 0, got '0'"),
        (dict(head="neck"), "head must be one of auto, bbox_head, rpn_head, roi_head, panoptic_head, got 'neck'"),
        (dict(anchors="main"), "term BoundedRegression takes no argument 'anchors'"),
    ],
)
def test_wrong_arguments_of_the_bound(settings, message):
    def built():
        (term,) = build_terms([dict(type="BoundedRegression", **settings)], reader=DetReader)
        term.reader = DetReader(None, None, term.name)
        term.prepare(None, None)

    with pytest.raises(DistillError) as caught:
        built()
    assert message in str(caught.value)


def test_a_softmax_over_sigmoid_classes_has_no_background(teacher_model):
    term = dict(type="SoftTargets", activation="softmax", background_weight=1.5)
    with pytest.raises(WiringError, match="have no background to weigh"):
        build(distilled(detector(), teacher_model, "nowhere.pth", terms=[term]))
