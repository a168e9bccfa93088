"""Dark knowledge with permuted predictions (DKPP)."""

from __future__ import annotations

import pytest
import torch

import golden
from kdgraft import DistillError
from kdgraft.losses.permuted import permuted


def test_by_hand():
    # Classes 0, 2 and 3 are not the first. The smallest keys of these are those of 3, 0 and 2: their logits go there in this order.
    logits, keys = torch.tensor([[1.0, 9.0, 2.0, 3.0]]), torch.tensor([[5, 0, 7, 2]])
    assert permuted(logits, keys).tolist() == [[3.0, 9.0, 1.0, 2.0]]
    assert permuted(logits.T, keys.T, dim=0).tolist() == [[3.0], [9.0], [1.0], [2.0]]


def test_classes_that_an_item_lacks_stay_where_they_are():
    logits, keys = torch.tensor([[1.0, -1e4, 9.0, 2.0, -1e4]]), torch.tensor([[9, 1, 3, 2, 4]])
    present = torch.tensor([[True, False, True, True, False]])
    assert permuted(logits, keys, present=present).tolist() == [[2.0, -1e4, 9.0, 1.0, -1e4]]
    alone = torch.tensor([[False, False, True, False, False]])
    assert torch.equal(permuted(logits, keys, present=alone), logits)


def test_the_largest_stays_and_the_others_are_the_same_in_another_order():
    _, logits = golden.logits()
    keys = torch.randint(2**62, logits.shape, generator=torch.Generator().manual_seed(0))
    found = permuted(logits, keys)
    assert torch.equal(found.argmax(1), logits.argmax(1)) and not torch.equal(found, logits)
    assert torch.equal(found.sort(1).values, logits.sort(1).values)
    maps = [x.reshape(1, 5, 1, 10).movedim(-1, 1) for x in (logits, keys)]
    assert torch.equal(permuted(*maps, dim=1).movedim(1, -1).reshape(5, 10), found)


def test_every_order_of_the_others_is_as_likely():
    logits = torch.tensor([4.0, 1.0, 2.0, 3.0]).expand(6000, 4)
    keys = torch.randint(2**62, logits.shape, generator=torch.Generator().manual_seed(0))
    _, counts = permuted(logits, keys).unique(dim=0, return_counts=True)
    assert len(counts) == 6 and (counts - 1000).abs().max() < 4 * (6000 * 5 / 36) ** 0.5


def test_nothing_and_mistakes():
    assert permuted(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.long)).shape == (0, 3)
    with pytest.raises(DistillError, match=r"permuted: keys \(3,\) must have the shape of the logits \(2, 3\)"):
        permuted(torch.zeros(2, 3), torch.zeros(3, dtype=torch.long))
