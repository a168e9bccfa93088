"""Divergence of pixels and dice of masks by hand."""

from __future__ import annotations

import math

import torch

from kdgraft.losses import mask_costs, mask_regression

LOG3 = math.log(3)
STUDENT = torch.tensor([[LOG3, 0.0]])  # probabilities 3/4 and 1/2
TEACHER = torch.tensor([[0.0, 0.0]])  # 1/2 and 1/2

# KL(1/2 ‖ 3/4) = ½ log(½ / ¾) + ½ log(½ / ¼), and nothing for the second pixel.
DIVERGENCE = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
# 2 · (3/8 + 1/4) + 1 of 9/16 + 1/4 + 2/4 + 1
DICE = 1 - (2 * 0.625 + 1) / (0.8125 + 0.5 + 1)


def test_mask_regression_by_hand():
    torch.testing.assert_close(mask_regression(STUDENT, TEACHER, masks=1, dice=0), torch.tensor(DIVERGENCE / 2))
    torch.testing.assert_close(mask_regression(STUDENT, TEACHER, masks=0, dice=1), torch.tensor(DICE))


def test_pixels_that_are_left_out_change_nothing():
    student, teacher = (torch.cat([x, torch.full((1, 3), v)], 1) for x, v in ((STUDENT, torch.inf), (TEACHER, -5.0)))
    student.requires_grad_()
    valid = torch.tensor([[True, True, False, False, False]])
    found = mask_regression(student, teacher, valid=valid)
    torch.testing.assert_close(found.detach(), mask_regression(STUDENT, TEACHER))
    costs = mask_costs(student.detach(), teacher, valid)
    torch.testing.assert_close(costs, mask_costs(STUDENT, TEACHER))


def test_costs_are_the_losses_of_all_pairs():
    generator = torch.Generator().manual_seed(0)
    first, second = (3 * torch.randn(2, count, 7, generator=generator) for count in (3, 4))
    pairs = first[:, :, None].expand(-1, -1, 4, -1), second[:, None].expand(-1, 3, -1, -1)
    found = mask_costs(first, second)
    for cost, weights in zip(found, (dict(masks=1, dice=0), dict(masks=0, dice=1)), strict=True):
        torch.testing.assert_close(cost, mask_regression(*pairs, **weights, reduction="none"), rtol=1e-4, atol=1e-5)
