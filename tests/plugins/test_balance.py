"""Gradient shares, and weights that are set by them: by hand, by RT-DETRv4's rule, in training, resumed, and what is refused."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from kdgraft import Distiller, DistillError, FactorTransfer, Hint, Peer, SoftTargets, Stop, TaskShare, WarmUp
from kdgraft.balance import AutoWeight, Gauge, gradient_norms, own_loss, remark
from kdgraft.fit import fit
from kdgraft.telling import share_rows, watch

X = torch.sin(torch.arange(40 * 3.0)).reshape(40, 3)
Y = (X.sum(1) > 0).long()


def line(slope: float, shift: float, factor: float) -> nn.Sequential:
    """factor · (slope · x + shift)."""
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1, bias=False))
    for parameter, value in zip(model.parameters(), (slope, shift, factor), strict=True):
        parameter.data.fill_(value)
    return model


POINTS = torch.tensor([[1.0], [3.0]])


def hinted(weight, **settings) -> Distiller:
    return Distiller(
        line(1, 0, 2), line(2, 1, 1), [Hint("0", adapter="none", weight=weight, **settings)], example=POINTS
    )


def test_the_share_by_hand():
    # Features 1 and 3, the teacher's 3 and 7: the mean of (f − t)² has the slopes (−4 − 24)/2 = −14 and (−4 − 8)/2 = −6.
    # Outputs 2 and 6: the mean of their squares has the slopes (8 + 72)/2 = 40, (8 + 24)/2 = 16, and 20 by the factor, which
    # the term does not reach. √(14² + 6²) / √(40² + 16²) = √(232 / 1856) = √(1/8).
    model = hinted({"type": "auto", "share": 0.5, "batches": 2})
    out = model(POINTS)
    assert out.losses["distill.hint.loss"] == 0
    total = out.total(out.student.square().mean())
    assert model.terms["hint"].weight == pytest.approx(0.5 * math.sqrt(8))
    assert out.losses["distill.hint.loss"].item() == pytest.approx(10 * 0.5 * math.sqrt(8))
    assert total.item() == pytest.approx(20 + 10 * 0.5 * math.sqrt(8))
    assert {name: round(value.item(), 5) for name, value in out.figures.items()} == {
        "distill.hint.weight": 1.41421,
        "distill.hint.raw": 10,
        "distill.hint.share": 0.5,
    }
    total.backward()
    own, hint = torch.tensor([40.0, 16.0]), torch.tensor([-14.0, -6.0]) * math.sqrt(2)
    slopes = torch.cat([p.grad.flatten() for p in model.student[0].parameters()])
    torch.testing.assert_close(slopes, own + hint)


def test_the_weight_is_share_over_the_mean_ratio_of_the_first_batches_and_then_stays():
    model = hinted({"type": "auto", "share": 0.5, "batches": 2})
    weights = []
    for factor in (1.0, 3.0, 0.1, 7.0):  # of the host's loss, so that the ratios are √(1/8) and a third of it
        out = model(POINTS)
        out.total(factor * out.student.square().mean())
        weights.append(model.terms["hint"].weight)
    ratio = math.sqrt(1 / 8)
    settled = 0.5 / (ratio * (1 + 1 / 3) / 2)
    assert weights == pytest.approx([0.5 / ratio, settled, settled, settled])
    assert not model.terms["hint"].balance.due


# RT-DETRs/RT-DETRv4@df4412261c6162f62aa4fb84e90b2df3c1b5f223:engine/solver/det_solver.py, the correction of an epoch from a
# weight of 5, rho 11 and delta 1: mean percentage of the encoder's gradient / 100 -> new weight.
AUTHORS = {0.04: 16.363636363636363, 0.16: 2.916666666666666, 0.115: 5.0, 0.002: 50.0, 0.93: 0.5}


@pytest.mark.parametrize("percentage", AUTHORS)
def test_the_correction_is_the_authors(percentage: float):
    # Their odds p / (1 − p) are shares here; the band from 10 % to 12 % is one from 1/9 to 3/22.
    low, high = 1 / 9, 3 / 22
    share = (low + high) / 2
    auto = AutoWeight(share=share, batches=1, every=1, band=(high - low) / 2 / share)
    auto.count(share / 5.0)
    assert auto.weight == pytest.approx(5.0)
    told = auto.count(percentage / (1 - percentage) / 5.0)
    assert auto.weight == pytest.approx(AUTHORS[percentage])
    assert (told is None) == (percentage == 0.115)


def test_the_last_batches_before_each_correction_are_measured():
    auto = AutoWeight(share=1.0, batches=2, every=5)
    due = []
    for _ in range(12):
        due.append(auto.due)
        auto.count(1.0 if auto.due else None)
    assert due == [True] * 2 + ([False] * 3 + [True] * 2) * 2
    assert auto.weight == 1.0


def test_batches_in_which_a_gradient_is_0_or_not_finite_do_not_count():
    auto = AutoWeight(share=1.0, batches=1)
    assert auto.count(None) is None and auto.weight is None and auto.due
    parameters = [nn.Parameter(torch.ones(2))]
    for factor, expected in ((0.0, None), (math.inf, None), (2.0, 2.0)):
        (norms,) = gradient_norms(parameters[0].sum(), {"term": (factor * parameters[0]).sum()}, parameters).values()
        assert norms.ratio == (None if expected is None else pytest.approx(expected))
    assert gradient_norms(parameters[0].sum(), {}, parameters) == {}


def test_a_term_that_learns_its_own_network_first_is_measured_when_it_teaches():
    student, teacher = (nn.Sequential(nn.Conv2d(3, c, 3), nn.Conv2d(c, 2, 1)) for c in (4, 6))
    images = torch.rand(2, 3, 6, 6)
    term = FactorTransfer("0", pretrain=2, weight=dict(type="auto", share=0.2, batches=1))
    model = Distiller(student, teacher, [term], example=images)
    weights = []
    for _ in range(3):
        out = model(images)
        out.total(out.student.square().mean()).backward()
        weights.append(model.terms["factor_transfer"].weight)
    assert weights[:2] == [1.0, 1.0] and weights[2] != 1.0
    assert out.figures["distill.factor_transfer.share"].item() == pytest.approx(0.2)


def test_a_schedule_multiplies_the_weight_and_an_inactive_term_is_not_measured():
    model = hinted({"type": "auto", "share": 0.5, "batches": 1}, schedule=WarmUp(2))
    found = []
    for _ in range(3):
        out = model(POINTS)
        out.total(out.student.square().mean())
        found.append(out.figures["distill.hint.weight"].item())
    assert found == pytest.approx([0, 0.5 * math.sqrt(2), math.sqrt(2)])


def test_a_share_of_the_hosts_loss_that_terms_leave_does_not_change_the_weight():
    weights = []
    for terms in ([], [TaskShare(0.25)]):
        term = Hint("0", adapter="none", weight=dict(type="auto", batches=1))
        model = Distiller(line(1, 0, 2), line(2, 1, 1), [term, *terms], example=POINTS)
        out = model(POINTS)
        out.total(out.student.square().mean())
        weights.append(term.weight)
    assert weights[0] == weights[1]


def net(width: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 2))


def fitted(folder: Path | None, stop: int | None = None, resume: bool = False):
    terms = [
        SoftTargets(2, weight=dict(type="auto", batches=7)),
        Hint("0", weight=dict(type="auto", batches=2, every=4)),
    ]
    model = Distiller(net(4, 0), net(8, 1), terms, example=X[:1])
    torch.manual_seed(5)
    loader = DataLoader(TensorDataset(X, Y), 8, shuffle=True)
    found = fit(model, loader, F.cross_entropy, epochs=4, lr=0.05, stop=stop, folder=folder, resume=resume)
    weights = {name: term.weight for name, term in model.terms.items()}
    return found.model.state_dict(), found.history, weights


def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "kdgraft")
    state, history, weights = fitted(None)
    said = [record.getMessage() for record in caplog.records]
    assert len([one for one in said if one.startswith("soft_targets: weight set to ")]) == 1
    assert [one for one in said if one.startswith("hint: weight ") and " → " in one]
    fitted(tmp_path, stop=1)  # after five of the seven batches to measure
    again, longer, others = fitted(tmp_path, resume=True)
    assert weights == others and history == longer
    assert all(torch.equal(again[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ("automatic", r'Hint: weight must be a number >= 0, "auto" or dict\(type="auto", share=…\), got \'automatic\''),
        (dict(share=0.1), "weight must be a number"),
        (None, "Hint: weight must be a number >= 0, got None"),
        (-1, "weight must be a number >= 0"),
        (dict(type="auto", shar=0.1), "Hint: weight='auto' takes no argument 'shar'; did you mean 'share'"),
        (dict(type="auto", share=0), "share must be a number > 0"),
        (dict(type="auto", share="1"), "share must be a number > 0"),
        (dict(type="auto", batches=0), "batches must be a whole number >= 1"),
        (dict(type="auto", every=5), "every must be a whole number >= 10"),
        (dict(type="auto", band=0.1), "band belongs to every"),
        (dict(type="auto", every=10, band=2), r"band must be in \[0, 1\]"),
    ],
)
def test_no_weight_is_refused_in_one_line(weight, message: str):
    with pytest.raises(DistillError, match=message) as caught:
        Hint("0", weight=weight)
    assert "\n" not in str(caught.value)


def test_what_has_nothing_to_compare_with_is_refused():
    auto = SoftTargets(2, weight="auto")
    with pytest.raises(
        DistillError, match="soft_targets: weight='auto' compares with the student's own loss, and 'teacher'"
    ):
        Distiller(net(4, 0), Peer(net(5, 1)), [auto], example=X[:1])
    with pytest.raises(DistillError, match="of which another term leaves nothing"):
        Distiller(net(4, 0), net(5, 1), [auto, TaskShare()], example=X[:1])
    first = [SoftTargets(2, weight="auto"), TaskShare(schedule=Stop(1, by="epoch"))]
    model = Distiller(net(4, 0), net(5, 1), first, example=X[:1])
    with pytest.raises(DistillError, match="which a batch without targets lacks"):
        fit(model, [(X, None)], F.cross_entropy, epochs=1)
    model = Distiller(net(4, 0), net(5, 1), [SoftTargets(2, weight="auto")], example=X[:1])
    model(X)
    with pytest.raises(DistillError, match=r"add up the losses of each step by out.total\(task_loss\)"):
        model(X)
    model = Distiller(net(4, 0), net(5, 1), [Hint("0", weight="auto")], example=X[:1])
    with pytest.raises(DistillError, match="no trained parameter of the student has both"):
        model(X).total(model.student[3].weight.sum())  # the host's loss does not reach the hinted layer


class Checkpointed(nn.Module):
    """A net whose layers are checkpointed."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.last, self.reentrant = nn.Linear(3, 4), nn.Linear(4, 2), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.last, self.first(x), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_measured_unless_they_are_reentrant(reentrant: bool):
    torch.manual_seed(0)
    model = Distiller(Checkpointed(reentrant), net(5, 1), [SoftTargets(2, weight="auto")], example=X[:1])
    out = model(X)
    if reentrant:
        with pytest.raises(DistillError, match="through reentrant checkpointing"):
            out.total(F.cross_entropy(out.student, Y))
    else:
        out.total(F.cross_entropy(out.student, Y)).backward()
        assert model.student.first.weight.grad is not None and model.terms["soft_targets"].weight != 1


