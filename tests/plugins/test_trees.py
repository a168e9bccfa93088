"""Nested values as tensors and a structure, and recordings of what is known of a teacher."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from kdgraft.errors import DistillError
from kdgraft.sources import KnownRecording
from kdgraft.taps import NeverFired, Tap
from kdgraft.trees import put_together, taken_apart

A, B, C = torch.ones(2), torch.zeros(1, 3), torch.arange(4)


@pytest.mark.parametrize(
    "value", [A, [A, B], (A, [B, None, 3]), {"a": (A,), "b": {"c": [B, C], "d": "text"}}, [], None, (True, 0.5)]
)
def test_a_value_is_put_together_as_it_was(value):
    structure, leaves = taken_apart(value)
    found = put_together(json.loads(json.dumps(structure)), leaves)

    def same(one, other):
        assert type(one) is type(other)
        if isinstance(one, torch.Tensor):
            assert one is other
        elif isinstance(one, dict):
            assert one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
        elif isinstance(one, (list, tuple)):
            assert len(one) == len(other) and all(same(x, y) for x, y in zip(one, other, strict=True))
        else:
            assert one == other
        return True

    assert same(found, value)


@pytest.mark.parametrize("value", [SimpleNamespace(a=A), {1: A}, [A, {2}], torch.Size([1])])
def test_what_has_no_structure_is_refused(value):
    with pytest.raises(DistillError, match="cannot be stored"):
        taken_apart(value)


def test_a_known_recording_answers_as_one_that_was_made():
    maps, absent = Tap.parse("neck[*]"), Tap.parse("head.cls")
    recording = KnownRecording({maps: [A, B]})
    assert recording.calls(maps) == 1 and recording.calls(absent) == 0
    assert recording.tensors(maps) == [A, B]
    doubled = recording.mapped(lambda tensor: tensor * 2)
    assert torch.equal(doubled[maps][0], A * 2) and recording[maps][0] is A
    with pytest.raises(NeverFired):
        recording[absent]
