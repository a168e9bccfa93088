"""Schedules: their values, by iteration and by epoch, alone and multiplied."""

from __future__ import annotations

import math

import pytest

from kdgraft import SCHEDULES, Constant, Decay, DistillError, Ramp, Schedule, Step, Stop, WarmUp
from kdgraft.schedules import build_schedule


def values(schedule: Schedule, *iterations: int) -> list[float]:
    return [schedule(Step(iteration, 1000)) for iteration in iterations]


def test_constant():
    assert values(Constant(), 0, 1, 10**9) == [1, 1, 1]
    assert isinstance(build_schedule(None), Constant)


def test_linear_warm_up():
    # 100 iterations from 50 on: 75 is a quarter of the way, 100 half, 125 three quarters.
    assert values(WarmUp(150, begin=50), 0, 50, 75, 100, 125, 150, 1000) == [0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert values(WarmUp(100, start=0.2), 0, 50, 100) == pytest.approx([0.2, 0.6, 1])


def test_cosine_warm_up():
    # ½ − ½ cos(π·x) at x = 0, ¼, ½, ¾, 1; cos 45° = √½
    low = 0.5 - 0.5 * math.sqrt(0.5)
    assert values(WarmUp(100, shape="cosine"), 0, 25, 50, 75, 100) == pytest.approx([0, low, 0.5, 1 - low, 1])


def test_decay():
    assert values(Decay(100, begin=20), 0, 20, 60, 100, 200) == [1, 1, 0.5, 0, 0]
    assert values(Decay(100, final=0.1, shape="cosine"), 0, 50, 100) == pytest.approx([1, 0.55, 0.1])


def test_ramp_between_any_two_factors():
    assert values(Ramp(10, start=2, final=0.5), 0, 5, 10, 11) == [2, 1.25, 0.5, 0.5]


def test_ramp_of_no_length_is_a_step():
    assert values(WarmUp(10, begin=10), 9, 10) == [0, 1]
    assert values(WarmUp(0), 0) == [1]


def test_stop():
    assert values(Stop(3), 0, 2, 3, 100) == [1, 1, 0, 0]
    assert values(Stop(0), 0) == [0]


@pytest.mark.parametrize("schedule", [WarmUp(4, by="epoch"), Decay(4, by="epoch"), Stop(2, by="epoch")])
def test_by_epoch_ignores_iterations(schedule: Schedule):
    by_iteration = type(schedule)(schedule.end)
    for now in range(6):
        assert schedule(Step(iteration=777, epoch=now)) == by_iteration(Step(iteration=now, epoch=777))


def test_several_are_multiplied():
    schedule = build_schedule([dict(type="WarmUp", end=10), dict(type="Stop", end=20), "Constant"])
    assert values(schedule, 0, 5, 10, 19, 20) == [0, 0.5, 1, 1, 0]


def test_spec():
    assert isinstance(build_schedule("Constant"), Constant)
    assert values(build_schedule(dict(type="Ramp", end=4, by="iter")), 1) == [0.25]
    ready = Stop(3)
    assert build_schedule(ready) is ready
    assert set(SCHEDULES) >= {"Constant", "Ramp", "WarmUp", "Decay", "Stop"}


def test_the_largest_factor():
    assert Constant().largest == Stop(3).largest == WarmUp(3).largest == Decay(3).largest == 1
    assert Ramp(10, start=2, final=0.5).largest == 2
    assert build_schedule([Ramp(10, final=3), Ramp(10, start=4), "Constant"]).largest == 12


def test_a_schedule_shows_its_settings():
    assert repr(Stop(3, by="epoch")) == "Stop(end=3, by='epoch')"
    assert "end=10" in repr(build_schedule([WarmUp(10), Stop(20)]))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (dict(type="WarmUp", end=5, begin=6), "WarmUp needs 0 <= begin <= end, got begin=6, end=5"),
        (dict(type="Decay", end=5, begin=-1), "Decay needs 0 <= begin <= end"),
        (dict(type="Ramp", end=5, start=-1), "Ramp: start must be a number >= 0, got -1"),
        (dict(type="Decay", end=5, final=-0.5), "Decay: final must be a number >= 0, got -0.5"),
        (dict(type="Ramp", end=5, start=float("nan")), "Ramp: start must be a number >= 0, got nan"),
        (dict(type="Ramp", end=5, final=float("inf")), "Ramp: final must be a number >= 0, got inf"),
        (
            dict(type="Ramp", end=5, final=1e39),
            "final must be a number >= 0, got 1e+39, which exceeds the range of float32",
        ),
        (dict(type="Ramp", end=5, final=10**400), "final must be a number >= 0"),
        (dict(type="Ramp", end=5, start="a"), "Ramp: start must be a number >= 0, got 'a'"),
        (dict(type="Decay", end=5, final=None), "Decay: final must be a number >= 0, got None"),
        (dict(type="Ramp", end=5, start=True), "Ramp: start must be a number >= 0, got True"),
        (dict(type="Ramp", end=5, shape=["linear"]), "shape must be 'linear' or 'cosine', got ['linear']"),
        (dict(type="Ramp", end=5.5), "Ramp: end must be a whole number of iterations or epochs, got 5.5"),
        (lambda step: 1.0, "a schedule is a name, a dict with a type, or a list of these; got <function"),
        (dict(type=int), "schedule int cannot be built from a config"),
        (dict(type="Ramp", end=5, shape="cos"), "shape must be 'linear' or 'cosine', got 'cos'"),
        (dict(type="Stop", end=5, by="step"), "by must be 'iter' or 'epoch', got 'step'"),
        (dict(type="WarmUp", end=5, by="epochs"), "by must be 'iter' or 'epoch', got 'epochs'"),
        (dict(type="Stop", end=-1), "Stop needs end >= 0, got -1"),
        (dict(type="WarmUp"), "schedule WarmUp: missing a required argument: 'end'"),
        (dict(type="WarmUp", until=5), "schedule WarmUp takes no argument 'until'"),
        ("Warmup", "no schedule is called 'Warmup'; did you mean 'WarmUp'"),
        (0.5, "a schedule is a name, a dict with a type, or a list of these; got 0.5"),
    ],
)
def test_errors(spec: object, message: str):
    with pytest.raises(DistillError) as error:
        build_schedule(spec)
    assert message in str(error.value)
