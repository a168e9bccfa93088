"""CrossKD: the authors' figures, alignment by hand, every kind of head that it can cross, and what it refuses."""

from __future__ import annotations

import copy
import math
from functools import reduce

import pytest
import torch
from mmengine.config import Config
from mmengine.hub import get_config
from torch.utils.flop_counter import FlopCounterMode

from golden import wave
from kdgraft.errors import DistillError, WiringError
from kdgraft_det import CrossHead
from kdgraft_det.picking import joint_logits
from support.det import BOXES, build, detector, distilled, losses, part, raw_batch, save_plain, save_teacher
from support.det_zoo import KINDS, zoo
from support.steps import watched
from support.tensors import gradients

CROSSED = [kind for kind in KINDS if kind != "TOOD"]
LOSS = "distill.cross_head.loss"


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Of each kind a wider teacher: its model and its checkpoint."""
    folder = tmp_path_factory.mktemp("teachers")

    def make(kind):
        model = zoo(kind, width=6, channels=12, frozen_bn=True)
        path = folder / f"{kind}.pth"
        return model, str(path) if path.exists() else save_teacher(path, model)

    return make


def crossed(student, teacher, checkpoint, **settings):
    """A built detector whose one term is CrossHead."""
    return build(distilled(student, teacher, checkpoint, terms=[dict(type="CrossHead", **settings)]))


def cross_loss(model, batch=None):
    return losses(model, batch or raw_batch())[LOSS]


# jbwang1997/CrossKD@87e156a46259e3a516b65fc6a049b200b9ab0d54, mmdet/models/detectors/crosskd_gfl.py and kd_loss.py.
# Student and teacher with weights by formula; the authors' loss() on top of mmdet's heads, reused_teacher_head_idx=2 of 3 convolutions.
# For each kind and each of two batches: loss_cls_kd and loss_reg_kd, and of both the sum of the absolute gradients of the student.
# The authors' code computes in float32, and so its figures are good to what that leaves; the test computes in float64 on the same
# weights and images, so that it finds the same on every processor.
AUTHORS = {
    "GFL": [
        (101.15132904, 1.28424966, 80214.453125, 653.06231689),
        (115.60151672, 1.28424966, 91673.6484, 653.06231689),
    ],
    "RetinaNet": [
        (24315.214844, 65.984550, 35359296.0, 10832.05859),
        (26967.783203, 73.182861, 39216676.0, 12013.75686),
    ],
    "ATSS": [
        (93.05738831, 7.83052063, 85750.195312, 2847.370605),
        (106.35130310, 8.94916630, 98000.2343, 3254.13891602),
    ],
}
FLOAT32 = 5e-6
"""How far float32 may lead: the two norms, three convolutions and a sum over 10^5 gradients, 80 times its precision."""
FLOAT32_OF_OVERLAPS = 1e-3
"""The same for the gradient of RetinaNet's boxes through GIoU, which float32 itself moves by as much: from one processor to
another by 1.8e-4, and from float32 to float64 by 4.9e-4."""
GOLDEN_BOXES = (BOXES[:2], ([], BOXES[2]))


def by_formula(model, phase):
    """Writes every weight of a model from a sine."""
    with torch.no_grad():
        for place, (name, p) in enumerate(sorted(model.named_parameters())):
            if p.ndim == 4:
                p.copy_(wave(tuple(p.shape), 0.7, phase + place, 1 / math.sqrt(p[0].numel())))
            elif p.ndim == 1:
                p.copy_(wave(tuple(p.shape), 0.9, phase + place, 0.2) + name.endswith("weight"))
    return model


@pytest.mark.parametrize("kind", list(AUTHORS))
def test_the_authors_figures(kind, tmp_path):
    entry = zoo(kind, convs=3, frozen_bn=True)
    if kind == "RetinaNet":  # no anchor between the two thresholds: the authors leave those out
        entry["train_cfg"]["assigner"]["neg_iou_thr"] = 0.5
    checkpoint = save_plain(tmp_path / "teacher.pth", by_formula(build(entry), 1.1).double())
    terms = [dict(type="CrossHead", name="classes", boxes=0), dict(type="CrossHead", name="boxes", classes=0)]
    model = by_formula(build(distilled(entry, entry, checkpoint, terms=terms)), 0.3).double().train()
    for boxes, expected in zip(GOLDEN_BOXES, AUTHORS[kind], strict=True):
        samples = raw_batch(boxes)["data_samples"]
        for sample in samples:
            sample.set_metainfo(dict(pad_shape=(96, 96), batch_input_shape=(96, 96)))
        images = torch.stack([wave((3, 96, 96), 0.013 + 0.001 * i, i, 2.0).float().double() for i in range(2)])
        found = model(images, samples, mode="loss")
        values, slopes = [], []
        for name in ("classes", "boxes"):
            model.zero_grad()
            found[f"distill.{name}.loss"].backward(retain_graph=True)
            values.append(found[f"distill.{name}.loss"].item())
            slopes.append(sum(g.abs().sum().item() for g in gradients(model).values()))
        assert (*values, slopes[0]) == pytest.approx(expected[:3], rel=FLOAT32)
        assert slopes[1] == pytest.approx(expected[3], rel=FLOAT32_OF_OVERLAPS if kind == "RetinaNet" else FLOAT32)


def test_joint_logits_are_those_of_the_product():
    p, q = torch.tensor([0.2, 0.9]), torch.tensor([0.5])
    assert joint_logits(p.logit(), q.logit()).sigmoid().tolist() == pytest.approx([0.1, 0.45])
    assert joint_logits(torch.tensor([-200.0]), torch.tensor([300.0])).item() == pytest.approx(-200.0)


@pytest.mark.parametrize("kind", CROSSED)
@pytest.mark.parametrize("reused", [0, 1, 2])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(kind, reused, teachers):
    model, checkpoint = teachers(kind)
    found = crossed(model, model, checkpoint, reused=reused)
    batch = raw_batch([[[8.0, 10.0, 44.0, 50.0]], [[12.0, 20.0, 60.0, 64.0]]], [(96, 96), (70, 74)])
    assert cross_loss(found, batch) > 1e-2
    found.load_state_dict(torch.load(checkpoint)["state_dict"])
    assert cross_loss(found, batch).item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("kind", CROSSED)
def test_every_kind_learns_from_its_teachers_head(kind, teachers):
    model = crossed(zoo(kind), *teachers(kind))
    teacher = model.distiller.teacher.model
    before = copy.deepcopy(teacher.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    values = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = cross_loss(model)
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.98 * values[0] if kind != "YOLOX" else values[-1] < values[0]
    reached = {name for name, gradient in gradients(model).items() if gradient.abs().sum() > 0}
    assert "backbone.conv1.weight" in reached
    # The student's own last convolution and predictions take no part.
    towers = [name for name in reached if name.startswith("bbox_head") and "conv" in name]
    assert towers
    assert all(".0.conv" in name or ".0.gn" in name or ".0.bn" in name for name in towers)
    # The teacher is as it was.
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert not any("forward" in vars(module) for module in teacher.modules())
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (zoo("ATSS"), zoo("GFL", channels=12)),
        (zoo("YOLOX"), zoo("RTMDet", width=6)),
        (zoo("GFL", convs=1), zoo("GFL", convs=3, channels=12)),
        (zoo("RTMDet"), zoo("RTMDet", head=dict(use_depthwise=True, share_conv=False))),
        (zoo("RTMDet", head=dict(type="RTMDetHead", exp_on_reg=None)), zoo("FCOS", head=dict(norm_on_bbox=True))),
    ],
    ids=["kinds", "families", "depths", "depthwise", "shared"],
)
def test_heads_may_differ(student, teacher, tmp_path):
    for model in (student, teacher):
        if model["bbox_head"].get("exp_on_reg", True) is None:
            del model["bbox_head"]["exp_on_reg"]
    model = crossed(student, teacher, save_teacher(tmp_path / "teacher.pth", teacher))
    loss = cross_loss(model)
    loss.backward()
    assert 0 < loss < 1e4
    assert gradients(model)["backbone.conv1.weight"].isfinite().all()


def test_the_teacher_may_know_more_classes(tmp_path):
    teacher = zoo("GFL", classes=13)
    names = tuple(f"class {i}" for i in range(13))
    model = crossed(zoo("GFL"), teacher, save_teacher(tmp_path / "teacher.pth", teacher, classes=names))
    model.start_distilling(tuple("0123456789"))
    assert cross_loss(model) > 0


@pytest.mark.parametrize("kind", CROSSED)
def test_without_objects_it_is_finite_and_does_not_explode(kind, teachers):
    model = crossed(zoo(kind, frozen_bn=True), *teachers(kind))
    some, none = cross_loss(model), cross_loss(model, raw_batch([[], [], [], []]))
    none.backward()
    # Divided by the number of images, where there were tens of positives each.
    assert 0 < none <= 100 * some
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@pytest.mark.parametrize("kind", [kind for kind in CROSSED if kind != "FCOS"])
def test_it_divides_by_what_the_students_assigner_found(kind, teachers):
    model = crossed(zoo(kind, frozen_bn=True), *teachers(kind))
    assigner, ratios, found = model.bbox_head.assigner, [], []
    assign = assigner.assign

    def counted(*args, **settings):
        result = assign(*args, **settings)
        found.append(max(1, int((result.gt_inds > 0).sum())))
        return result

    assigner.assign = counted
    model.distiller.terms["cross_head"].register_forward_hook(lambda module, args, ratio: ratios.append(ratio))
    cross_loss(model, raw_batch((*BOXES[1:3], [])))
    assert len(found) == 3 or (kind == "YOLOX" and len(found) == 2)  # YOLOX assigns nothing where there is nothing
    assert ratios[0].denominator[0] == sum(found) + (3 - len(found))
    assert sum(found) > 5


def test_fcos_divides_by_the_points_in_the_boxes(teachers):
    model = crossed(zoo("FCOS"), *teachers("FCOS"))
    ratios = []
    model.distiller.terms["cross_head"].register_forward_hook(lambda module, args, ratio: ratios.append(ratio))
    # Points at 4, 12, 20 …: 12 and 20 lie within 8 to 24 both ways, at most 12 from an edge: 4 points, of the first level alone.
    cross_loss(model, raw_batch([[[8.0, 8.0, 24.0, 24.0]], []]))
    assert ratios[0].denominator.tolist() == [4 + 1, 4 + 1]


@pytest.mark.parametrize("kind", CROSSED)
def test_it_does_not_grow_with_the_batch(kind, teachers):
    model = crossed(zoo(kind, frozen_bn=True), *teachers(kind))
    once = part(raw_batch(), slice(1, 3))
    twice = {key: [*values, *copy.deepcopy(values)] for key, values in once.items()}
    # Not to the last digit: n - 1 in the standard deviation.
    assert cross_loss(model, twice).item() == pytest.approx(cross_loss(model, once).item(), rel=0.02)


@pytest.mark.parametrize("kind", CROSSED)
def test_what_is_in_the_padding_of_the_maps_changes_nothing(kind, teachers):
    model = crossed(zoo(kind, frozen_bn=True), *teachers(kind)).train()
    boxes = [[[8.0, 10.0, 44.0, 50.0]], [[20.0, 4.0, 60.0, 60.0]]]
    data = model.data_preprocessor(raw_batch(boxes, [(96, 96), (64, 72)]), True)
    found = []
    for amount in (0.0, 100.0, torch.nan):

        def scribble(step, amount=amount):
            for recording, keys in ((step.recordings["student"], "convs"), (step.recordings["teacher"], "bbox_head")):
                for (path, _), seen in recording.seen.items():
                    if path.startswith("bbox_head") and keys in path and (keys == "convs" or path == keys):
                        outputs = seen.values.get("output", [])
                        outputs[:] = [_in_padding(value, amount) for value in outputs]

        model.zero_grad()
        with watched(scribble):
            loss = model(**data, mode="loss")[LOSS]
        loss.backward()
        found.append((loss.item(), gradients(model)["bbox_head." + _first_tower(kind)].abs().sum().item()))
    assert found[0][0] > 0
    assert found[1] == found[0]
    assert found[2][0] == found[0][0]
    assert math.isfinite(found[2][1])


def _first_tower(kind):
    levels = {"YOLOX": "multi_level_cls_convs.0.0", "RTMDet": "cls_convs.0.0"}
    return f"{levels.get(kind, 'cls_convs.0')}.conv.weight"


def _in_padding(value, amount):
    """Adds to the cells of the second image that lie below 64 or right of 72 pixels."""
    if isinstance(value, (list, tuple)):
        return type(value)(_in_padding(entry, amount) for entry in value)
    height, width = value.shape[2:]
    y, x = torch.arange(height) * (96 / height) >= 64, torch.arange(width) * (96 / width) >= 72
    outside = torch.stack([torch.zeros(height, width, dtype=torch.bool), y[:, None] | x])[:, None]
    return torch.where(outside, value + amount, value)


@pytest.mark.parametrize("kind", CROSSED)
def test_under_autocast_it_is_computed_in_float32(kind, teachers):
    model = crossed(zoo(kind, frozen_bn=True), *teachers(kind))
    exact = cross_loss(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = cross_loss(model)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact.item(), rel=0.15)
    found.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@pytest.mark.parametrize(("precision", "expected"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_head_runs_in_the_teachers_precision(precision, expected, teachers):
    teacher, checkpoint = teachers("GFL")
    entry = distilled(zoo("GFL"), teacher, checkpoint, terms=[dict(type="CrossHead")])
    entry["teacher"]["precision"] = precision
    model = build(entry)
    seen = []
    last = model.distiller.teacher.model.bbox_head.cls_convs[1].conv
    handle = last.register_forward_hook(lambda module, args, out: seen.append((out.dtype, out.requires_grad)))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "fp32"):
        assert cross_loss(model) > 0
    handle.remove()
    assert seen == [(expected, False)] * 3 + [(expected, True)] * 3


def test_copies_share_the_teacher_and_no_checkpoint_holds_it(teachers):
    model = crossed(zoo("GFL"), *teachers("GFL"))
    other = copy.deepcopy(model)
    assert other.distiller.terms["cross_head"].holder is model.distiller.teacher
    held = {id(parameter) for parameter in model.distiller.teacher.model.parameters()}
    assert not any(id(parameter) in held for parameter in model.parameters())
    assert set(model.state_dict()) == set(build(zoo("GFL")).state_dict())
    assert cross_loss(other).item() == pytest.approx(cross_loss(model).item(), rel=1e-5)


def test_weights_of_the_two_parts(teachers):
    both, boxes, classes = (
        cross_loss(crossed(zoo("GFL"), *teachers("GFL"), **settings)).item()
        for settings in ({}, dict(classes=0), dict(classes=2, boxes=0))
    )
    # Adapters are drawn alike for all three.
    assert both == pytest.approx(boxes + classes / 2, rel=1e-5)
    halved = crossed(zoo("GFL"), *teachers("GFL"), classes=0, boxes=2.0)
    assert cross_loss(halved).item() == pytest.approx(boxes / 2, rel=1e-5)


@pytest.mark.parametrize("reused", [1, 2])
def test_a_step_costs_what_the_crossing_does_and_no_more(reused, tmp_path):
    """The plain step, the teacher's forward pass, and the reused layers forward and backward to their inputs."""
    entry = zoo("GFL", convs=2, frozen_bn=True)
    model = crossed(entry, entry, save_teacher(tmp_path / "teacher.pth", entry), reused=reused)
    teacher, plain = model.distiller.teacher.model, build(entry)
    data = model.data_preprocessor(raw_batch(), True)

    def flops(run):
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    def step(one):
        found = losses(one, raw_batch())
        torch.stack([value for name, value in found.items() if "loss" in name]).sum().backward()

    head = teacher.bbox_head
    maps = [torch.zeros(4, 8, size, size, requires_grad=True) for size in (12, 6, 3)]

    def crossing():
        for tower, last in ((head.cls_convs, head.gfl_cls), (head.reg_convs, head.gfl_reg)):
            for level in maps:
                last(reduce(lambda x, conv: conv(x), tower[2 - reused :], level)).sum().backward()

    whole = flops(lambda: step(plain)) + flops(crossing)
    with torch.no_grad():
        whole += flops(lambda: teacher(data["inputs"], mode="tensor"))
    assert flops(lambda: step(model)) == whole


