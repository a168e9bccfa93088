"""A share of the host's own loss: stages on features first, and training on the teacher's predictions alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdgraft import Distiller, DistillError, Hint, Peer, SoftTargets, Stop, TaskShare, Term
from kdgraft.fit import fit

X = torch.sin(torch.arange(8 * 3.0)).reshape(8, 3)
Y = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])


def net(width: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 4))


def staged(*terms: Term) -> Distiller:
    return Distiller(net(4, 0), net(8, 1), [Hint("0"), *terms], example=X)


def trained(epochs: int, *terms: Term) -> nn.Sequential:
    model = staged(*terms)
    torch.manual_seed(2)
    fit(model, [(X, Y)] * 3, F.cross_entropy, epochs=epochs, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    return model.student


def test_the_first_stage_trains_the_guided_layers_and_no_others():
    before, after = net(4, 0), trained(2, TaskShare(schedule=Stop(2, by="epoch")))
    assert not torch.equal(before[0].weight, after[0].weight)
    assert torch.equal(before[2].weight, after[2].weight) and torch.equal(before[2].bias, after[2].bias)


def test_the_second_stage_begins_with_the_task():
    stage = TaskShare(schedule=Stop(2, by="epoch"))
    hint = dict(type="Hint", tap="0", schedule=dict(type="Stop", end=2, by="epoch"))
    model = Distiller(net(4, 0), net(8, 1), [hint, stage], example=X)
    fit(model, [(X, Y)], F.cross_entropy, epochs=2, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    own = net(4, 0)
    own.load_state_dict(model.student.state_dict())
    F.cross_entropy(own(X), Y).backward()
    model.epoch = 2
    model.zero_grad()
    out = model(X)
    out.total(F.cross_entropy(out.student, Y)).backward()
    for p, q in zip(model.student.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_no_share_is_left_of_a_loss_that_is_not_finite():
    """The mean over no labels is NaN: data without labels."""
    model = Distiller(net(4, 0), net(8, 1), [SoftTargets(2), TaskShare()], example=X)
    out = model(X)
    loss = F.cross_entropy(out.student, torch.full_like(Y, -100))
    assert loss.isnan()
    total = out.total(loss)
    assert torch.equal(total, out.loss)
    total.backward()
    alone = Distiller(net(4, 0), net(8, 1), [SoftTargets(2)], example=X)
    alone(X).loss.backward()
    for p, q in zip(model.student.parameters(), alone.student.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_shares_multiply_and_return_with_the_schedule():
    ramp = dict(type="Ramp", end=10, start=1.0, final=0.0)
    model = staged(TaskShare(0.5), TaskShare(0.2, schedule=ramp, name="early"))
    for step, share in ((0, 0.5 * 0.2), (5, 0.5 * (1 - 0.8 * 0.5)), (10, 0.5)):
        model.iteration = step
        assert model(X).host_share == pytest.approx(share)


def test_it_is_logged_without_a_loss_and_shown_in_the_wiring():
    model = staged(TaskShare(0.1, schedule=Stop(1)))
    out = model(X)
    assert list(out.losses) == ["distill.hint.loss"]
    assert out.figures["distill.task_share.weight"] == 1
    row = model.rows[-1]
    assert (row.term, row.student_tap, row.student_shape, row.adapter, row.teacher_tap) == (
        "task_share",
        "own loss",
        "× 0.1",
        "–",
        "–",
    )
    assert row.weight == "1 × Stop(end=1, by='iter')"
    assert model(X).figures["distill.task_share.weight"] == 0


def test_alone_it_uses_no_source():
    with pytest.raises(DistillError, match="no term uses 'teacher'"):
        Distiller(net(4, 0), net(8, 1), [TaskShare()], example=X)


def test_peers_are_left_the_same_share():
    terms = [SoftTargets(1, source="peer"), TaskShare(0.25)]
    model = Distiller(
        net(4, 0), teachers=dict(teacher=net(8, 1), peer=Peer(net(6, 2))), terms=[*terms, Hint("0")], example=X
    )
    out = model(X)
    assert (out.host_share, out.peer_shares) == (0.25, {"peer": 0.25})
    assert [row.term for row in model.rows] == [
        "soft_targets",
        "soft_targets_of_peer",
        "task_share",
        "task_share_of_peer",
        "hint",
    ]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(share=1.0), "share=1 leaves the host's own loss as it is; remove the term"),
        (dict(share=1.5), r"share must be in \[0, 1\], got 1.5"),
        (dict(losses="loss_cls"), "losses must be a list of names"),
        (dict(losses=[]), "losses must be a list of names"),
        (dict(losses=["loss"]), "this host has one loss of its own; leave losses out"),
        (dict(weight=2.0), "takes no argument 'weight'"),
        (dict(source="teacher"), "takes no argument 'source'"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, object], said: str):
    with pytest.raises(DistillError, match=said) as caught:
        Distiller(net(4, 0), net(8, 1), ["SoftTargets", dict(type="TaskShare", **settings)], example=X)
    assert "\n" not in str(caught.value)
