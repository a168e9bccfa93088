"""Networks beside the student: trained by themselves over all processes as one, out of sight, and saved with their term."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdgraft import Distiller, DistillError, FeatureImitation
from kdgraft.auxiliary import Auxiliary
from kdgraft.losses.reduction import Ratio
from support.auxiliary_ranks import SAMPLES, STEPS, WHOLE, network, score, train
from support.processes import found_by_two


class Judged(FeatureImitation):
    """Imitation, and a critic that tells the two feature maps apart."""

    def wire(self, wiring: Any) -> None:
        super().wire(wiring)
        self.auxiliaries["critic"] = Auxiliary(
            nn.Linear(wiring.teacher_recording.tensors(self.teacher_taps[0])[0].shape[1], 1), lr=0.01
        )

    def forward(self, student: Any, teacher: Any, batch: Any) -> Ratio:
        critic, ((s, t, _),) = self.auxiliaries["critic"], self.aligned(student, teacher, batch)
        s, t = s.mean((2, 3)), t.mean((2, 3))
        with critic.learning(s.device.type):
            loss = (critic.network(s.detach()) + 1).square().sum() + (critic.network(t) - 1).square().sum()
            self.monitor = critic.step(loss, len(s), {"gap": loss})
        return Ratio(-critic.judge(s).sum(), torch.tensor(float(len(s))))


def judged() -> Distiller:
    """Student, teacher and one term with a critic."""
    torch.manual_seed(0)
    student, teacher = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(2)) for _ in range(2))
    example = torch.sin(torch.arange(3 * 25.0)).reshape(1, 3, 5, 5)
    student(example), teacher(example)
    return Distiller(student, teacher, [Judged("0", adapter="none", name="judged")], example=example)


def critic_of(model: Distiller) -> Auxiliary:
    return model.terms["judged"].auxiliaries["critic"]


def training_step(model: Distiller) -> Any:
    model.train()
    images = torch.sin(torch.arange(2 * 3 * 25.0)).reshape(2, 3, 5, 5)
    return model(images, targets=torch.tensor([0, 1]))


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# Its steps.


def test_a_step_is_that_of_adam_on_the_mean():
    found, twin = Auxiliary(network(), lr=0.02, betas=(0.5, 0.8), weight_decay=0.1), network()
    optimizer = torch.optim.Adam(twin.parameters(), 0.02, (0.5, 0.8), weight_decay=0.1)
    for step in range(STEPS):
        with found.learning("cpu"):
            loss = score(found.network, SAMPLES, step)
            figures = found.step(loss, len(SAMPLES), {"twice": 2 * loss})
        expected = score(twin, SAMPLES, step) / len(SAMPLES)
        torch.testing.assert_close(figures["twice"], 2 * expected.detach())
        assert not figures["twice"].requires_grad
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
    for ours, theirs in zip(found.network.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert not torch.equal(found.network[0].weight, network()[0].weight)
    assert found.skipped == 0


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes has after the same steps on unequal shares."""
    return found_by_two("auxiliary_ranks", tmp_path_factory.mktemp("ranks"))


def test_two_processes_are_one(ranks: list[dict[str, Any]]):
    whole = train(WHOLE)
    for found in ranks:  # the second started from other weights
        assert found["sound"]["network"].keys() == whole["network"].keys()
        for name, value in whole["network"].items():
            torch.testing.assert_close(found["sound"]["network"][name], value, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found["sound"]["figures"], whole["figures"])
    for name, value in ranks[0]["sound"]["network"].items():
        assert torch.equal(value, ranks[1]["sound"]["network"][name])


