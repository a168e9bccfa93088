"""BCKD: the authors' figures, the two parts by hand, what does not count, and what it refuses."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from mmdet.models.losses import GIoULoss
from mmengine.logging import MessageHub

from golden import wave
from kdgraft.batch import Batch
from kdgraft.errors import DistillError, WiringError
from kdgraft_det import BCKD
from kdgraft_det.bckd import overlap
from kdgraft_det.dense import DenseHeads
from kdgraft_det.dense_heads import dense_head
from support.det import Given, build, detector, distilled, losses, part, raw_batch, save_teacher
from support.det_stages import detr, staged
from support.det_zoo import KINDS, zoo
from support.tensors import gradients

LOSS = "distill.bckd.loss"


def taught(student, teacher, checkpoint="unread.pth", **settings):
    """A built detector whose one term is BCKD."""
    return build(distilled(student, teacher, checkpoint, terms=[dict(type="BCKD", **settings)]))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Of each kind a wider teacher: its model and its checkpoint."""
    folder = tmp_path_factory.mktemp("teachers")

    def make(kind):
        model = zoo(kind, width=6, frozen_bn=True)
        path = folder / f"{kind}.pth"
        return model, str(path) if path.exists() else save_teacher(path, model)

    return make


@pytest.fixture(autouse=True)
def _epoch():
    MessageHub.get_current_instance().update_info("epoch", 9)  # TOOD asks for it


# TinyTigerPan/BCKD@121c9aa272c9195c0f05cd12727bfe57636a5005, mmdet/models/dense_heads/ld_head.py: LDHead.loss_single on one level,
# NovelKDLoss and GIoULoss(loss_weight=4), three positives and one anchor that is ignored. The loss, the sum of the absolute
# gradients, and the gradient at [0, 0, 0, 0]: of the classes and of the boxes.
AUTHORS = (
    (17.81285929017049, 9.476581139647466, -0.048735198308219305),
    (
        9.497508907959437,
        12.09479613636255,
        0.022455624054626207,
    ),
)


def test_the_authors_figures():
    head = build(detector(classes=3, reg_max=8, strides=(8,))["bbox_head"])
    term = BCKD()
    term.heads = DenseHeads(*(dense_head(head, "bbox_head", owner, "bckd") for owner in ("student", "teacher")), "bckd")
    ours, theirs = term.heads.student, term.heads.teacher
    labels, weights = torch.full((2, 12), 3), torch.ones(2, 12)
    labels[0, 5], labels[1, 6], labels[1, 7], weights[0, 2] = 1, 0, 2, 0
    classes, boxes = (
        wave((2, 3, 3, 4), 0.7, 0.3, 3.0).requires_grad_(),
        wave((2, 36, 3, 4), 0.37, 0.2, 3.0).requires_grad_(),
    )
    student = Given(
        {
            ours.classes: [classes],
            ours.boxes: [boxes],
            ours.targets: (None, [labels], [weights], [torch.zeros(2, 12, 4)], 3),
            ours.flags: [[torch.ones(12, dtype=torch.bool)]] * 2,
        }
    )
    teacher = Given(
        {theirs.classes: [wave((2, 3, 3, 4), 0.9, 1.1, 4.0)], theirs.boxes: [wave((2, 36, 3, 4), 0.53, 0.9, 4.0)]},
        "teacher",
    )
    batch = Batch(padded_size=(24, 32), image_sizes=[(24, 32)] * 2, boxes=[torch.zeros(0, 4)] * 2)
    numerators, denominators = term(student, teacher, batch)
    assert denominators.tolist() == [3, 3]
    # Boxes are decoded in float32, as everywhere; the authors' denominator has an epsilon of float32.
    for part_, given, expected, near in zip(numerators / 3, (classes, boxes), AUTHORS, (1e-7, 1e-5), strict=True):
        slope = torch.autograd.grad(part_, given, retain_graph=True)[0]
        assert part_.item() == pytest.approx(expected[0], rel=near)
        assert slope.abs().sum().item() == pytest.approx(expected[1], rel=near)
        assert slope[0, 0, 0, 0].item() == pytest.approx(expected[2], rel=10 * near)


def test_overlap_by_hand():
    # Two boxes of 4 and 6 that share 2 of a hull of 9: GIoU = 2/8 - 1/9. The greatest difference of two classes is 1/2 - 1/5.
    student, teacher = torch.tensor([[0.0, 3.0]]), torch.tensor([[0.2, 0.94]]).logit()
    boxes, wanted = torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[1.0, 0, 3, 3]])
    expected = 0.3 * (1 - (2 / 8 - 1 / 9))
    assert overlap(student, teacher, boxes, wanted).item() == pytest.approx(expected, rel=1e-5)
    # An anchor on whose classes both agree does not count, wherever its boxes are.
    boxes = torch.tensor([[math.nan] * 4]).requires_grad_()
    value = overlap(teacher, teacher, boxes, wanted)
    assert value.item() == 0
    assert overlap(student[:0], teacher[:0], boxes[:0], wanted[:0]).requires_grad


