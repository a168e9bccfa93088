"""The distiller's state: invisible in state dicts, alive in the message hub."""

from __future__ import annotations

import copy
from itertools import count

import pytest
import torch
from mmengine.logging import MessageHub
from torch import nn

from kdgraft import Constant, Engine, FeatureImitation, Step, Teacher
from kdgraft.errors import DistillError
from kdgraft.hiding import hide_from_state_dict
from kdgraft_mm.state import KEY, HubLink

_hubs = count()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.layer(x))


def wired(seed: int = 0, names: tuple[str, ...] = ("a",)) -> Engine:
    torch.manual_seed(seed)
    student, teacher = Net(), Net()
    distiller = Engine(Teacher(teacher), [FeatureImitation("layer", name=name, schedule=Constant()) for name in names])
    x = torch.zeros(1, 3, 2, 2)
    distiller.wire(student, lambda: student(x), lambda source: source.model(x))
    return distiller


@pytest.fixture
def hub():
    """A fresh current message hub, as a Runner makes it before the model."""

    def make() -> MessageHub:
        return MessageHub.get_instance(f"test_mm_state {next(_hubs)}")

    return make


def test_a_hidden_child_is_neither_saved_nor_missed():
    class Parent(Net):
        pass

    plain, parent = Parent(), Parent()
    hidden = wired()
    parent.add_module("hidden", hidden)
    hide_from_state_dict(hidden)
    own = copy.deepcopy(hidden.terms.state_dict())
    assert list(parent.state_dict()) == list(plain.state_dict())
    assert list(parent.state_dict()._metadata) == list(plain.state_dict()._metadata)
    assert parent.load_state_dict(plain.state_dict(), strict=True) == ([], [])
    assert all(torch.equal(own[key], value) for key, value in hidden.terms.state_dict().items())

    outer = nn.Sequential(parent)
    assert [*outer.state_dict()] == [f"0.{key}" for key in plain.state_dict()]
    assert outer.load_state_dict(outer.state_dict(), strict=True) == ([], [])
    twin = copy.deepcopy(parent)
    assert list(twin.state_dict()) == list(plain.state_dict())


def test_the_hub_saves_the_live_values_and_gives_them_back(hub):
    current = hub()
    link, distiller = HubLink(), wired()
    link.sync(distiller)
    with torch.no_grad():
        distiller.terms["a"].adapters[0].project.weight.fill_(3)
    distiller.dropped["a"] = 2
    saved = current.state_dict()["runtime_info"][KEY]
    assert type(saved) is dict and saved["dropped"] == {"a": 2}

    later = hub()
    other, resumed = HubLink(), wired(seed=1)
    later.load_state_dict(dict(log_scalars={}, runtime_info={KEY: saved}, resumed_keys={KEY: True}))
    other.sync(resumed)
    assert (resumed.terms["a"].adapters[0].project.weight == 3).all() and resumed.dropped == {"a": 2}
    with torch.no_grad():
        resumed.terms["a"].adapters[0].project.weight.fill_(4)
    other.sync(resumed)  # of each step: nothing is loaded again
    assert (resumed.terms["a"].adapters[0].project.weight == 4).all()


def test_a_state_of_other_terms_is_refused(hub):
    hub().update_info(KEY, wired(names=("b",)).live_state())
    with pytest.raises(DistillError, match=r"other distillation terms \(a\.adapters"):
        HubLink().sync(wired())


def test_a_link_keeps_to_the_hub_that_its_runner_made(hub):
    first = hub()
    link = HubLink()
    second = hub()  # another Runner is built before the first trains
    second.update_info(KEY, wired(seed=5).live_state())
    second.update_info("iter", 70)
    first.update_info("iter", 7)
    first.update_info("epoch", 2)
    distiller = wired()
    before = copy.deepcopy(distiller.terms.state_dict())
    link.sync(distiller)
    assert all(torch.equal(before[key], value) for key, value in distiller.terms.state_dict().items())
    assert link.step() == Step(7, 2)
    assert isinstance(second.runtime_info[KEY], dict)  # left for the Runner that it belongs to
    assert link.info("iter") == 7 and link.info("absent") is None


def test_a_model_built_outside_a_runner_follows_the_one_that_trains_it(hub):
    finished = hub()
    finished.update_info("iter", 999)
    link = HubLink()
    now = hub()
    now.update_info("iter", 3)
    assert link.step() == Step(3, 0)
    untrained = hub()
    link = HubLink()
    now = hub()
    now.update_info("iter", 5)
    assert link.step() == Step(5, 0)
    assert "iter" not in untrained.runtime_info


def test_without_a_train_loop_the_link_counts_itself(hub):
    hub()
    link = HubLink()
    assert [link.step() for _ in range(3)] == [Step(0, 0), Step(1, 0), Step(2, 0)]


def test_a_deep_copy_is_tied_to_nothing(hub):
    first = hub()
    first.update_info("epoch", 1)
    link = HubLink()
    link.step()
    twin = copy.deepcopy(link)
    assert twin._built_in is None and twin.step() == Step(0, 0) and link.step() == Step(1, 0)