def test_what_is_not_finite_on_one_process_is_skipped_by_both(ranks: list[dict[str, Any]]):
    broken = [found["broken"] for found in ranks]
    assert [found["skipped"] for found in broken] == [1, 1]
    assert [figures is None for figures in broken[0]["figures"]] == [False, True, False]
    for name, value in broken[0]["network"].items():
        assert torch.equal(value, broken[1]["network"][name]) and value.isfinite().all()
    # As if the broken step had never been.
    for name, value in train(WHOLE, leave_out=1)["network"].items():
        torch.testing.assert_close(broken[0]["network"][name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("factor", [float("inf"), float("nan"), 1e38])
def test_a_step_that_is_not_finite_is_skipped_and_counted(factor: float):
    found = Auxiliary(network())
    before = copy.deepcopy(found.network)
    with found.learning("cpu"):
        assert found.step(score(found.network, SAMPLES, 0) * factor * 1e3, len(SAMPLES), {"x": torch.ones(())}) == {}
    assert found.skipped == 1 and same(found.network, before) and not found.optimizer.state
    assert all(p.grad is None for p in found.network.parameters())


def test_no_sample_anywhere_is_no_step_and_no_fault():
    found = Auxiliary(network())
    before = copy.deepcopy(found.network)
    with found.learning("cpu"):
        assert found.step(score(found.network, SAMPLES[:0], 0), 0, {"x": torch.ones(())}) == {}
    assert found.skipped == 0 and same(found.network, before)


def test_the_critic_computes_in_float32_under_autocast():
    found = Auxiliary(network())
    half = SAMPLES.bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        judged = found.judge(half)
        with found.learning("cpu"):
            learned = found.network(half.detach().float())
        assert F.linear(SAMPLES, SAMPLES).dtype == torch.bfloat16  # the autocast is on
    assert judged.dtype == learned.dtype == torch.float32
    torch.testing.assert_close(judged, found.network(half.float()))
    torch.testing.assert_close(learned, judged)


def test_what_it_judges_learns_and_the_critic_does_not():
    found = Auxiliary(nn.Sequential(*network(), nn.Dropout(0.5)))
    inputs = SAMPLES.clone().requires_grad_()
    value = found.judge(inputs)
    value.sum().backward()
    weights = network()
    expected = torch.autograd.grad(weights(inputs).sum(), inputs)[0]  # no dropout: it judges in eval mode
    torch.testing.assert_close(inputs.grad, expected)
    assert all(p.grad is None for p in found.network.parameters())


# Out of sight, and with its term.


def test_nothing_that_walks_the_student_meets_it():
    model = judged()
    network = critic_of(model).network
    hidden = {id(p) for p in network.parameters()}
    assert hidden and not hidden & {id(p) for p in model.parameters()}
    assert not any(module is network for module in model.modules())
    assert not any("critic" in key for key in (*model.state_dict(), *model.terms.state_dict()))


def test_it_learns_in_its_term_and_the_student_from_it():
    model = judged()
    before = copy.deepcopy(critic_of(model).network)
    out = training_step(model)
    # The student is judged by the critic that has just learned: -mean(w · s + b), with s the mean of its features.
    features = model.student[0](torch.sin(torch.arange(2 * 3 * 25.0)).reshape(2, 3, 5, 5)).mean((2, 3))
    torch.testing.assert_close(out.losses["distill.judged.loss"], -critic_of(model).network(features).mean())
    assert not same(before, critic_of(model).network)
    slope = torch.autograd.grad(out.losses["distill.judged.loss"], model.student[0].weight)[0]
    assert slope.abs().sum() > 0


def test_its_state_travels_with_the_term_and_goes_on_where_it_was(tmp_path: Path):
    model = judged()
    training_step(model)
    critic_of(model).skipped = 3
    state = model.live_state()
    torch.save(state, tmp_path / "state.pt")
    drawn = torch.rand(2, generator=critic_of(model).random.of_all_ranks())
    training_step(model)

    other = judged()
    other.load_live_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert critic_of(other).skipped == 3
    assert torch.equal(torch.rand(2, generator=critic_of(other).random.of_all_ranks()), drawn)
    training_step(other)  # with Adam's moments: the second step of one run
    assert same(critic_of(other).network, critic_of(model).network)
    anew = judged()
    anew.load_live_state(torch.load(tmp_path / "state.pt", weights_only=True))
    critic_of(anew).optimizer.state.clear()
    training_step(anew)
    assert not same(critic_of(anew).network, critic_of(model).network)


def test_a_state_of_another_network_is_refused():
    found = Auxiliary(network())
    with pytest.raises(DistillError, match="the checkpoint to resume holds another sequential"):
        found.load(Auxiliary(nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 1))).state())


def test_a_deep_copy_shares_it():
    model = judged()
    assert critic_of(copy.deepcopy(model)) is critic_of(model)


def test_it_moves_with_its_term():
    model = judged()
    training_step(model)
    moments = [state["exp_avg"] for state in critic_of(model).optimizer.state.values()]
    assert len(moments) == 2
    model.double()
    assert {p.dtype for p in critic_of(model).network.parameters()} == {torch.float64}
    found: list[Tensor] = [state["exp_avg"] for state in critic_of(model).optimizer.state.values()]
    assert all(
        torch.equal(new, old.double()) and new.dtype == torch.float64 for new, old in zip(found, moments, strict=True)
    )
    model.bfloat16()  # it learns in the precision that it has
    assert {p.dtype for p in critic_of(model).network.parameters()} == {torch.float64}
    model.to("meta")
    assert {p.device.type for p in critic_of(model).network.parameters()} == {"meta"}
    assert {state["exp_avg"].device.type for state in critic_of(model).optimizer.state.values()} == {"meta"}
