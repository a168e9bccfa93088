"""Dense heads: picking anchors, reading the assignment, and refusing pairs of heads that do not compare."""

from __future__ import annotations

import torch
from mmengine.structures import InstanceData

from det_support import BOXES, Given, build, detector, distilled, raw_batch
from taskdistill.regions import Batch
from taskdistill_det import SoftTargets
from taskdistill_det.dense import dense_head, in_order_of_pick, pick, pick_weights


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
    head = dense_head(build(detector(classes=3, strides=(8, 16))["bbox_head"]), "bbox_head", "student", SoftTargets())
    labels = [torch.tensor([[0, 3, 3, 3]]), torch.tensor([[2]])]
    weights = [torch.tensor([[1.0, 1.0, 1.0, 0.0]]), torch.tensor([[1.0]])]
    targets = [torch.zeros(1, 4, 4), torch.tensor([[[0.0, 0, 8, 8]]])]
    batch = Batch(padded_size=(16, 16), image_sizes=[(8, 16)], boxes=[torch.tensor([[0.0, 0.0, 8.0, 8.0]])])
    outputs = [torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 1, 1)]
    seen = Given({head.targets: (None, labels, weights, targets, 2), head.classes: outputs})
    found = head.assignment(seen, batch)
    assert found.num_per_level == [4, 1]
    assert found.anchors[[1, 4]].tolist() == [[-8, -16, 24, 16], [-32, -32, 32, 32]]  # four strides large
    assert found.strides.tolist() == [8, 8, 8, 8, 16]
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
            detector(kind), teacher_model, teacher_checkpoint, terms=[dict(type="SoftTargets", region="main")]
        )
        model = build(entry).train()
        data = model.data_preprocessor(raw_batch(), True)
        with model.distiller.record_student(model) as recording:
            model(**data, mode="loss")
        head = model.distiller.terms["soft_targets"].heads.student
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
