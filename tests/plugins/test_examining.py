"""A teacher's own loss with changed features: what is changed, what the network learns, and that nothing is left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdgraft import Batch, DistillError, Engine, MasKD, Recorder, Step, Tap, Teacher
from kdgraft.isolation import loss_mode

IMAGES = torch.sin(torch.arange(2 * 3 * 36.0)).reshape(2, 3, 6, 6)


class Neck(nn.Module):
    """A list of two maps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, width, 1), nn.Conv2d(3, width, 3, stride=2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.fine(x), self.coarse(x)


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.neck, self.norm, self.drop = Neck(width), nn.BatchNorm2d(width), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        fine, coarse = self.neck(x)
        return self.drop(self.norm(fine)).mean((2, 3)) - coarse.mean((2, 3))


def engine(**settings: Any) -> tuple[Engine, nn.Module]:
    torch.manual_seed(0)
    student, teacher = Net(4), Net(6)
    term = MasKD("neck[*]", name="term", pretrain=1, tokens=2, **settings)
    built = Engine(Teacher(teacher), [term])
    built.wire(student, lambda: student(IMAGES), lambda source: source.model(IMAGES))
    return built, student


def step(built: Engine, student: nn.Module, run_loss: Any) -> dict[str, Tensor]:
    run = lambda source: source.model(IMAGES)  # noqa: E731
    with built.step(student, Batch(), Step(0), run, run_loss=run_loss) as current:
        student(IMAGES)
    return current.losses()


def square(source: Any) -> Tensor:
    """The teacher's own loss."""
    return source.model(IMAGES).square().mean()


def test_the_tokens_learn_on_the_teachers_own_loss_of_the_masked_features():
    built, student = engine()
    model, networks = built.teacher.model, built.all_terms[0].auxiliaries["network"].network
    before = {key: value.clone() for key, value in model.state_dict().items()}
    maps = [network.masked(level) for network, level in zip(networks, model.neck(IMAGES), strict=True)]
    output = model.norm.eval()(maps[0][0]).mean((2, 3)) - maps[1][0].mean((2, 3))
    student.eval()  # its dropout draws numbers
    drawn = torch.get_rng_state()
    found = step(built, student, square)
    torch.testing.assert_close(found["distill.term.task"], output.square().mean().detach())
    torch.testing.assert_close(found["distill.term.overlap"], sum(overlap.mean() for _, overlap in maps).detach())
    assert "distill.term.unmasked" not in found and found["distill.term.loss"] == 0
    # The gradient of both reached the tokens, and nothing else of the teacher.
    assert len(built.all_terms[0].auxiliaries["network"].optimizer.state) == 2 * 5
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(module.training for module in model.modules()) and torch.equal(drawn, torch.get_rng_state())
    assert built.all_terms[0].examiner is None


def test_features_alone_where_the_host_knows_no_loss_or_the_user_says_so():
    for run_loss, settings in ((None, {}), (square, dict(objective="features"))):
        assert {"distill.term.overlap", "distill.term.unmasked"} < set(step(*engine(**settings), run_loss))
    with pytest.raises(DistillError, match="objective must be one of task, features"):
        MasKD("neck[*]", objective="loss")


def test_labels_do_not_fit_a_teacher_with_another_order_of_classes():
    built, student = engine()
    built.teacher.class_order = torch.tensor([1, 0])
    assert "distill.term.unmasked" in step(built, student, square)


def test_a_loss_that_cannot_be_computed_is_an_error_that_says_what_to_do():
    def fails(source: Any) -> Tensor:
        raise KeyError("gt_masks")

    with pytest.raises(
        DistillError, match=r"a Net, cannot compute its own loss .*KeyError: 'gt_masks'.*objective='features'"
    ):
        step(*engine(), fails)
    with pytest.raises(DistillError, match=r"does not read neck\[\*\] as its predictions do; set objective='features'"):
        step(*engine(), lambda source: source.model.neck.fine(IMAGES).mean())


@pytest.mark.parametrize(
    ("tap", "expected"),
    [
        ("neck[*]", (2, 3)),
        ("neck", (2, 3)),
        ("neck[1]", (1, 2)),
        ("neck[-1]", (1, 2)),
        ("neck.fine", (2, 1)),
        ("neck.fine:input", (1, 1)),
    ],
)
def test_tapped_outputs_are_changed_and_the_model_is_restored(tap: str, expected: tuple[int, int]):
    class Ones(Net):
        def __init__(self) -> None:
            super().__init__(2)
            self.neck.fine = self.neck.coarse = nn.Sequential()
            self.neck.coarse = nn.Flatten(0)

    model, parsed = Ones(), Tap.parse(tap)
    recorder = Recorder(model, [parsed])
    with recorder.substituted(model, [parsed], lambda tap, number, tensor: tensor * (number + 2)) as changed:
        fine, coarse = model.neck(torch.ones(1, 2, 2, 2))
    assert (fine.flatten()[0], coarse[0]) == expected
    assert changed[parsed] == sum(value != 1 for value in expected)
    assert [x.flatten()[0].item() for x in model.neck(torch.ones(1, 2, 2, 2))] == [1, 1]


def test_fields_of_a_dict_are_changed_and_other_values_are_left():
    class Fields(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"maps": [x, x], "other": x, "none": None}

    model = nn.Sequential(Fields())
    taps = [Tap.parse(text) for text in ("0[maps][1]", "0[none]")]
    with Recorder(model, taps).substituted(model, taps, lambda tap, number, tensor: -tensor):
        found = model(torch.ones(1))
    assert (found["maps"][0], found["maps"][1], found["other"], found["none"]) == (1, -1, 1, None)


def test_loss_mode_trains_heads_and_nothing_that_draws_or_counts():
    net = Net(2).eval()
    net.norm.train()
    with loss_mode(net):
        assert [net.training, net.neck.training] == [True, True]
        assert [net.norm.training, net.drop.training, net.neck.fine.training] == [False] * 3
    assert [net.training, net.norm.training, net.drop.training] == [False, True, False]
