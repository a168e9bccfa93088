"""Deep mutual learning of several students: each pair, the average of the others, what they share, resuming, names, refusals."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import golden
from kdgraft import (
    Distiller,
    DistillError,
    Ensemble,
    Hint,
    Peer,
    Peers,
    SampleEmbeddings,
    SoftTargets,
    WiringError,
)
from kdgraft.cli import main
from kdgraft.fit import fit
from kdgraft.telling import announced
from support.commands import refused
from support.tensors import Emit, assert_same

X = torch.sin(torch.arange(6 * 3.0)).reshape(6, 3)
Y = torch.tensor([0, 1, 2, 3, 0, 1])


def net(width: int, seed: int, classes: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, classes))


def three() -> list[nn.Sequential]:
    return [net(4, 0), net(6, 1), net(8, 2)]


def mutual(models: list[nn.Sequential], *terms, average: bool = False, **settings) -> Distiller:
    student, *others = models
    teachers = dict(peers=Peers(others, average=average))
    return Distiller(student, terms=list(terms), teachers=teachers, example=X, **settings).train()


def totals(model: Distiller, targets: Tensor = Y) -> list[Tensor]:
    """The loss of each student by itself: its own task's and the terms in which it listens."""
    out = model(X, targets=targets)
    names = ["student", *out.peers]
    outputs, shares = [out.student, *out.peers.values()], [out.host_share, *out.peer_shares.values()]
    own = [share * F.cross_entropy(output, targets) for share, output in zip(shares, outputs, strict=True)]
    heard = {name: [t.name for t in model.all_terms if t.listener == name] for name in names}
    return [
        loss + sum(out.losses[f"distill.{term}.loss"] for term in heard[name])
        for name, loss in zip(names, own, strict=True)
    ]


def kl(student: Tensor, probabilities: Tensor, temperature: float = 1.0) -> Tensor:
    return F.kl_div((student / temperature).log_softmax(1), probabilities.detach(), reduction="batchmean")


def same_gradients(ours: list[nn.Sequential], theirs: list[nn.Sequential]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        for mine, by_hand in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, by_hand.grad)


# --- what they learn


def test_three_students_as_in_a_public_implementation():
    third = golden.wave((5, 10), 0.3, 0.8, 2.0)
    models = [Emit(logits.float()) for logits in (*golden.logits(), third)]
    labels = torch.tensor([0, 3, 9, 1, 4])
    model = mutual(models, recipe=dict(type="dml", source="peers"))  # type: ignore[arg-type]
    found = torch.stack(totals(model, labels))
    torch.testing.assert_close(found, torch.tensor(golden.MUTUAL, dtype=torch.float32))


@pytest.mark.parametrize("average", [False, True])
def test_each_student_learns_from_all_others_by_hand(average: bool):
    ours, theirs = three(), copy.deepcopy(three())
    model = mutual(ours, SoftTargets(2, source="peers", weight=0.5), average=average)
    sum(totals(model)).backward()
    outputs = [one.train()(X) for one in theirs]
    for i, mine in enumerate(outputs):
        others = [output for j, output in enumerate(outputs) if j != i]
        if average:  # the mean of the probabilities at temperature 1, softened afterwards as any other prediction
            mean = sum(other.softmax(1) for other in others) / 2
            term = kl(mine, (mean.log() / 2).softmax(1), 2)
        else:
            term = sum(kl(mine, (other / 2).softmax(1), 2) for other in others) / 2
        (F.cross_entropy(mine, Y) + 0.5 * 4 * term).backward(retain_graph=True)
    same_gradients(ours, theirs)
    for mine, by_hand in zip(ours, theirs, strict=True):  # one pass each moved the running statistics once
        assert all(torch.equal(a, b) for a, b in zip(mine.buffers(), by_hand.buffers(), strict=True))


def test_the_average_of_opposite_students_by_hand():
    """(0.9, 0.1) and (0.1, 0.9) give (0.5, 0.5), of which a student with even odds has nothing to learn, unlike of each alone."""
    certain = torch.tensor([[0.9, 0.1]]).log()
    models = [Emit(torch.zeros(1, 2)), Emit(certain), Emit(certain.flip(1))]
    found = mutual(models, SoftTargets(source="peers"), average=True)(X)  # type: ignore[arg-type]
    assert found.losses["distill.soft_targets.loss"].abs() < 1e-6
    # The first peer hears (0.5, 0.5) and (0.1, 0.9), so (0.3, 0.7): 0.3 ln(0.3/0.9) + 0.7 ln(0.7/0.1) = 1.032553
    torch.testing.assert_close(found.losses["distill.soft_targets_of_peers_0.loss"].item(), 1.032553, rtol=1e-5, atol=0)
    pairwise = mutual(models, SoftTargets(source="peers"))(X)  # type: ignore[arg-type]
    # KL((0.9, 0.1) ‖ (0.5, 0.5)) = 0.9 ln 1.8 + 0.1 ln 0.2 = 0.368064, half of it from each
    for name in ("from_peers_0", "from_peers_1"):
        loss = pairwise.losses[f"distill.soft_targets_{name}.loss"].item()
        torch.testing.assert_close(loss, 0.368064 / 2, rtol=1e-5, atol=0)


