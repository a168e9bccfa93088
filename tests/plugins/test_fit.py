"""The training loop for plain PyTorch: what it computes, and that a run that was stopped and resumed is the one that was not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kdgraft import Distiller, DistillError, DistillOutput, Hint, Itself, Peer, SoftTargets, Views
from kdgraft.fit import STATE, fit
from kdgraft.plain import Task
from kdgraft.plans import carry_out, read_plan

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


# --- modules around a student, and inputs that differ by model


class Doubled(nn.Module):
    """A module around a student that is no distiller: it adds a peer of its own, and a loss."""

    def __init__(self, student: nn.Module, peer: nn.Module) -> None:
        super().__init__()
        self.student, self.peer = student, peer
        self.epoch, self.epochs = 0, []

    def forward(self, x: Tensor, targets: Tensor) -> DistillOutput:
        self.epochs.append(self.epoch)
        output, other = self.student(x), self.peer(x)
        losses = {"distill.norm.loss": 0.1 * output.square().mean(), "distill.norm.weight": torch.tensor(0.1)}
        return DistillOutput(output, losses, {"peer": other}, host_share=0.75, peer_shares={"peer": 0.5})


def test_any_module_around_a_student_is_trained_on_the_losses_that_it_returns():
    def models() -> list[nn.Module]:
        found = [net(4, 0), net(5, 2)]
        for one in found:
            one[2].p = 0.0
        return found

    student, peer = models()
    optimizer = torch.optim.SGD([*student.parameters(), *peer.parameters()], 0.1)
    for start in (0, 8, 0, 8):
        x, y = X[start : start + 8], Y[start : start + 8]
        output = student(x)
        loss = 0.75 * F.cross_entropy(output, y) + 0.1 * output.square().mean() + 0.5 * F.cross_entropy(peer(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    whole = Doubled(*models())
    batches = [(X[:8], Y[:8]), (X[8:16], Y[8:16])]
    found = fit(whole, batches, F.cross_entropy, epochs=2, optimizer=torch.optim.SGD, lr=0.1)
    assert found.model is whole.student and whole.epochs == [0, 0, 1, 1]
    for ours, theirs in ((whole.student, student), (whole.peer, peer)):
        for mine, by_hand in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, by_hand)


def test_each_model_sees_its_own_view():
    student, teacher = net(4, 0), net(8, 1)
    student[2].p = 0.0
    distiller = Distiller(student, teacher, [SoftTargets()], example=Views(X[:1], teacher=X[1:2]))
    x, other = X[:8], X[8:16]
    logits, guide = student(x), teacher(other)
    expected = F.kl_div(logits.log_softmax(1), guide.softmax(1), reduction="batchmean")
    out = distiller(Views(x, teacher=other))
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.student, logits)
    torch.testing.assert_close(distiller(Views(x)).loss, distiller(x).loss)
    assert torch.equal(distiller.eval()(Views(x, teacher=other)).student, logits)


def test_views_of_several_arguments_and_of_a_peer():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor:
            return self.head(a if b is None else a + b)

    distiller = Distiller(Sum(), Peer(Sum()), [SoftTargets()], example=Views((X[:1], X[:1]), teacher={"a": X[:1]}))
    out = distiller(Views((X[:8], X[8:16]), teacher={"a": X[:8], "b": X[16:24]}))
    torch.testing.assert_close(out.student, distiller.student.head(X[:8] + X[8:16]))
    torch.testing.assert_close(out.peers["teacher"], distiller.teacher.model.head(X[:8] + X[16:24]))


def test_features_of_a_teacher_at_a_higher_resolution_are_resized():
    def convolutions(width: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 2)
        )

    images = torch.sin(torch.arange(4 * 3 * 8 * 8.0)).reshape(4, 3, 8, 8)
    views = Views(images, teacher=F.interpolate(images, (16, 16), mode="bilinear"))
    distiller = Distiller(convolutions(4), convolutions(6), [Hint("0"), SoftTargets()], example=views)
    (row, _) = distiller.rows
    assert (row.student_shape, row.teacher_shape) == ("4×4×8×8", "4×6×16×16")
    out = distiller(views)
    out.loss.backward()
    assert out.losses["distill.hint.loss"] > 0 and distiller.student[0].weight.grad.abs().max() > 0


def test_a_view_of_no_source_is_refused():
    distiller = model("teacher")
    with pytest.raises(
        DistillError, match="Views: 'teachher' is not a source with a model of its own; did you mean 'teacher'"
    ):
        distiller(Views(X[:8], teachher=X[:8]))
    with pytest.raises(DistillError, match="'teacher' is not a source with a model of its own"):
        Distiller(net(4, 0), Itself(), [Hint("0")], example=Views(X[:1], teacher=X[:1]))


@pytest.mark.parametrize("kind", ["plain", "teacher"])
def test_views_are_made_of_each_batch(kind: str):
    seen: list[tuple[Tensor, Tensor]] = []

    def views(inputs: Tensor, targets: Tensor) -> tuple[Views, Tensor]:
        seen.append((inputs, targets))
        return Views(-inputs, teacher=inputs), 1 - targets

    batches = [(X[:8], Y[:8]), (X[8:16], Y[8:16])]
    torch.manual_seed(0)
    by_views = fit(model(kind), batches, F.cross_entropy, epochs=1, views=views).model
    assert len(seen) == 2 and torch.equal(seen[1][0], X[8:16]) and torch.equal(seen[1][1], Y[8:16])
    turned = [(Views(-x, teacher=x) if kind == "teacher" else -x, 1 - y) for x, y in batches]
    torch.manual_seed(0)
    by_hand = fit(model(kind), turned, F.cross_entropy, epochs=1).model
    for ours, theirs in zip(by_views.parameters(), by_hand.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_task_hands_its_settings_on_and_refuses_others():
    task = Task(net(4, 0), loader(), F.cross_entropy, 1, settings=dict(clip=1.0, schedule="cosine"))
    assert task.settings["clip"] == 1
    for name, said in (
        ("clp", "did you mean 'clip'"),
        ("epochs", "takes no 'epochs'"),
        ("resume", "takes no 'resume'"),
    ):
        with pytest.raises(DistillError, match=said):
            Task(net(4, 0), loader(), F.cross_entropy, 1, settings={name: 1})


def test_unlabelled_batches_are_for_terms_alone():
    student, teacher = net(4, 0), net(8, 1)
    alone = Distiller(student, teacher, [SoftTargets(hard_weight=0)], example=X[:1])
    found = fit(alone, [(X[:8], None)], F.cross_entropy, epochs=1)
    assert found.history[0]["loss"] > 0
    beside = Distiller(net(4, 0), teacher, [SoftTargets(hard_weight=0.1)], example=X[:1])
    with pytest.raises(DistillError, match="a batch without targets"):
        fit(beside, [(X[:8], None)], F.cross_entropy, epochs=1)


TASKS = """
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kdgraft import Views
from kdgraft.plain import Task
from kdgraft.plans import carry_out, read_plan

