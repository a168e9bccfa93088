"""Sealed states: any change of a saved value is found when it is read."""

from __future__ import annotations

import copy

import pytest
import torch

from kdgraft import DistillError
from kdgraft.checksum import seal, unseal


def state():
    return {
        "terms": {"hint.weight": torch.arange(6.0).reshape(2, 3), "half": torch.ones(2, dtype=torch.bfloat16)},
        "dropped": {"hint": 2},
        "hidden": {"critic": {"steps": [torch.tensor(3), (0.5, True, None)], "name": "adam", "none": torch.zeros(0)}},
    }


def test_a_sealed_state_comes_back_through_a_file(tmp_path):
    torch.save(seal(state()), tmp_path / "a.pt")
    found = unseal(torch.load(tmp_path / "a.pt", weights_only=True), "a.pt")
    assert found.keys() == state().keys()
    assert torch.equal(found["terms"]["hint.weight"], state()["terms"]["hint.weight"])
    assert found["dropped"] == {"hint": 2} and found["hidden"]["critic"]["steps"][1] == (0.5, True, None)


def flipped(tensor):
    tensor.view(torch.uint8).view(-1)[0] ^= 1


@pytest.mark.parametrize(
    "change",
    [
        lambda s: flipped(s["terms"]["hint.weight"]),
        lambda s: flipped(s["terms"]["half"]),
        lambda s: s["dropped"].update(hint=3),
        lambda s: s["terms"].update({"hint.weight": s["terms"]["hint.weight"].reshape(3, 2)}),
        lambda s: s["terms"].update(half=s["terms"]["half"].half()),
        lambda s: s["terms"].pop("half"),
        lambda s: s["hidden"]["critic"]["steps"].pop(),
        lambda s: s["hidden"]["critic"].update(name="adan"),
        lambda s: s.pop("checksum"),
    ],
)
def test_a_changed_state_is_refused(change):
    sealed = copy.deepcopy(seal(state()))
    change(sealed)
    with pytest.raises(DistillError, match=r"a\.pt is damaged"):
        unseal(sealed, "a.pt")


def test_the_given_state_is_left_as_it_is():
    given = state()
    unseal(seal(given), "a.pt")
    assert given.keys() == state().keys()