REFUSED = [
    (zoo("TOOD"), {}, "head TOODHead has no towers .*FeatureImitation"),
    (zoo("GFL", strides=(8, 16, 32, 64)), {}, "different grids.*give both the same strides"),
    (zoo("GFL", convs=1), dict(reused=2), r"teacher's bbox_head.cls_convs has 1 convolutions, fewer than reused=2"),
    (
        zoo("RetinaNet", head=dict(loss_cls=dict(type="CrossEntropyLoss"))),
        {},
        "softmax classes; this term needs sigmoid",
    ),
]


@pytest.mark.parametrize(("teacher", "settings", "message"), REFUSED, ids=["TOOD", "grid", "reused", "softmax"])
def test_what_cannot_be_crossed_is_refused(teacher, settings, message):
    with pytest.raises(WiringError, match=message):
        crossed(zoo("GFL"), teacher, "unread.pth", **settings)


@pytest.mark.parametrize("reused", [0, 1])
@pytest.mark.parametrize("owner", ["student", "teacher"])
@pytest.mark.parametrize(("kind", "tower"), [("ATSS", "cls_convs"), ("YOLOX", "multi_level_cls_convs.0")])
def test_empty_towers_are_refused(kind, tower, owner, reused):
    # As mmdet's DyHead has them: its convolutions are in the neck.
    pair = [zoo(kind, convs=0 if side == owner else 2) for side in ("student", "teacher")]
    with pytest.raises(WiringError) as caught:
        crossed(*pair, "unread.pth", reused=reused)
    assert str(caught.value) == (
        f"cross_head: the {owner}'s bbox_head.{tower} has no convolutions that could be crossed; "
        "set its stacked_convs to 1 or more, or use FeatureImitation"
    )


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ("faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py", "FasterRCNN without bbox_head"),
        ("deformable_detr/deformable-detr_r50_16xb2-50e_coco.py", "DeformableDETRHead"),
    ],
)
def test_two_stages_and_queries_are_refused(config, name):
    model = get_config(f"mmdet::{config}").model
    model.backbone.update(depth=18, init_cfg=None)
    model.neck.in_channels = [64, 128, 256, 512][-len(model.neck.in_channels) :]
    with pytest.raises(WiringError, match=f"cross_head: the student's head {name} .*FeatureImitation"):
        build(distilled(Config(dict(m=model)).m.to_dict(), detector(), "unread.pth", terms=[dict(type="CrossHead")]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(reused=-1), "reused must be a whole number >= 0, got -1"),
        (dict(reused=True), "reused must be"),
        (dict(classes=-1.0), "classes must be a number >= 0"),
        (dict(boxes=-2), "boxes must be a number >= 0, got -2"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(DistillError, match=message):
        CrossHead(**settings)