def test_one_other_student_is_a_peer():
    terms = SoftTargets(2, source="peers"), Hint("0", source="peers")
    both = mutual([net(4, 0), net(6, 1)], *terms)
    alone = Distiller(net(4, 0), Peer(net(6, 1)), terms=[SoftTargets(2), Hint("0")], example=X).train()
    for mine, theirs in zip(both.all_terms, alone.all_terms, strict=True):
        mine.load_state_dict(theirs.state_dict())
    found, expected = both(X), alone(X)
    assert torch.equal(torch.stack(list(found.losses.values())), torch.stack(list(expected.losses.values())))


def test_names_say_who_learns_from_whom():
    model = mutual(three(), SoftTargets(source="peers"))
    assert list(model.terms) == [
        "soft_targets_from_peers_0",
        "soft_targets_from_peers_1",
        "soft_targets_of_peers_0_from_student",
        "soft_targets_of_peers_0_from_peers_1",
        "soft_targets_of_peers_1_from_student",
        "soft_targets_of_peers_1_from_peers_0",
    ]
    assert [term.weight for term in model.all_terms] == [0.5] * 6
    told = announced(model, model.student)
    assert "peers_0: Sequential, peers_1: Sequential into" in told
    average = mutual(three(), SoftTargets(source="peers"), average=True)
    assert list(average.terms) == ["soft_targets", "soft_targets_of_peers_0", "soft_targets_of_peers_1"]
    assert "peers_heard_by_peers_0: the mean of student and peers_1" in announced(average, average.student)


def test_features_of_every_pair_have_an_adapter():
    model = mutual(three(), Hint("0", source="peers"))
    assert {row.term: row.adapter for row in model.rows} == {
        "hint_from_peers_0": "LinearAdapter 4→6",
        "hint_from_peers_1": "LinearAdapter 4→8",
        "hint_of_peers_0_from_student": "LinearAdapter 6→4",
        "hint_of_peers_0_from_peers_1": "LinearAdapter 6→8",
        "hint_of_peers_1_from_student": "LinearAdapter 8→4",
        "hint_of_peers_1_from_peers_0": "LinearAdapter 8→6",
    }
    sum(totals(model)).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_taps_and_pools_go_with_the_student_and_with_the_peers():
    class Deep(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.inner = net(6, seed)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    pools = dict(student_pool="first", teacher_pool="last")
    for term in (
        SoftTargets(student_tap="3", teacher_tap="inner.3", source="peers"),
        Hint(student_tap="0", teacher_tap="inner.0", source="peers"),
        SampleEmbeddings(student_tap="0", teacher_tap="inner.0", source="peers", **pools),
    ):
        model = Distiller(net(6, 0), terms=[term], teachers=dict(peers=Peers([Deep(1), Deep(2)])), example=X)
        assert len(model.rows) == 6
        for row, made in zip(model.rows, model.all_terms, strict=True):
            taps = ["inner." if name != "student" else "" for name in (made.listener, made.source)]
            assert [row.student_tap[:-1], row.teacher_tap[:-1]] == taps
            if isinstance(made, SampleEmbeddings):
                assert list(made.both_pools.values()) == ["last" if tap else "first" for tap in taps]


@pytest.mark.parametrize("average", [False, True])
def test_each_takes_its_share_of_its_own_loss_once(average: bool):
    ours, theirs = three(), copy.deepcopy(three())
    model = mutual(ours, SoftTargets(source="peers", hard_weight=0.3), average=average)
    sum(totals(model)).backward()
    outputs = [one.train()(X) for one in theirs]
    for i, mine in enumerate(outputs):
        others = [output.softmax(1) for j, output in enumerate(outputs) if j != i]
        term = kl(mine, sum(others) / 2) if average else sum(kl(mine, other) for other in others) / 2
        (0.3 * F.cross_entropy(mine, Y) + 0.7 * term).backward(retain_graph=True)
    same_gradients(ours, theirs)


def test_a_single_peer_of_several_can_be_heard_as_any_source():
    student, a, b = three()
    sources = dict(peers=Peers([a, b]), guide=net(5, 3), mixed=Ensemble(["peers_0", "guide"]))
    terms = [SoftTargets(source="peers"), Hint("0", source="peers_1"), SoftTargets(source="mixed", name="mean")]
    model = Distiller(student, terms=terms, teachers=sources, example=X).train()
    assert list(model.terms)[-3:] == ["hint", "hint_of_peers_1", "mean"]
    model(X).loss.backward()
    assert not any(p.requires_grad for p in model.sources["guide"].model.parameters())


# --- training


@pytest.mark.parametrize("average", [False, True])
def test_peers_resume_bit_for_bit_and_stay_plain(tmp_path: Path, average: bool):
    def data() -> DataLoader:
        torch.manual_seed(5)
        return DataLoader(TensorDataset(X.repeat(4, 1), Y.repeat(4)), 6, shuffle=True)

    def build() -> Distiller:
        return mutual(three(), SoftTargets(source="peers"), average=average)

    whole, other = build(), build()
    torch.manual_seed(6)
    fit(whole, data(), F.cross_entropy, epochs=3)
    torch.manual_seed(6)
    fit(build(), data(), F.cross_entropy, epochs=1, folder=tmp_path)
    fitted = fit(other, data(), F.cross_entropy, epochs=3, folder=tmp_path, resume=True)
    assert_same(*({k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)} for model in (other, whole)))
    moved = three()
    for (name, peer), first in zip(whole.peers.items(), moved[1:], strict=True):
        assert_same(whole.sources[name].state()["model"], peer.state_dict())
        assert list(peer.state_dict()) == list(
            first.state_dict()
        )  # a plain model, which torch.save(peer.state_dict()) exports
        assert not torch.equal(peer[3].weight, first[3].weight)
    assert list(fitted.model.state_dict()) == list(moved[0].state_dict())