def test_all_terms_can_be_measured_at_their_weights():
    terms = [
        Hint("0", adapter="none", weight=3.0),
        Hint("0", adapter="none", name="weak", weight=0.01, schedule=WarmUp(9)),
    ]
    model = Distiller(line(1, 0, 2), line(2, 1, 1), [*terms, TaskShare(0.5)], example=POINTS)
    watch(model)
    for _ in range(2):
        out = model(POINTS)
        out.total(out.student.square().mean())
    rows, remarks = share_rows(model)
    assert [tuple(row.values()) for row in rows] == [("hint", "3", "1.06"), ("weak", "0.01", "0.00354")]
    assert len(remarks) == 1 and remarks[0].startswith("weak: the norm of its gradient is 0.35 % of the host's own")
    assert isinstance(model.terms["weak"].balance, Gauge) and model.terms["weak"].weight == 0.01


def test_without_a_loss_of_the_hosts_own_terms_run_and_are_not_measured():
    model = hinted(3.0)
    watch(model)
    assert model(POINTS).settle(None)["distill.hint.loss"] == 3 * 10
    assert [tuple(row.values()) for row in share_rows(model)[0]] == [("hint", "3", "not measured")]
    model = hinted("auto")
    with pytest.raises(
        DistillError, match="hint: weight='auto' compares with the host's own loss, and this batch has none"
    ):
        model(POINTS).settle(None)


def test_remarks_are_on_less_than_a_hundredth_and_more_than_ten_times():
    assert [remark("term", share) is None for share in (0.0099, 0.01, 1.0, 10.0, 10.1)] == [
        False,
        True,
        True,
        True,
        False,
    ]
    assert "10.1 times that" in remark("term", 10.1)


def test_a_hosts_own_losses_are_those_with_loss_in_their_names():
    losses = {
        "loss_a": torch.tensor([1.0, 3.0]),
        "loss_b": [torch.tensor(1.0), torch.tensor(2.0)],
        "acc": torch.tensor(9.0),
    }
    assert own_loss(losses) == 5 and own_loss({"acc": torch.tensor(1.0)}) is None
