"""Dense heads: picking anchors, reading the assignment, and refusing pairs of heads that do not compare."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from mmengine.logging import MessageHub
from mmengine.structures import InstanceData

from kdgraft import Recorder
from kdgraft.batch import Batch
from kdgraft_det.dense import DenseHeads
from kdgraft_det.dense_heads import dense_head
from kdgraft_det.picking import in_order_of_pick, joint_logits, pick, pick_weights
from kdgraft_det.regions import valuable_region
from support.det import BOXES, Given, build, detector, distilled, part, raw_batch, save_teacher
from support.det_stages import staged
from support.det_zoo import KINDS, zoo
from support.steps import watched


def test_pick_by_hand():
    # Two images, two channels, a level of 2×2 and one of 1×1; values 100·image + 10·channel + position.
    level = torch.tensor(
        [[[[0, 1], [2, 3]], [[10, 11], [12, 13]]], [[[100, 101], [102, 103]], [[110, 111], [112, 113]]]]
    )
    coarse = torch.tensor([[[[7]], [[17]]], [[[107]], [[117]]]])
    chosen = torch.tensor([[False, True, True, False, True], [True, False, False, False, False]])
    assert pick([level, coarse], chosen, 1).tolist() == [[1, 11], [2, 12], [100, 110], [7, 17]]
    weights = torch.tensor([[0.0, 0.1, 0.2, 0.0, 0.5], [0.3, 0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(pick_weights(weights, chosen, [4, 1]), torch.tensor([0.1, 0.2, 0.3, 0.5]))
    assert pick([level, coarse], torch.zeros_like(chosen), 1).shape == (0, 2)


def test_pick_by_hand_with_two_anchors_a_position():
    # One image, two anchors of two channels each at two positions; values 100·anchor + 10·channel + position.
    level = torch.tensor([[[[0, 1]], [[10, 11]], [[100, 101]], [[110, 111]]]])
    # Position by position: (0, anchor 0), (0, anchor 1), (1, anchor 0), (1, anchor 1).
    chosen = torch.tensor([[False, True, True, True]])
    assert pick([level], chosen, 2).tolist() == [[100, 110], [1, 11], [101, 111]]
    assert in_order_of_pick(chosen, [4]).tolist() == [1, 2, 3]
    two = torch.tensor([[False, True, True], [True, False, True]])
    assert in_order_of_pick(two, [2, 1]).tolist() == [1, 0, 2, 2]
    assert in_order_of_pick(two, [2, 1], images=True).tolist() == [0, 1, 0, 1]


def test_assignment_by_hand():
    # One image of 16×8 pixels (width × height) padded to 16×16, anchors of 8 pixels at multiples of 8, then one of 16 pixels.
    head = dense_head(build(detector(classes=3, strides=(8, 16))["bbox_head"]), "bbox_head", "student", "term")
    labels = [torch.tensor([[0, 3, 3, 3]]), torch.tensor([[2]])]
    weights = [torch.tensor([[1.0, 1.0, 1.0, 0.0]]), torch.tensor([[1.0]])]
    targets = [torch.zeros(1, 4, 4), torch.tensor([[[0.0, 0, 8, 8]]])]
    batch = Batch(padded_size=(16, 16), image_sizes=[(8, 16)], boxes=[torch.tensor([[0.0, 0.0, 8.0, 8.0]])])
    outputs = [torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 1, 1)]
    flags = [[torch.tensor([True, True, True, True]), torch.tensor([True])]]
    seen = Given({head.targets: (None, labels, weights, targets, 2), head.classes: outputs, head.flags: flags})
    found = head.assignment(seen, batch)
    assert found.num_per_level == [4, 1]
    assert found.anchors[[1, 4]].tolist() == [[-8, -16, 24, 16], [-32, -32, 32, 32]]  # four strides large
    assert found.strides.tolist() == [8, 8, 8, 8, 16]
    assert found.given.tolist() == [[True, True, True, True, True]]
    assert found.assigned.tolist() == [[True, True, True, False, True]]
    assert found.valid.tolist() == [
        [True, True, False, False, True]
    ]  # the third one's centre (0, 8) is below the image
    assert found.positive.tolist() == [[True, False, False, False, True]]
    assert found.weights("all", batch).tolist() == [[1, 1, 0, 0, 1]]
    assert found.weights("main", batch).tolist() == [[1, 0, 0, 0, 1]]
    assert found.targets[0, 4].tolist() == [0, 0, 8, 8]
    assert head.assignment(Given({}), batch) is found  # made once a step


def test_the_assignment_is_the_students_own(teacher_model, teacher_checkpoint):
    # The positives of mmdet's own assigner, asked directly.
    for kind in ("GFL", "ATSS"):
        entry = distilled(
            detector(kind), teacher_model, teacher_checkpoint, terms=[dict(type="SoftTargets", anchors="main")]
        )
        model = build(entry).train()
        data = model.data_preprocessor(raw_batch(), True)
        with watched() as steps:
            model(**data, mode="loss")
        recording = steps[0].recordings["student"]
        head = model.distiller.terms["soft_targets"].scores.heads.student
        found = head.assignment(recording, model._batch(**data))
        priors = model.bbox_head.prior_generator.grid_priors([(12, 12), (6, 6), (3, 3)], device="cpu")
        for image, boxes in enumerate(BOXES):
            truth = InstanceData(bboxes=torch.tensor(boxes), labels=torch.arange(len(boxes)))
            assigned = model.bbox_head.assigner.assign(
                InstanceData(priors=torch.cat(priors)), [len(p) for p in priors], truth
            )
            positive = assigned.gt_inds > 0
            assert torch.equal(found.positive[image], positive) and positive.any()
            assert torch.equal(found.labels[image][positive], assigned.gt_inds[positive] - 1)


@pytest.fixture(autouse=True)
def _epoch():
    MessageHub.get_current_instance().update_info("epoch", 9)  # TOOD asks the Runner which epoch it is


def trained_step(kind, **settings):
    """A student of one kind of head under a teacher of the same, one recorded training step, and the batch."""
    entry = zoo(kind, **settings)
    model = build(entry)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        for parameter in model.bbox_head.parameters():
            if parameter.ndim == 4:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model, *recorded(model)


def pair(student, teacher, path="bbox_head"):
    """Two dense heads side by side."""
    return DenseHeads(
        dense_head(student, path, "student", "term"), dense_head(teacher, path, "teacher", "term"), "term"
    )


def recorded(model, path="bbox_head", sizes=((96, 96),) * 4):
    """A head beside itself, one training step of it, and the batch."""
    head = model.get_submodule(path)
    heads = pair(head, head, path)
    model.train()
    data = model.data_preprocessor(raw_batch(sizes=sizes), True)
    with Recorder(model, [*heads.class_taps[0], *heads.box_taps[0]]).record(model) as recording:
        model(**data, mode="loss")
    samples = data["data_samples"]
    batch = Batch(
        padded_size=tuple(data["inputs"].shape[-2:]),
        image_sizes=list(sizes),
        boxes=[sample.gt_instances.bboxes for sample in samples],
        labels=[sample.gt_instances.labels for sample in samples],
    )
    return heads, recording, batch


def edges_in_pixels(head, rows, anchors, strides):
    """What the head's unit stands for, by the host's own coder."""
    return rows * strides[:, None] if head.unit == "strides" else head.bbox_coder.decode(anchors, rows)


@pytest.mark.parametrize("kind", KINDS)
def test_targets_are_the_boxes_of_the_ground_truth(kind):
    _, heads, recording, batch = trained_step(kind)
    head = heads.student
    assignment = head.assignment(recording, batch)
    chosen = assignment.positive
    assert chosen.sum() >= 7  # at least one for each object
    rows = heads.box_pairs(recording, recording, batch)[0]
    places = in_order_of_pick(chosen, assignment.num_per_level)
    image = in_order_of_pick(chosen, assignment.num_per_level, images=True)
    found = edges_in_pixels(head, rows.target, assignment.anchors[places], assignment.strides[places])
    labels = assignment.labels[image, places]
    for box, label, n in zip(found, labels.tolist(), image.tolist(), strict=True):
        truth = batch.boxes[n][batch.labels[n] == label]
        torch.testing.assert_close(box[None], truth, rtol=1e-3, atol=1e-2)
    assert {(n, label) for n, label in zip(image.tolist(), labels.tolist(), strict=True)} == {
        (n, label) for n, found in enumerate(batch.labels) for label in found.tolist()
    }


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "TOOD"])
def test_boxes_at_chosen_priors_are_those_of_the_whole_grid(kind):
    _, heads, recording, batch = trained_step(kind)
    assignment = heads.student.assignment(recording, batch)
    chosen = assignment.valid
    rows = heads.student.regression(recording, chosen)
    places = in_order_of_pick(chosen, assignment.num_per_level)
    image = in_order_of_pick(chosen, assignment.num_per_level, images=True)
    found = edges_in_pixels(heads.student, rows, assignment.anchors[places], assignment.strides[places])
    everywhere = heads.student.decoded(recording.tensors(heads.student.boxes))
    torch.testing.assert_close(found, everywhere[image, places], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_are_decoded_in_float32_under_autocast(kind):
    _, heads, recording, batch = trained_step(kind)
    head = heads.student
    chosen = head.assignment(recording, batch).valid
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found.append((head.regression(recording, chosen), head.decoded(recording.tensors(head.boxes))))
    for exact, mixed in zip(*found, strict=True):
        assert mixed.dtype == torch.float32
        assert torch.equal(exact, mixed)


@pytest.mark.parametrize("norm_on_bbox", [False, True])
def test_fcos_distances_mean_the_same_of_a_student_that_trains_and_of_a_teacher(norm_on_bbox):
    # With norm_on_bbox the host's head gives strides while it trains and pixels otherwise.
    entry = zoo("FCOS", frozen_bn=True, head=dict(norm_on_bbox=norm_on_bbox))
    model = build(entry)
    # A teacher is in eval mode from the start; a head that trains is a student's or a peer's.
    teacher = build(entry).eval()
    heads = pair(model.bbox_head, teacher.bbox_head)
    picture = raw_batch()
    found = []
    for training, head in ((True, heads.student), (False, heads.teacher)):
        model.train(training)
        data = model.data_preprocessor(picture, training)
        with Recorder(model, [head.classes, head.boxes]).record(model) as recording:
            model(data["inputs"], mode="tensor")
        chosen = torch.ones(4, 12 * 12 + 6 * 6 + 3 * 3, dtype=torch.bool)
        found.append(head.regression(recording, chosen))
    torch.testing.assert_close(found[0], found[1])


def _sampling_rpn():
    entry = staged("Faster R-CNN")
    sampler = dict(type="RandomSampler", num=32, pos_fraction=0.5, neg_pos_ub=-1, add_gt_as_proposals=False)
    entry["train_cfg"]["rpn"]["sampler"] = sampler
    return entry


SIZES = ((96, 96), (90, 96), (96, 200), (70, 64))
"""Of a batch that is padded; the second one by less than a stride."""


@pytest.mark.parametrize("border", [-1, 0])
@pytest.mark.parametrize("kind", ["GFL", "ATSS", "TOOD", "RetinaNet", "RPN"])
def test_the_valuable_region_is_that_of_all_valid_anchors(kind, border):
    entry, path = (_sampling_rpn(), "rpn_head") if kind == "RPN" else (zoo(kind), "bbox_head")
    (entry["train_cfg"]["rpn"] if kind == "RPN" else entry["train_cfg"])["allowed_border"] = border
    heads, recording, batch = recorded(build(entry), path, SIZES)
    found = heads.student.assignment(recording, batch)
    weights = found.weights("vlr", batch)
    x1, y1, x2, y2 = found.anchors.T
    for image, (height, width) in enumerate(SIZES):
        # The host pads to multiples of 32, then to the largest of the batch, whose positions it leaves out.
        padded = [32 * math.ceil(side / 32) for side in (width, height)]
        valid = ((x1 + x2) / 2 < padded[0]) & ((y1 + y2) / 2 < padded[1])
        if border == 0:
            valid &= (x1 >= 0) & (y1 >= 0) & (x2 < width) & (y2 < height)
        counts = [int(level.sum()) for level in valid.split(found.num_per_level)]
        region = valuable_region(found.anchors[valid], counts, batch.boxes[image])
        region *= (((x1 + x2) / 2 < width) & ((y1 + y2) / 2 < height))[valid]
        assert torch.equal(weights[image][valid], region) and region.any()
        assert not weights[image][~valid].any()
    # RetinaNet's assigner ignores an IoU of 0.4 to 0.5, RPN's sampler leaves out most; the others use all they get.
    left_out = (weights > 0) & ~found.assigned
    assert left_out.any() == (kind in ("RetinaNet", "RPN"))
    assert torch.equal(found.given, found.assigned) == (kind not in ("RetinaNet", "RPN"))


def test_yolox_joins_classes_and_objectness():
    score, objectness = torch.tensor([[2.0, -30.0, 40.0]]), torch.tensor([[0.5, 1.0, 40.0]])
    expected = (score.double().sigmoid() * objectness.double().sigmoid())[0]
    found = joint_logits(score, objectness)[0]
    torch.testing.assert_close(found.double().sigmoid()[:2], expected[:2], rtol=1e-6, atol=0)
    assert found[2].item() == pytest.approx(39.3, abs=0.1)  # log(2) below 40, where the probability itself is 1


def test_tood_scores_are_probabilities_already():
    _, heads, recording, batch = trained_step("TOOD")
    rows = heads.class_pairs(recording, recording, batch, "all")[0]
    levels = recording.tensors(heads.student.classes)
    scores = torch.cat([level.permute(0, 2, 3, 1).reshape(-1, 10) for level in levels])
    torch.testing.assert_close(rows.student.sigmoid(), scores.clamp(1e-6, 1 - 1e-6), rtol=1e-4, atol=1e-7)


def test_a_batch_of_one_image_of_yolox():
    model = build(zoo("YOLOX"))
    head = dense_head(model.bbox_head, "bbox_head", "student", "term")
    model.train()
    data = model.data_preprocessor(part(raw_batch(), slice(1)), True)
    with Recorder(model, [*head.class_taps, head.boxes, head.targets]).record(model) as recording:
        model(**data, mode="loss")
    found = head.assignment(recording, Batch(boxes=[torch.tensor(BOXES[0])], image_sizes=[(96, 96)]))
    assert found.labels.shape == (1, 12 * 12 + 6 * 6 + 3 * 3) and found.positive.any()
    assert set(found.labels[found.positive].tolist()) == {0}  # the class of its one object
    targets = found.targets[found.positive]
    assert torch.equal(targets, torch.tensor(BOXES[0]).expand_as(targets))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_decoded_boxes_are_those_that_the_head_predicts(kind, training):
    model = build(zoo(kind, frozen_bn=True, head=dict(norm_on_bbox=True) if kind == "FCOS" else None)).eval()
    batch = raw_batch()
    data = model.data_preprocessor(batch, False)
    model.test_cfg.update(score_thr=0.0, nms_pre=1000)
    model.bbox_head.test_cfg.update(
        score_thr=0.0, nms_pre=1000, nms=dict(type="nms", iou_threshold=1.0), max_per_img=4000
    )
    with torch.no_grad():
        predicted = model(**copy.deepcopy(data), mode="predict")[0].pred_instances.bboxes
        model.train(training)
        owner = "student" if training else "teacher"
        head = dense_head(model.bbox_head, "bbox_head", owner, "term")
        found = head.decoded(model(data["inputs"], mode="tensor")[1])[0]
    # Clipped to the image, as most heads predict; in some other order.
    clipped = found.clamp(0, 96)
    distances = torch.cdist(predicted[:50], found if kind in ("TOOD", "YOLOX") else clipped, p=math.inf).amin(1)
    assert len(predicted) >= 50
    assert distances.max() < 1e-2


def test_boxes_of_heads_whose_points_lie_elsewhere_in_a_cell(tmp_path):
    # FCOS's points are the centres of cells, GFL's their corners: each head's boxes are decoded at its own.
    student, teacher = zoo("FCOS", frozen_bn=True), zoo("GFL", width=6, channels=12)
    model = build(
        distilled(student, teacher, save_teacher(tmp_path / "t.pth", teacher), terms=[dict(type="BoundedRegression")])
    ).train()
    data = model.data_preprocessor(raw_batch(), True)
    distiller, batch = model.distiller, model._batch(**data)
    with watched() as steps:
        model(**data, mode="loss")
    recording, other = (steps[0].recordings[name] for name in ("student", "teacher"))
    heads = distiller.terms["bounded_regression"].predictions.heads
    rows = heads.box_pairs(recording, other, batch)[0]
    assignment = heads.student.assignment(recording, batch)
    chosen = assignment.positive
    places = in_order_of_pick(chosen, assignment.num_per_level)
    image = in_order_of_pick(chosen, assignment.num_per_level, images=True)
    inner = distiller.teacher.model
    levels = inner(data["inputs"], mode="tensor")[1]
    anchors = torch.cat(
        inner.bbox_head.prior_generator.grid_priors([level.shape[-2:] for level in levels], device="cpu")
    )
    distances = torch.cat(
        [inner.bbox_head.integral(x.permute(0, 2, 3, 1).reshape(-1, 36)).view(4, -1, 4) for x in levels], 1
    )
    pixels = distances * assignment.strides[:, None]
    boxes = inner.bbox_head.bbox_coder.decode(
        inner.bbox_head.anchor_center(anchors).repeat(4, 1), pixels.flatten(0, 1)
    ).view(4, -1, 4)
    expected = boxes[image, places] / assignment.strides[places, None]
    torch.testing.assert_close(rows.teacher, expected, rtol=1e-4, atol=1e-4)