def test_at_weight_0_each_trains_as_it_would_alone():
    ours, alone = three(), three()
    model = mutual(ours, SoftTargets(source="peers", weight=0))
    fit(model, [(X, Y)] * 3, F.cross_entropy, epochs=1, optimizer=torch.optim.SGD(model.parameters(), 0.1))
    for mine, plain in zip(ours, alone, strict=True):
        fit(plain, [(X, Y)] * 3, F.cross_entropy, epochs=1, optimizer=torch.optim.SGD(plain.parameters(), 0.1))
        assert_same(mine.state_dict(), plain.state_dict())


# --- what cannot be meant


def test_what_peers_refuse():
    a, b = net(6, 1), net(8, 2)
    for said, settings in (
        ("a single student has no peers", dict(models=[])),
        ("models must be a list", dict(models=a)),
        ("the model must be an nn.Module, got int", dict(models=[a, 3])),
        ("leave average out", dict(models=[a], average=True)),
        ("average must be true or false", dict(models=[a, b], average="yes")),
    ):
        with pytest.raises(DistillError, match=said):
            Peers(**settings)

    def refused(said: str, models: list, *terms, kind: type[DistillError] = WiringError, **settings) -> None:
        with pytest.raises(kind, match=said) as caught:
            mutual(models, *terms, **settings)
        assert "\n" not in str(caught.value)

    soft, frozen = SoftTargets(source="peers"), net(6, 1).requires_grad_(False)
    refused("peers_1 and the peer 'peers_0' share parameters", [net(4, 0), a, a], soft)
    refused(
        "student and the peer 'peers_1' share parameters", [(one := net(4, 0)), a, one], SoftTargets(source="peers")
    )
    refused("'peers_0' is a peer, and all its parameters are frozen", [net(4, 0), frozen], SoftTargets(source="peers"))
    refused("hint does not compare predictions", [net(4, 0), a, b], Hint("0", source="peers"), average=True)
    apart = SoftTargets(student_tap="3", teacher_tap="", source="peers")
    refused("all models must be tapped alike", [net(4, 0), a, b], apart, average=True)
    refused("must agree", [net(4, 0), a, net(8, 2, classes=3)], SoftTargets(source="peers"))

    def build(teachers: dict, *terms) -> None:
        Distiller(net(4, 0), terms=list(terms), teachers=teachers, example=X)

    with pytest.raises(DistillError, match="'peers_0' is a part of the source 'peers'"):
        build(dict(peers=Peers([a]), peers_0=b), SoftTargets(source="peers"))
    with pytest.raises(DistillError, match="no term uses 'peers'"):
        build(dict(peers=Peers([a, b]), t=net(5, 4)), SoftTargets(source="t"))
    with pytest.raises(DistillError, match="Ensemble 'all': 'peers' is not a source with its own model"):
        build(dict(peers=Peers([a]), t=b, all=Ensemble(["peers", "t"])), SoftTargets(source="all"))


