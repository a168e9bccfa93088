"""Dense heads: picking anchors, reading the assignment, and refusing pairs of heads that do not compare."""

from __future__ import annotations

import torch
from mmengine.structures import InstanceData

from det_support import BOXES, CLASSES, Given, build, detector, distilled, raw_batch
from taskdistill.regions import Batch
from taskdistill_det.dense import TARGETS, Assignment, pick, pick_weights


def test_pick_by_hand():
    # Two images, two channels, a level of 2×2 and one of 1×1; values 100·image + 10·channel + position.
    level = torch.tensor(
        [[[[0, 1], [2, 3]], [[10, 11], [12, 13]]], [[[100, 101], [102, 103]], [[110, 111], [112, 113]]]]
    )
    coarse = torch.tensor([[[[7]], [[17]]], [[[107]], [[117]]]])
    chosen = torch.tensor([[False, True, True, False, True], [True, False, False, False, False]])
    assert pick([level, coarse], chosen, [4, 1]).tolist() == [[1, 11], [2, 12], [100, 110], [7, 17]]
    weights = torch.tensor([[0.0, 0.1, 0.2, 0.0, 0.5], [0.3, 0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(pick_weights(weights, chosen, [4, 1]), torch.tensor([0.1, 0.2, 0.3, 0.5]))
    assert pick([level, coarse], torch.zeros_like(chosen), [4, 1]).shape == (0, 2)


def test_assignment_by_hand():
    # One image of 16×8 pixels (width × height) padded to 16×16, anchors of 8 pixels at multiples of 8, then one of 16 pixels.
    anchors = [
        torch.tensor([[[-4.0, -4, 4, 4], [4, -4, 12, 4], [-4, 4, 4, 12], [4, 4, 12, 12]]]),
        torch.tensor([[[-8.0, -8, 8, 8]]]),
    ]
    labels = [torch.tensor([[0, 3, 3, 3]]), torch.tensor([[2]])]
    weights = [torch.tensor([[1.0, 1.0, 1.0, 0.0]]), torch.tensor([[1.0]])]
    batch = Batch(padded_size=(16, 16), image_sizes=[(8, 16)], boxes=[torch.tensor([[0.0, 0.0, 8.0, 8.0]])])
    found = Assignment.of(Given({TARGETS: (anchors, labels, weights, None, None, 2)}), batch, num_classes=3)
    assert found.num_per_level == [4, 1]
    assert found.assigned.tolist() == [[True, True, True, False, True]]
    assert found.valid.tolist() == [
        [True, True, False, False, True]
    ]  # the third one's centre (0, 8) is below the image
    assert found.positive.tolist() == [[True, False, False, False, True]]
    assert found.weights("all", batch).tolist() == [[1, 1, 0, 0, 1]]
    assert found.weights("main", batch).tolist() == [[1, 0, 0, 0, 1]]
    assert Assignment.of(Given({}), batch, 3) is found  # made once a step


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
        found = Assignment.of(recording, model._batch(**data), len(CLASSES))
        priors = model.bbox_head.prior_generator.grid_priors([(12, 12), (6, 6), (3, 3)], device="cpu")
        for image, boxes in enumerate(BOXES):
            truth = InstanceData(bboxes=torch.tensor(boxes), labels=torch.arange(len(boxes)))
            assigned = model.bbox_head.assigner.assign(
                InstanceData(priors=torch.cat(priors)), [len(p) for p in priors], truth
            )
            positive = assigned.gt_inds > 0
            assert torch.equal(found.positive[image], positive) and positive.any()
            assert torch.equal(found.labels[image][positive], assigned.gt_inds[positive] - 1)