def everything(model):
    """Class logits and boxes of all anchors of both models, by mmdet's own code, and a step's losses."""
    seen = {}
    hook = model.bbox_head.register_forward_hook(lambda module, args, out: seen.setdefault("student", out))
    found = losses(model, raw_batch())
    hook.remove()
    data = model.data_preprocessor(raw_batch(), True)
    with torch.no_grad():
        seen["teacher"] = model.distiller.teacher.model(data["inputs"], data["data_samples"], mode="tensor")
    sides = []
    for name, head in (("student", model.bbox_head), ("teacher", model.distiller.teacher.model.bbox_head)):
        logits, boxes = [], []
        priors = head.prior_generator.grid_priors([level.shape[-2:] for level in seen[name][0]], device="cpu")
        for scores, deltas, anchors in zip(*seen[name][:2], priors, strict=True):
            logits.append(scores.permute(0, 2, 3, 1).reshape(4, -1, 10))
            rows = deltas.permute(0, 2, 3, 1).reshape(4, -1, 4)
            boxes.append(head.bbox_coder.decode(anchors.expand(4, -1, -1).reshape(-1, 4), rows.reshape(-1, 4)))
            boxes[-1] = boxes[-1].view(4, -1, 4)
        sides.append((torch.cat(logits, 1).detach(), torch.cat(boxes, 1).detach()))
    return found, sides


def test_by_mmdets_own_decoding(teachers):
    model = taught(zoo("ATSS", frozen_bn=True), *teachers("ATSS"))
    ratios = []
    model.distiller.terms["bckd"].register_forward_hook(lambda module, args, ratio: ratios.append(ratio))
    found, ((s, s_boxes), (t, t_boxes)) = everything(model)
    p, q = s.sigmoid(), t.sigmoid()
    entropy = -(q * p.log() + (1 - q) * (1 - p).log())
    positives = ratios[0].denominator[0]
    assert positives > 4
    classes = ((q - p).abs() * entropy).sum() / positives
    boxes = GIoULoss(loss_weight=4.0)(
        s_boxes.flatten(0, 1), t_boxes.flatten(0, 1), (q - p).abs().amax(-1).flatten(), avg_factor=positives
    )
    assert found[LOSS].item() == pytest.approx((classes + boxes).item(), rel=1e-4)
    assert min(classes, boxes) > 0.01 * found[LOSS]


def test_boxes_and_classes_have_weights(teachers):
    both, boxes, classes = (
        losses(taught(zoo("GFL"), *teachers("GFL"), **settings), raw_batch())[LOSS].item()
        for settings in ({}, dict(classes=0), dict(classes=2, boxes=0))
    )
    assert both == pytest.approx(boxes + classes / 2, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(kind, teachers):
    model, checkpoint = teachers(kind)
    found = taught(model, model, checkpoint)
    found.load_state_dict(torch.load(checkpoint)["state_dict"])
    assert losses(found, raw_batch())[LOSS].item() == pytest.approx(0, abs=1e-4)


def test_the_padding_of_a_batch_changes_nothing(teachers):
    model = taught(zoo("GFL", frozen_bn=True), *teachers("GFL"))
    boxes = [[[8.0, 10.0, 44.0, 50.0]], [[20.0, 4.0, 60.0, 60.0]]]
    model.train()
    data = model.data_preprocessor(raw_batch(boxes, [(96, 96), (64, 64)]), True)
    forward, found = model.bbox_head.forward, []
    for amount in (0.0, 5.0):

        def scribbled(x, amount=amount):
            outside = [torch.arange(level.shape[-1]) * 96 / level.shape[-1] >= 64 for level in x]
            classes, edges = forward(x)
            for levels in (classes, edges):
                for level, out in zip(levels, outside, strict=True):
                    level[1] = torch.where(out[:, None] | out, level[1] + amount, level[1])
            return classes, edges

        model.bbox_head.forward = scribbled
        found.append(model(**copy.deepcopy(data), mode="loss")[LOSS].item())
    assert found[0] > 0
    assert found[1] == found[0]


def test_without_objects_it_is_finite(teachers):
    model = taught(zoo("GFL"), *teachers("GFL"))
    found = losses(model, raw_batch([[], [], [], []]))[LOSS]
    found.backward()
    assert found > 0
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


def test_it_does_not_grow_with_the_batch(teachers):
    model = taught(zoo("GFL", frozen_bn=True), *teachers("GFL"))
    once = part(raw_batch(), slice(1, 3))
    twice = {key: [*values, *copy.deepcopy(values)] for key, values in once.items()}
    found = [losses(model, batch)[LOSS].item() for batch in (once, twice)]
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_heads_of_two_kinds_on_one_grid(teachers):
    # ATSS predicts deltas and GFL edges: decoded boxes are compared.
    model = taught(zoo("ATSS"), *teachers("GFL"))
    assert losses(model, raw_batch())[LOSS] > 0
    assert {row.teacher_tap for row in model.distiller.rows} == {"bbox_head[0][*]", "bbox_head[1][*]"}


SOFTMAX = zoo("RetinaNet", head=dict(loss_cls=dict(type="CrossEntropyLoss")))


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (staged("Faster R-CNN"), staged("Faster R-CNN"), "a FasterRCNN does not predict at the places of a grid"),
        (detr(), detr(), "a DeformableDETR does not predict at the places of a grid"),
        (SOFTMAX, SOFTMAX, "has softmax classes; this term needs sigmoid"),
        (zoo("GFL"), zoo("GFL", classes=12), "the student predicts 10 classes, the teacher 12"),
        (zoo("GFL"), zoo("GFL", strides=(8, 16, 32, 64)), "different strides"),
    ],
)
def test_what_does_not_compare_is_refused_in_one_line(student, teacher, message):
    with pytest.raises(WiringError) as caught:
        taught(student, teacher)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_below_0_are_refused():
    with pytest.raises(DistillError, match="boxes must be a number >= 0, got -1"):
        BCKD(boxes=-1)