X = torch.sin(torch.arange(40 * 3.0)).reshape(40, 3)
Y = (X.sum(1) > 0).long()


class Wide(nn.Linear):
    def forward(self, x):
        assert x.shape[1] == 6  # the teacher's view alone is of this width
        return super().forward(x)


def teacher():
    return Task(Wide(6, 2), [(torch.cat([X, X], 1), Y)], F.cross_entropy, 1)


def student():
    def views(x, y):
        return Views(x, teacher=torch.cat([x, -x], 1)), y

    accuracies = iter([0.1, 0.9, 0.2])
    settings = dict(views=views, clip=1.0, schedule="cosine", best="accuracy")
    return Task(
        nn.Linear(3, 2),
        DataLoader(TensorDataset(X, Y), 8),
        F.cross_entropy,
        3,
        torch.optim.SGD,
        lambda model: {"accuracy": next(accuracies)},
        {**settings, "lr": 0.1},
    )
"""


def test_a_plan_trains_a_task_with_its_settings(tmp_path: Path):
    (tmp_path / "tasks.py").write_text(TASKS)
    (tmp_path / "plan.toml").write_text(
        f'out = "{tmp_path}/out"\n[runs.teacher]\nconfig = "tasks.py:teacher"\n'
        '[runs.student]\nconfig = "tasks.py:student"\nteacher = "teacher"\nterms = ["SoftTargets"]\n'
    )
    found = carry_out(read_plan(tmp_path / "plan.toml"), tell=lambda line: None)
    assert found["student", 0].metrics["accuracy"] == 0.9  # of the best epoch, whose weights are kept
    state = torch.load(tmp_path / "out/student/seed0" / STATE, weights_only=True)
    weights = torch.load(found["student", 0].weights, weights_only=True)
    assert state["best"]["epoch"] == 1
    assert all(torch.equal(state["best"]["weights"][name], value) for name, value in weights.items())
    assert not torch.equal(state["model"]["student.weight"], weights["weight"])


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (X[:2], "got a Tensor"),
        ({"x": X, "y": Y}, "got a dict"),
        ((X, Y, Y), "got a tuple of 3"),
        (DataLoader(TensorDataset(X), 4), "got a list of 1"),
    ],
)
def test_a_batch_that_is_no_pair_is_refused(batch, said: str):
    with pytest.raises(DistillError, match=rf"must yield \(inputs, targets\), {said}"):
        fit(net(4, 0), batch if isinstance(batch, DataLoader) else [batch], F.cross_entropy, epochs=1)


def test_a_plan_of_models_that_take_a_dict(tmp_path: Path):
    (tmp_path / "tasks.py").write_text("""
import torch
import torch.nn.functional as F
from torch import nn
from kdgraft.plain import Task


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, given):
        return self.layer(given["x"] + given["more"][0])


def task():
    return Task(Net(), [({"x": torch.ones(4, 3), "more": [torch.ones(4, 1)]}, torch.arange(4) % 2)], F.cross_entropy, 1)
""")
    text = "[runs.a]\nconfig = 'tasks.py:task'\n[runs.b]\nconfig = 'tasks.py:task'\nteacher = 'a'\nterms = ['SoftTargets']\n"
    (tmp_path / "plan.toml").write_text(f"out = '{tmp_path}/out'\n{text}")
    carry_out(read_plan(tmp_path / "plan.toml"))
    assert (tmp_path / "out/b/seed0/student.pth").exists()
