"""The training loop for plain PyTorch: what it computes, and that a run that was stopped and resumed is the one that was not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kdgraft import Distiller, DistillError, Hint, Itself, Peer, SoftTargets
from kdgraft.fit import STATE, fit

X = torch.sin(torch.arange(40 * 3.0)).reshape(40, 3)
Y = (X.sum(1) > 0).long()


def net(width: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 2))


def model(kind: str) -> nn.Module:
    student = net(4, 0)
    if kind == "plain":
        return student
    source = {"teacher": net(8, 1), "peer": Peer(net(5, 2)), "itself": Itself(0.9)}[kind]
    terms = [SoftTargets(2)] if kind == "itself" else [SoftTargets(2), Hint("0")]
    return Distiller(student, source, terms=terms, example=X[:1])


def loader() -> DataLoader:
    return DataLoader(TensorDataset(X, Y), 8, shuffle=True)


class Stopped(Exception):
    """The run was stopped."""


def stopping(after: int):
    """The task's loss, of a run that is stopped at some step."""
    steps = 0

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        nonlocal steps
        steps += 1
        if steps > after:
            raise Stopped
        return F.cross_entropy(output, targets)

    return loss


@pytest.mark.parametrize("kind", ["plain", "teacher", "peer", "itself"])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path: Path, kind: str):
    torch.manual_seed(7)
    whole = model(kind)
    torch.manual_seed(8)
    expected = fit(whole, loader(), F.cross_entropy, epochs=4, folder=tmp_path / "whole")
    torch.manual_seed(7)
    stopped = model(kind)
    torch.manual_seed(8)
    with pytest.raises(Stopped):
        fit(stopped, loader(), stopping(13), epochs=4, folder=tmp_path / "parts")
    torch.manual_seed(99)
    found = model(kind)
    resumed = fit(found, loader(), F.cross_entropy, epochs=4, folder=tmp_path / "parts", resume=True)
    assert resumed.epochs == expected.epochs == 4
    assert resumed.history == expected.history and len(resumed.history) == 4
    ours, theirs = found.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours if isinstance(ours[key], Tensor))
    if kind == "itself":
        states = [m.sources["teacher"].state() for m in (found, whole)]
        assert all(torch.equal(*(state["model"][key] for state in states)) for key in states[0]["model"])


def test_a_step_written_by_hand():
    distiller, plain, guide = model("teacher"), net(4, 0), net(8, 1).eval()
    plain[2].p = distiller.student[2].p = 0.0
    adapter = nn.Linear(4, 8)
    adapter.load_state_dict({k.rpartition(".")[2]: v for k, v in distiller.terms["hint"].state_dict().items()})
    parameters = [*plain.parameters(), *adapter.parameters()]
    theirs = torch.optim.SGD(parameters, 0.1)
    batches = [(X[:8], Y[:8]), (X[8:16], Y[8:16])]
    for x, y in batches:
        hidden = plain[0](x)
        logits = plain[3](F.relu(hidden))
        soft = F.kl_div((logits / 2).log_softmax(1), (guide(x) / 2).softmax(1), reduction="batchmean") * 4
        loss = F.cross_entropy(logits, y) + soft + F.mse_loss(adapter(hidden), guide[0](x))
        theirs.zero_grad()
        loss.backward()
        theirs.step()
    fit(distiller, batches, F.cross_entropy, epochs=1, optimizer=torch.optim.SGD(distiller.parameters(), 0.1))
    for ours, other in zip(distiller.student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, other)


@pytest.mark.parametrize("peers", [False, True])
def test_a_term_that_has_the_hard_loss_takes_it_from_the_host(peers: bool):
    student, other = (net(width, seed) for width, seed in ((4, 0), (8, 1)))
    plain, guide = net(4, 0), net(8, 1).train(peers)
    for model_ in (student, other, plain, guide):
        model_[2].p = 0.0
    source = Peer(other) if peers else other
    distiller = Distiller(student, source, terms=[SoftTargets(2, hard_weight=0.3)], example=X[:1])
    optimizer = torch.optim.SGD([*plain.parameters(), *(guide.parameters() if peers else ())], 0.1)
    ours, theirs = plain(X[:8]), guide(X[:8])
    pairs = [(ours, theirs), (theirs, ours)] if peers else [(ours, theirs)]
    for learns, teaches in pairs:
        soft = F.kl_div((learns / 2).log_softmax(1), (teaches.detach() / 2).softmax(1), reduction="batchmean") * 4
        (0.3 * F.cross_entropy(learns, Y[:8]) + 0.7 * soft).backward(retain_graph=True)
    optimizer.step()
    batches = [(X[:8], Y[:8])]
    fit(distiller, batches, F.cross_entropy, epochs=1, optimizer=torch.optim.SGD(distiller.parameters(), 0.1))
    trained = [(student, plain), (other, guide)] if peers else [(student, plain)]
    for mine, by_hand in trained:
        for found, expected in zip(mine.parameters(), by_hand.parameters(), strict=True):
            torch.testing.assert_close(found, expected)


def test_the_task_is_evaluated_in_eval_mode_after_each_epoch():
    modes: list[bool] = []
    found = fit(
        model("teacher"),
        loader(),
        F.cross_entropy,
        epochs=2,
        evaluate=lambda student: {"rows": modes.append(student.training) or len(student(X))},
    )
    assert modes == [False, False]
    assert [entry["rows"] for entry in found.history] == [40, 40]


def test_a_state_of_another_model_is_refused(tmp_path: Path):
    fit(model("plain"), loader(), F.cross_entropy, epochs=1, folder=tmp_path)
    with pytest.raises(DistillError, match=r"fit\.pt does not fit") as caught:
        fit(net(6, 0), loader(), F.cross_entropy, epochs=2, folder=tmp_path, resume=True)
    assert "\n" not in str(caught.value)
    torch.save({"model": {}}, tmp_path / STATE)
    with pytest.raises(DistillError, match="lacks optimizer, random, epochs, history"):
        fit(model("plain"), loader(), F.cross_entropy, epochs=2, folder=tmp_path, resume=True)


def test_without_a_state_a_resumed_run_starts():
    assert fit(model("plain"), loader(), F.cross_entropy, epochs=1, resume=True).epochs == 1
    with pytest.raises(DistillError, match="epochs must be a whole number >= 1, got 0"):
        fit(model("plain"), loader(), F.cross_entropy, epochs=0)
