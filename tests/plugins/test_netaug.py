"""NetAug: a tiny net inside random wider ones that share its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from golden import netaug as golden
from kdgraft import Distiller, DistillError, NetAug, Stop, Views, WiringError
from kdgraft.batchnorm import reestimate_batchnorm
from kdgraft.fit import fit

X = torch.sin(torch.arange(6 * 3 * 8 * 8.0)).reshape(6, 3, 8, 8)
Y = torch.tensor([0, 1, 2, 3, 4, 0])


def make(first: float, second: float | None = None) -> nn.Module:
    """A convolution, a depthwise one, and a pointwise one with its own width, each with statistics, and dropout."""
    a, b = round(4 * first), round(6 * (first if second is None else second))
    return nn.Sequential(
        nn.Conv2d(3, a, 3, bias=False),
        nn.BatchNorm2d(a),
        nn.ReLU6(),
        nn.Conv2d(a, a, 3, groups=a, bias=False),
        nn.Conv2d(a, b, 1, bias=False),
        nn.BatchNorm2d(b),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(b, 5),
    )


def seeded(build: Callable[[], nn.Module]) -> Any:
    torch.manual_seed(3)
    return build()


def total(net: NetAug) -> Tensor:
    out = net(X)
    return out.total(F.cross_entropy(out.student, Y)) + sum(
        out.peer_shares[name] * F.cross_entropy(output, Y) for name, output in out.peers.items()
    )


# --- its step


def test_the_gradients_of_one_step_by_hand():
    """Two layers of width 1 or 2 without activations: y = ab, or ab + cd; the loss is y²/2."""

    def two_layers(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(1, width, bias=False), nn.Linear(width, 1, bias=False))

    net = NetAug(two_layers, widths=(1, 2), weight=0.5, example=torch.ones(1, 1))
    a, b = net.student.parameters()
    c, d = net.extra.values()
    with torch.no_grad():
        for parameter, value in ((a, 2.0), (b, 3.0), (c, 5.0), (d, 7.0)):
            parameter.fill_(value)
    one = torch.ones(1, 1)
    own, wide = net(one).student, net.at_widths([2], one)
    (own.square() / 2 + 0.5 * wide.square() / 2).sum().backward()
    assert (own.item(), wide.item()) == (6, 41)
    # The tiny net: y·b = 18, y·a = 12. The wider one: y·b = 123, y·a = 82, y·d = 287, y·c = 205, each halved.
    assert [p.grad.item() for p in (a, b, c, d)] == [18 + 61.5, 12 + 41, 143.5, 102.5]


@pytest.mark.parametrize("widths", golden.FIGURES)
def test_the_losses_and_gradients_of_the_authors(widths: tuple[int, int]):
    tiny, wide, figures = golden.FIGURES[widths]
    net = NetAug(golden.make, widths=(1, 2), stages=2, example=golden.X)
    own, wider = (F.cross_entropy(y, golden.Y) for y in (net.student(golden.X), net.at_widths(widths, golden.X)))
    torch.testing.assert_close(torch.stack([own, wider]), torch.tensor([tiny, wide]))
    (own + wider).backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    for name, (along, norm) in figures.items():
        whole = gradients[f"student.{name}"]
        for axis in reversed(range(whole.ndim)):
            key = f"extra.{name.replace('.', '/')}:{axis}"
            whole = torch.cat([whole, gradients[key]], axis) if key in gradients else whole
        weights = torch.arange(float(whole.numel())).cos().reshape(whole.shape)
        found = torch.stack([(whole * weights).sum(), whole.norm()])
        torch.testing.assert_close(found, torch.tensor([along, norm]), rtol=1e-4, atol=2e-6, msg=name)


def test_all_widths_are_drawn_for_all_stages():
    net = seeded(lambda: NetAug(make, stages=2, example=X[:1])).train()
    seen = set()
    original = net.at_widths
    net.at_widths = lambda drawn, *args: seen.add(tuple(drawn)) or original(drawn, *args)  # type: ignore[method-assign]
    for _ in range(25):
        net.augmented(X[:2])
    assert {a for a, _ in seen} == {b for _, b in seen} == {1, 1.6, 2.2, 2.8}
    assert any(a != b for a, b in seen)


def test_stages_may_have_widths_of_their_own():
    net = seeded(lambda: NetAug(make, widths=((1, 2.5), (1, 1.5, 2)), example=X[:1])).train()
    seen = set()
    original = net.at_widths
    net.at_widths = lambda drawn, *args: seen.add(tuple(drawn)) or original(drawn, *args)  # type: ignore[method-assign]
    for _ in range(30):
        net.augmented(X[:2])
    assert seen == {(a, b) for a in (1, 2.5) for b in (1, 1.5, 2)}
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in make(2.5, 2).parameters())


def test_inputs_of_a_teacher_are_refused():
    with pytest.raises(DistillError, match="no teacher with a view of its own"):
        NetAug(make, example=X[:1])(Views(X, teacher=X))


def test_a_distiller_around_it_or_taught_by_it_is_refused_with_the_remedy():
    net, other = NetAug(make, example=X[:1]), make(1)
    for student, teacher, name in ((net, other, "the student"), (other, net, "teacher")):
        with pytest.raises(WiringError, match=f"{name} is a NetAug around a student; give its .student here"):
            Distiller(student, teacher, ["SoftTargets"], X[:1])
    Distiller(net.student, other, ["SoftTargets"], X[:1])


# --- the tiny net


def test_the_tiny_net_starts_as_it_would_alone_and_all_weights_are_those_of_the_widest():
    net, plain = seeded(lambda: NetAug(make, example=X[:1])), seeded(lambda: make(1))
    after = torch.rand(1)
    assert net.student.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(net.student.state_dict().values(), plain.state_dict().values()))  # noqa: B905
    seeded(lambda: NetAug(make, example=X[:1]))
    assert torch.equal(torch.rand(1), after)  # nor is the rest of the program seeded otherwise
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in make(2.8).parameters())


def test_without_augmentation_it_trains_as_it_would_alone_bit_for_bit():
    net, plain = seeded(lambda: NetAug(make, weight=0, example=X[:1])).train(), seeded(lambda: make(1)).train()
    ours, theirs = (torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (net, plain))
    for step in range(3):
        torch.manual_seed(step)
        ours.zero_grad()
        loss = total(net)
        loss.backward()
        ours.step()
        torch.manual_seed(step)
        theirs.zero_grad()
        F.cross_entropy(plain(X), Y).backward()
        theirs.step()
        assert all(p.grad is not None and not p.grad.any() for p in net.extra.values())  # in the graph, for DDP
    assert all(torch.equal(a, b) for a, b in zip(net.student.state_dict().values(), plain.state_dict().values()))  # noqa: B905


def test_wider_passes_leave_its_dropout_and_its_statistics_alone():
    net, plain = seeded(lambda: NetAug(make, example=X[:1])).train(), seeded(lambda: make(1)).train()
    before = {name: buffer.clone() for name, buffer in net.extra_buffers.named_buffers()}
    torch.manual_seed(1)
    outputs = [net(X).student for _ in range(2)]
    torch.manual_seed(1)
    assert all(torch.equal(output, plain(X)) for output in outputs)
    for (name, own), other in zip(net.student.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(own, other), name
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.extra_buffers.named_buffers())


def test_training_reaches_all_weights_and_the_tiny_net_is_saved_plain():
    net = seeded(lambda: NetAug(make, widths=(1, 2.8), stages=2, example=X[:1])).train()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    before = copy.deepcopy(dict(net.named_parameters()))
    for _ in range(12):
        optimizer.zero_grad()
        total(net).backward()
        optimizer.step()
    assert all((p - before[name]).abs().max() > 0 for name, p in net.named_parameters())
    plain = make(1)
    plain.load_state_dict(net.student.state_dict())
    net.eval()
    assert torch.equal(plain.eval()(X), net(X).student)
    assert net(X).peers == {} and net(X).losses == {}


def test_weights_that_are_frozen_stay_frozen_when_wider():
    def frozen(width: float) -> nn.Module:
        net = make(width)
        net[0].requires_grad_(False)
        return net

    net = NetAug(frozen, example=X[:1])
    assert not net.extra["0/weight:0"].requires_grad and net.extra["4/weight:0"].requires_grad


def test_a_schedule_ends_the_augmentation():
    net = NetAug(make, weight=0.5, schedule=Stop(1, by="epoch"), example=X[:1])
    assert net(X).peer_shares == {"augmented": 0.5}
    net.epoch = 1
    out = net(X)
    assert out.peers == {} and out.loss == 0 and out.loss.requires_grad


def test_a_resumed_net_draws_what_the_other_would_have_drawn():
    def build(seed: int) -> NetAug:
        torch.manual_seed(seed)
        return NetAug(make, stages=2, schedule=Stop(4), example=X[:1])

    net = build(0)
    for _ in range(2):
        net(X)
    other = build(1)
    other.load_state_dict(copy.deepcopy(net.state_dict()))
    outputs = []
    for one in (net, other):
        torch.manual_seed(5)
        outputs.append([one(X).peers for _ in range(3)])
    assert outputs[0][2] == outputs[1][2] == {}  # the schedule goes on, too
    for ours, theirs in zip(*outputs, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_parts_of_a_batch_run_the_same_wider_net_and_count_once():
    net = seeded(lambda: NetAug(make, stages=2, example=X[:1])).train()
    seen = []
    original = net.at_widths
    net.at_widths = lambda drawn, *args: seen.append(drawn) or original(drawn, *args)  # type: ignore[method-assign]
    for _ in range(4):
        for last in (False, True):
            with net.part(0.5, last=last):
                net(X[:2])
    assert net.iteration == 4
    assert seen[::2] == seen[1::2] and len(set(seen)) > 1


class Stopped(Exception):
    """The run was stopped."""


def test_fit_trains_it_and_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path: Path):
    steps = 0

    def stopping(output: Tensor, targets: Tensor) -> Tensor:
        nonlocal steps
        steps += 1
        if steps > 6:  # two losses a step: in the second epoch
            raise Stopped
        return F.cross_entropy(output, targets)

    def run(seed: int, loss: Any, name: str) -> tuple[Any, nn.Module]:
        torch.manual_seed(seed)
        net = NetAug(make, stages=2, example=X[:1])
        loader = DataLoader(TensorDataset(X, Y), 3, shuffle=True)
        if seed == 0:
            torch.manual_seed(9)
        fitted = fit(net, loader, loss, epochs=3, folder=tmp_path / name, resume=True)
        return fitted, net

    whole, net = run(0, F.cross_entropy, "whole")
    with pytest.raises(Stopped):
        run(0, stopping, "parts")
    resumed, other = run(1, F.cross_entropy, "parts")
    assert resumed.history == whole.history and len(whole.history) == 3
    assert whole.model is net.student and whole.model.state_dict().keys() == make(1).state_dict().keys()
    for a, b in zip(net.state_dict().values(), other.state_dict().values(), strict=True):
        assert not isinstance(a, Tensor) or torch.equal(a, b)


def test_its_statistics_can_be_estimated_anew():
    net = NetAug(make, example=X[:1])
    net(X)
    assert reestimate_batchnorm(net.student, [(X, Y)]) == 2
    torch.testing.assert_close(net.student[1].running_mean, net.student[0](X).mean((0, 2, 3)))


# --- what is refused


def grouped(width: float) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 2 * round(4 * width), 1), nn.Conv2d(2 * round(4 * width), 4, 1, groups=2))


class Joined(nn.Module):
    """Two maps, one after the other: those of the second begin elsewhere in a wider net."""

    def __init__(self, width: float) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, round(4 * width), 1), nn.Conv2d(3, round(4 * width), 1)
        self.last = nn.Conv2d(2 * round(4 * width), 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.a(x), self.b(x)], 1))


class Constant(nn.Module):
    """A tensor that is no buffer."""

    def __init__(self, width: float) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv2d(3, round(4 * width), 1), torch.ones(round(4 * width), 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv(x) * self.scale).mean((1, 2, 3))


def deeper(width: float) -> nn.Module:
    layers = [nn.Conv2d(3, round(4 * width), 1)]
    return nn.Sequential(*layers, *[nn.Conv2d(round(4 * width), round(4 * width), 1)] * (width > 2))


def shrinking(width: float) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, round(4 * width), 1), nn.Conv2d(round(4 * width), round(8 / width), 1))


@pytest.mark.parametrize(
    ("built", "said"),
    [
        (lambda w: nn.Conv2d(3, 4, 1), r"make\(1\) and make\(2.8\) have the same shapes; multiply"),
        (
            lambda w: nn.Conv2d(3, round(4 * w), 1),
            r"outputs are \[\(1, 4, 8, 8\)\] of make\(1\) and \[\(1, 11, 8, 8\)\]",
        ),
        (deeper, r"only one of make\(1.6\) and make\(2.8\) has '1.bias'; the width must change numbers"),
        (
            shrinking,
            r"'1.weight' is \(8, 4, 1, 1\) in make\(1\) and \(5, 6, 1, 1\) in make\(1.6\), of which it is no part",
        ),
        (
            grouped,
            r"with all added weights at 0, make\(2.8\) does not compute what make\(1\) computes.*fixed number of groups",
        ),
        (Joined, "widen no concatenated maps"),
        (Constant, r"make\(2.8\) does not run on the example: .*must be buffers"),
        (
            lambda w: nn.Conv2d(3, int(torch.tensor(4 * w).item()), 1),
            r"make\(2.8\) cannot be built on torch's meta device: .*make must only create modules",
        ),
        (lambda w: lambda x: x, "make must return a module, got function"),
    ],
)
def test_a_net_that_is_no_part_of_wider_ones_is_refused(built: Callable[[float], Any], said: str):
    with pytest.raises(WiringError, match=said) as caught:
        NetAug(built, example=X[:1])
    assert "\n" not in str(caught.value)


def test_stages_whose_widths_do_not_agree_are_refused():
    def apart(a: float, b: float) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, round(4 * a), 1), nn.Conv2d(round(4 * b), 2, 1))

    with pytest.raises(WiringError, match=r"make\(2.8, 1\) does not run on the example.*connected layers must agree"):
        NetAug(apart, stages=2, example=X[:1])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(widths=(1,)), "widths must be two or more rising multipliers"),
        (dict(widths=(2, 1)), "widths must be two or more rising multipliers"),
        (dict(widths=(0, 1)), "widths must be two or more rising multipliers"),
        (dict(widths="12"), "widths must be two or more rising multipliers"),
        (dict(widths=((1, 2), (2, 1))), "widths must be two or more rising multipliers"),
        (dict(widths=((1, 2), (1, 2)), stages=3), "2 lists of widths are for as many stages, got stages=3"),
        (dict(stages=0), "stages must be a whole number >= 1"),
        (dict(weight=-1), "weight must be a number >= 0"),
        (dict(weight="1"), "weight must be a number >= 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], said: str):
    with pytest.raises(DistillError, match=said):
        NetAug(make, example=X[:1], **settings)