def test_peers_by_name():
    models = [net(6, 1), net(8, 2)]
    given = dict(peers=dict(type="Peers", models=models, average=True), one=dict(type="Peer", model=net(5, 3)))
    terms = [SoftTargets(source="peers"), SoftTargets(source="one", name="other")]
    model = Distiller(net(4, 0), terms=terms, teachers=given, example=X)
    assert list(model.peers) == ["peers_0", "peers_1", "one"]
    assert model.peers["peers_1"] is models[1]
    with pytest.raises(DistillError, match=r"teachers\['one'\], a Peer, must be given a model here"):
        Distiller(net(4, 0), terms=terms, teachers=dict(one=dict(type="Peer", model="net.pth")), example=X)


TASKS = """
import torch
import torch.nn.functional as F
from torch import nn
from kdgraft.plain import Task

X = torch.sin(torch.arange(64 * 4.0)).reshape(64, 4)
Y = (X.sum(1) > 0).long()


def task(width=4):
    model = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))
    return Task(model, [(X[:32], Y[:32]), (X[32:], Y[32:])], F.cross_entropy, epochs=2)
"""


def test_peers_in_a_plan_are_saved_as_plain_as_the_student(tmp_path: Path, capsys):
    (tmp_path / "tasks.py").write_text(TASKS)
    config = f"{tmp_path}/tasks.py:task"
    plan = f"""out = "{tmp_path}/out"
[runs.student]
config = "{config}"
terms = [{{ type = "SoftTargets", source = "peers" }}, {{ type = "SoftTargets", source = "one" }}]
[runs.student.teachers]
one = {{ type = "Peer", config = "{config}" }}
peers = {{ type = "Peers", average = true, models = [
    {{ config = "{config}", options = {{ width = 6 }} }}, {{ config = "{config}" }},
] }}
"""
    (tmp_path / "plan.toml").write_text(plan)
    assert main(["plan", str(tmp_path / "plan.toml")]) == 0
    folder = tmp_path / "out/student/seed0"
    for name, width in (("student", 4), ("peer_peers_0", 6), ("peer_peers_1", 4), ("peer_one", 4)):
        state = torch.load(folder / f"{name}.pth", weights_only=True)
        nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2)).load_state_dict(state)
    (tmp_path / "plan.toml").write_text(plan.replace("options = {", "option = {").replace("/out", "/new"))
    line = refused(capsys, ["plan", str(tmp_path / "plan.toml")])
    assert "teachers['peers'], peer 0 of 2, takes no argument 'option'; did you mean 'options'" in line


def test_each_peer_draws_random_numbers_of_its_own_in_each_step_and_in_each_part_of_one():
    drawn: dict[str, list[list[int]]] = {"a": [], "b": []}

    class Noise(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, x: Tensor) -> Tensor:
            kept = F.dropout(torch.ones_like(x), 0.5, self.training)
            if self.training:
                drawn[self.name].append(kept.flatten().tolist())
            return x * kept

    # A student that draws nothing leaves the random state as it is from one step to the next.
    models = [nn.Linear(3, 4), *(nn.Sequential(net(6, seed), Noise(name)) for seed, name in enumerate("ab"))]
    distiller = mutual(models, SoftTargets(source="peers"), average=True)
    distiller(X)
    for last in (False, True):
        with distiller.part(0.5, last=last):
            distiller(X)
    masks = [tuple(mask) for one in drawn.values() for mask in one]
    assert len(masks) == 6 and len({*masks}) == 6


def test_peers_that_start_alike_are_told_of(caplog):
    mutual(three(), SoftTargets(source="peers"))
    assert not caplog.records
    mutual([net(4, 0), net(6, 1), net(6, 1)], SoftTargets(source="peers"))
    (line,) = caplog.messages
    assert line.startswith("the peer peers_0 and the peer peers_1 start with equal weights"), line
    caplog.clear()
    mutual([net(4, 0), net(4, 0)], SoftTargets(source="peers"))
    (line,) = caplog.messages
    assert line.startswith("student and the peer peers_0 start with equal weights"), line
