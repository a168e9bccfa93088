"""The host's losses in dicts, as terms take a share of them."""

from __future__ import annotations

import torch

from kdgraft_mm.graft import mix


def test_mix():
    one, levels, other = (
        torch.tensor(2.0, requires_grad=True),
        [torch.tensor(4.0), torch.tensor(6.0)],
        torch.tensor(3.0),
    )
    losses = {"loss_cls": one, "loss_rpn_cls": levels, "loss_bbox": other}
    mix(losses, {"loss_cls": 0.5, "loss_rpn_cls": 0.25})
    assert losses["loss_cls"].item() == 1 and losses["loss_rpn_cls"] == [1.0, 1.5]
    assert losses["loss_bbox"] is other
    losses["loss_cls"].backward()
    assert one.grad.item() == 0.5
    mix(losses, {})
    assert losses["loss_cls"].item() == 1


def test_a_loss_that_a_step_lacks_is_left():
    # An RoI head without a proposal has no class loss.
    losses = {"loss_bbox": torch.ones(())}
    mix(losses, {"loss_cls": 0.5})
    assert losses == {"loss_bbox": 1}
