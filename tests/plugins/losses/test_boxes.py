"""L1 and generalised IoU of boxes by hand."""

from __future__ import annotations

import pytest
import torch

from kdgraft import DistillError
from kdgraft.losses import box_regression, generalized_iou

# Two squares of side 2 whose centres are 1 apart along x: they share 1 · 2 of 2·4 − 2 = 6, inside 3 · 2 = 6.
NEAR = torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[1.0, 0.0, 2.0, 2.0]])
# Two unit squares with a gap of one square between them: nothing is shared, and a third of the 3 · 1 around both is neither's.
APART = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[2.0, 0.0, 1.0, 1.0]])


def test_generalised_iou_by_hand():
    torch.testing.assert_close(generalized_iou(*NEAR), torch.tensor([2 / 6]))
    torch.testing.assert_close(generalized_iou(*APART), torch.tensor([-1 / 3]))
    torch.testing.assert_close(generalized_iou(NEAR[0], NEAR[0]), torch.tensor([1.0]))
    found = generalized_iou(torch.cat([NEAR[0], APART[0]])[:, None], torch.cat([NEAR[1], APART[1]])[None])
    assert found.shape == (2, 2)
    torch.testing.assert_close(found.diagonal(), torch.tensor([2 / 6, -1 / 3]))


def test_box_regression_by_hand():
    # The centres differ by 1 in one of four numbers.
    expected = 5 * 1 / 4 + 2 * (1 - 2 / 6)
    torch.testing.assert_close(box_regression(*NEAR), torch.tensor(expected))
    torch.testing.assert_close(box_regression(*NEAR, boxes=0, overlaps=1), torch.tensor(1 - 2 / 6))


def test_boxes_without_an_area_are_finite():
    empty = torch.tensor([[0.5, 0.5, 0.0, 0.0]], requires_grad=True)
    loss = box_regression(empty, torch.tensor([[0.5, 0.5, -0.1, 0.2]]))
    loss.backward()
    assert loss.isfinite() and empty.grad is not None and empty.grad.isfinite().all()


def test_what_is_no_weight_is_refused():
    with pytest.raises(DistillError, match="overlaps"):
        box_regression(*NEAR, overlaps=-1)
