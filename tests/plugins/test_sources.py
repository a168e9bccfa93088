"""Who teaches: several teachers, their mean, a peer that trains too, the student itself."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdgraft import (
    Distiller,
    DistillError,
    Ensemble,
    Hint,
    Itself,
    LogitMatching,
    Peer,
    SoftTargets,
    Teacher,
    Views,
    WiringError,
)
from kdgraft.sources import SOURCES, combined, gather_sources
from kdgraft.sources.ensemble import EnsembleRecording
from kdgraft.taps import Recording

X = torch.sin(torch.arange(6 * 3.0)).reshape(6, 3)
Y = torch.tensor([0, 1, 2, 3, 0, 1])


def net(width: int, seed: int, classes: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, classes))


def soft(student: Tensor, probabilities: Tensor) -> Tensor:
    return F.kl_div(student.log_softmax(1), probabilities, reduction="batchmean")


def losses(model: Distiller) -> dict[str, Tensor]:
    return model.train()(X).losses


# --- several teachers


def test_each_of_two_teachers_teaches_what_it_would_alone():
    a, b = net(8, 1), net(5, 2)
    model = Distiller(
        net(4, 0),
        teachers=dict(a=a, b=b),
        terms=[SoftTargets(2, source="a"), Hint("0", source="b"), SoftTargets(2, source="b", name="second")],
        example=X,
    )
    found = losses(model)
    for name, teacher, term in (
        ("soft_targets", a, SoftTargets(2)),
        ("hint", b, Hint("0")),
        ("second", b, SoftTargets(2, name="second")),
    ):
        alone = Distiller(net(4, 0), copy.deepcopy(teacher), terms=[term], example=X)
        alone.terms[name].load_state_dict(model.terms[name].state_dict())
        assert torch.equal(losses(alone)[f"distill.{name}.loss"], found[f"distill.{name}.loss"])


def test_taps_of_scores_change_sides_where_a_peer_learns_from_the_student():
    peer = nn.Sequential(net(6, 3), nn.Identity())
    term = SoftTargets(2, student_tap="3", teacher_tap="1")
    model = Distiller(net(4, 0), Peer(peer), terms=[term], example=X)
    assert [(row.student_tap, row.teacher_tap) for row in model.rows] == [("3", "1"), ("1", "3")]
    model.train()(X).loss.backward()
    assert peer[0][3].weight.grad.any()


def test_classes_in_other_orders_are_brought_into_the_students_order():
    order = torch.tensor([2, 0, 3, 1])
    guide = net(8, 1).eval()
    shuffled = copy.deepcopy(guide)
    with torch.no_grad():
        shuffled[3].weight.copy_(guide[3].weight[order.argsort()])
        shuffled[3].bias.copy_(guide[3].bias[order.argsort()])
    model = Distiller(
        net(4, 0),
        teachers=dict(plain=guide, other=shuffled),
        terms=[SoftTargets(1, source="plain"), SoftTargets(1, source="other", name="permuted")],
        example=X,
    )
    model.sources["other"].class_order = order.argsort().argsort()  # to the student's order
    with torch.no_grad():
        assert torch.allclose(shuffled(X)[:, model.sources["other"].class_order], guide(X))
    found = losses(model)
    torch.testing.assert_close(found["distill.permuted.loss"], found["distill.soft_targets.loss"])


# --- an ensemble


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_an_ensemble_teaches_the_mean_of_the_probabilities(mean: str):
    a, b = net(8, 1).eval(), net(5, 2).eval()
    model = Distiller(
        net(4, 0),
        teachers=dict(a=a, b=b, teacher=dict(type="Ensemble", members=["a", "b"], mean=mean, weights=[3, 1])),
        terms=[SoftTargets(1)],
        example=X,
    )
    with torch.no_grad():
        if mean == "arithmetic":
            expected = 0.75 * a(X).softmax(1) + 0.25 * b(X).softmax(1)
        else:
            product = a(X).softmax(1) ** 0.75 * b(X).softmax(1) ** 0.25
            expected = product / product.sum(1, keepdim=True)
    torch.testing.assert_close(losses(model)["distill.soft_targets.loss"], soft(net(4, 0).train()(X), expected))


def test_members_of_an_ensemble_have_their_own_view_and_order_of_classes():
    """One sees the images in another normalisation, the other at twice the size, with its classes in another order."""

    def vision(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

    student, a, b = (vision(seed) for seed in range(3))
    images = torch.rand(4, 1, 8, 8)
    views = Views(images, a=images * 3 - 1, b=F.interpolate(images, scale_factor=2))
    teachers = dict(a=a, b=Teacher(b, class_order=[2, 0, 1]), both=Ensemble(["a", "b"], weights=[1, 3]))
    model = Distiller(student, terms=[SoftTargets(source="both")], teachers=teachers, example=views)
    with torch.no_grad():
        target = a(views.of("a")).softmax(1) / 4 + b(views.of("b")).softmax(1)[:, [2, 0, 1]] * 3 / 4
    out = model.train()(views)
    torch.testing.assert_close(out.losses["distill.soft_targets.loss"], soft(out.student, target))
    with pytest.raises(DistillError, match="class_order must have each number from 0 to 2 once"):
        Teacher(b, class_order=[0, 1, 1])


def members(*values: Tensor, mean: str = "arithmetic") -> EnsembleRecording:
    recordings = []
    for value in values:
        recording = Recording("teacher", {}, set())
        recording.value = value  # type: ignore[attr-defined]
        recordings.append(recording)
    return EnsembleRecording("both", recordings, Ensemble([str(i) for i in range(len(values))], mean))  # type: ignore[arg-type]


def test_independent_classes_and_numbers_by_hand():
    a, b = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, -4.0]])
    read = lambda member: member.value  # noqa: E731
    arithmetic = combined(members(a, b), read, "sigmoid")
    torch.testing.assert_close(arithmetic.sigmoid(), (a.sigmoid() + b.sigmoid()) / 2)
    assert combined(members(a, b, mean="geometric"), read, "sigmoid").tolist() == [[0.5, -1.0]]
    assert combined(members(a, b), read, "value").tolist() == [[0.5, -1.0]]
    # Extreme logits: the mean of certainties is no NaN.
    extreme = combined(members(torch.tensor([1e4]), torch.tensor([-1e4])), read, "sigmoid")
    assert extreme.item() == 0
    along = combined(members(a[:, :, None], b[:, :, None]), read, "softmax", 1)
    torch.testing.assert_close(along.exp()[..., 0], (a.softmax(1) + b.softmax(1)) / 2)


def test_an_ensemble_of_the_same_teacher_is_that_teacher():
    guide = net(8, 1)
    model = Distiller(
        net(4, 0),
        teachers=dict(a=guide, b=copy.deepcopy(guide), teacher=Ensemble(["a", "b"])),
        terms=[SoftTargets(4), SoftTargets(4, source="a", name="alone")],
        example=X,
    )
    found = losses(model)
    torch.testing.assert_close(found["distill.soft_targets.loss"], found["distill.alone.loss"])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(members=["a"]), "two or more different sources"),
        (dict(members=["a", "a"]), "two or more different sources"),
        (dict(members=["a", "b"], mean="harmonic"), "mean must be 'arithmetic' or 'geometric'"),
        (dict(members=["a", "b"], weights=[1]), "2 members need as many weights, got 1"),
        (dict(members=["a", "b"], weights=[1, 0]), "a weight must be a number > 0"),
    ],
)
def test_what_an_ensemble_refuses(settings: dict, said: str):
    with pytest.raises(DistillError, match=said):
        Ensemble(**settings)


def test_members_of_an_ensemble_predict_alike():
    def build(*terms, b: nn.Module | None = None, of=("a", "b")):
        teachers = dict(a=net(8, 1), b=b or net(5, 2), teacher=Ensemble(list(of)))
        return Distiller(net(4, 0), teachers=teachers, terms=list(terms), example=X)

    with pytest.raises(WiringError, match="the members of an Ensemble must predict alike"):
        build(LogitMatching(), b=net(5, 2, classes=3))
    with pytest.raises(DistillError, match="'c' is not a source with its own model"):
        build(LogitMatching(), of=("a", "c"))


def test_features_of_an_ensemble_are_a_mean_of_losses():
    """Each member has an adapter, as its space is its own; the weights of the ensemble are those of the losses."""
    a, b = net(8, 1), net(5, 2)
    model = Distiller(
        net(4, 0),
        teachers=dict(a=a, b=b, both=Ensemble(["a", "b"], mean="geometric", weights=[3, 1])),
        terms=[Hint("0", source="both", weight=2.0), SoftTargets(source="both")],
        example=X,
    )
    out = model.train()(X)
    assert list(out.losses) == [f"distill.{name}.loss" for name in ("hint_from_a", "hint_from_b", "soft_targets")]
    expected = 0
    for name, teacher, weight in (("hint_from_a", a, 1.5), ("hint_from_b", b, 0.5)):
        (adapter,) = model.terms[name].adapters
        with torch.no_grad():
            by_hand = F.mse_loss(adapter(model.student[0](X), teacher[0](X)), teacher[0](X))
        torch.testing.assert_close(out.losses[f"distill.{name}.loss"].detach(), weight * by_hand)
        expected += weight * by_hand
    torch.testing.assert_close((out.loss - out.losses["distill.soft_targets.loss"]).detach(), expected)
    assert [row.adapter for row in model.rows[:2]] == ["LinearAdapter 4→8", "LinearAdapter 4→5"]


def test_an_ensemble_of_one_feature_space_twice_is_that_teacher():
    guide = net(8, 1)
    twice = dict(a=guide, b=copy.deepcopy(guide), both=Ensemble(["a", "b"]))
    both = Distiller(net(4, 0), teachers=twice, terms=[Hint("0", source="both")], example=X)
    alone = Distiller(net(4, 0), copy.deepcopy(guide), terms=[Hint("0")], example=X)
    for name in "ab":
        both.terms[f"hint_from_{name}"].load_state_dict(alone.terms["hint"].state_dict())
    torch.testing.assert_close(both.train()(X).loss, alone.train()(X).loss)


def test_a_term_on_features_takes_its_share_of_the_hosts_loss_once():
    class Sharing(Hint):
        host_share = 0.3

    def build(*terms) -> Distiller:
        teachers = dict(a=net(8, 1), b=net(5, 2), both=Ensemble(["a", "b"], weights=[3, 1]))
        return Distiller(net(4, 0), teachers=teachers, terms=list(terms), example=X).train()

    found = build(Sharing("0", source="both", name="first"), Sharing("0", source="both", name="second"))(X)
    assert found.host_share == pytest.approx(0.3 * 0.3)
    thirds = dict(a=net(8, 1), b=net(5, 2), c=net(6, 3), all=Ensemble(["a", "b", "c"]))
    Sharing.host_share = 0.0
    assert Distiller(net(4, 0), terms=[Sharing("0", source="all")], teachers=thirds, example=X)(X).host_share == 0
    Sharing.host_share = 0.3
    ramped = build(Sharing("0", source="both", schedule=dict(type="Ramp", end=10)))
    ramped.iteration = 5
    assert ramped(X).host_share == pytest.approx(1 - 0.7 / 2)


def test_a_term_is_not_called_as_the_part_of_another_one():
    teachers = dict(a=net(8, 1), b=net(5, 2), both=Ensemble(["a", "b"]))
    terms = [Hint("0", source="both"), Hint("0", source="a", name="hint_from_a")]
    with pytest.raises(DistillError, match="hint_from_a is one of the terms that hint becomes"):
        Distiller(net(4, 0), teachers=teachers, terms=terms, example=X)


# --- a peer


def test_peers_teach_each_other_and_each_is_a_plain_model():
    student, peer = net(4, 0), net(6, 3)
    plain, other = copy.deepcopy(student), copy.deepcopy(peer)
    model = Distiller(student, Peer(peer), terms=[SoftTargets(2, weight=0.5)], example=X)
    out = model.train()(X)
    loss = out.total(F.cross_entropy(out.student, Y)) + F.cross_entropy(out.peers["teacher"], Y)
    loss.backward()

    ours, theirs = plain.train()(X), other.train()(X)
    kl = [
        0.5 * 4 * F.kl_div((s / 2).log_softmax(1), (t.detach() / 2).softmax(1), reduction="batchmean")
        for s, t in ((ours, theirs), (theirs, ours))
    ]
    expected = F.cross_entropy(ours, Y) + F.cross_entropy(theirs, Y) + sum(kl)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    assert list(out.losses) == ["distill.soft_targets.loss", "distill.soft_targets_of_teacher.loss"]
    for mine, by_hand in ((student, plain), (peer, other)):
        assert mine.state_dict().keys() == by_hand.state_dict().keys()
        assert all(torch.equal(a, b) for a, b in zip(mine.buffers(), by_hand.buffers(), strict=True))
        for ours, theirs in zip(mine.parameters(), by_hand.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_features_of_peers_have_an_adapter_each_way():
    model = Distiller(net(4, 0), Peer(net(6, 3)), terms=[Hint("0")], example=X)
    shapes = {name: tuple(p.shape) for name, p in model.terms.named_parameters() if name.endswith("weight")}
    assert sorted(shapes.values()) == [(4, 6), (6, 4)]
    out = model.train()(X)
    out.loss.backward()
    assert all(model.student[0].weight.grad.flatten() != 0) or model.student[0].weight.grad.abs().sum() > 0
    assert model.sources["teacher"].model[0].weight.grad.abs().sum() > 0


def test_a_student_draws_what_it_would_without_a_peer():
    def student() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 4))

    torch.manual_seed(5)
    alone = [student().train()(X) for _ in range(1)]
    built = student()
    torch.manual_seed(9)
    peer = nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.5), nn.Linear(6, 4))
    model = Distiller(built, Peer(peer), terms=[SoftTargets(1)], example=X).train()
    torch.manual_seed(0), student()  # where the random stream stood
    out = model(X)
    assert torch.equal(out.student, alone[0])


# --- itself


def test_the_moving_average_follows_the_student():
    student = net(4, 0)
    model = Distiller(student, Itself(momentum=0.8), terms=[SoftTargets(1)], example=X)
    optimizer = torch.optim.SGD(student.parameters(), 0.5)
    average, states = None, []
    for _ in range(3):
        states.append(copy.deepcopy(student.state_dict()))
        with torch.no_grad():
            if average is None:
                average = copy.deepcopy(student).eval()
            for mean, own in zip(average.parameters(), student.parameters(), strict=True):
                mean.copy_(0.8 * mean + 0.2 * own)
            for mean, own in zip(average.buffers(), student.buffers(), strict=True):
                mean.copy_(own)
            expected_target = average(X).softmax(1)
        out = model.train()(X)
        torch.testing.assert_close(out.losses["distill.soft_targets.loss"], soft(out.student, expected_target))
        optimizer.zero_grad()
        out.total(F.cross_entropy(out.student, Y)).backward()
        optimizer.step()
    assert not any("copy" in name or "average" in name for name in model.state_dict())
    assert not any(p.requires_grad for p in model.sources["teacher"].model.parameters())
    assert torch.equal(states[0]["0.weight"], net(4, 0)[0].weight)


def test_its_own_recording_without_gradient():
    student = net(4, 0)
    model = Distiller(
        student,
        dict(type="Itself"),
        terms=[Hint(student_tap="0", teacher_tap="3", adapter="none")],
        example=X,
    )
    out = model.train()(X)
    hidden, logits = student[0](X), out.student
    torch.testing.assert_close(out.loss, F.mse_loss(hidden, logits.detach()))
    out.loss.backward()
    assert student[0].weight.grad.abs().sum() > 0
    assert student[3].weight.grad is None


@pytest.mark.parametrize("momentum", [1, 1.5, -0.1, "0.9"])
def test_what_itself_refuses(momentum: object):
    with pytest.raises(DistillError, match="momentum"):
        Itself(momentum)  # type: ignore[arg-type]


# --- state


@pytest.mark.parametrize("kind", ["peer", "itself"])
def test_live_state_holds_what_a_source_has_of_its_own(kind: str):
    def build() -> Distiller:
        source = Peer(net(6, 3)) if kind == "peer" else Itself(0.5)
        return Distiller(net(4, 0), source, terms=[SoftTargets(1)], example=X)

    model, other = build(), build()
    for _ in range(2):
        model.train()(X)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
    state = copy.deepcopy(model.live_state())
    other.load_live_state(state)
    ours, theirs = (m.sources["teacher"].model.state_dict() for m in (model, other))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    plain = Distiller(net(4, 0), net(6, 3), terms=[SoftTargets(1)], example=X)
    with pytest.raises(DistillError, match="teacher do not fit"):
        plain.load_live_state(state)


# --- what is given


def test_what_cannot_be_meant_is_refused():
    def build(terms=("SoftTargets",), **given):
        return Distiller(net(4, 0), terms=list(terms), example=X, **given)

    with pytest.raises(DistillError, match="give teacher=…, or several as teachers"):
        build(teacher=net(4, 1), teachers=dict(a=net(4, 1)))
    with pytest.raises(DistillError, match=r"soft_targets: there is no source 'teacher'; known: 'a'"):
        build(teachers=dict(a=net(4, 1)))
    with pytest.raises(DistillError, match=r"did you mean 'large'"):
        build(teachers=dict(large=net(4, 1)), terms=[SoftTargets(source="larg")])
    with pytest.raises(DistillError, match="no term uses 'b'"):
        build(teachers=dict(teacher=net(4, 1), b=net(4, 2)))
    for name in ("student", "my_loss", "a.b", ""):
        with pytest.raises(DistillError, match="a source's name must be"):
            build(teachers={name: net(4, 1)})
    with pytest.raises(DistillError, match=r"teachers\['a'\] must be a model or a Source, got int"):
        build(teachers=dict(a=3))
    with pytest.raises(DistillError, match="teachers must be a dict"):
        build(teachers=[net(4, 1)])
    with pytest.raises(DistillError, match="source must be the name of a source, got 3"):
        SoftTargets(source=3)  # type: ignore[arg-type]


def test_sources_are_named_and_open_to_others():
    assert {"Ensemble", "Itself"} <= set(SOURCES)

    class Doubled(Teacher):
        def __init__(self) -> None:
            super().__init__(net(8, 1))

    SOURCES.register(Doubled)
    try:
        found = gather_sources(dict(type="Doubled"), None, lambda name, given: None)  # type: ignore[arg-type,return-value]
        assert isinstance(found["teacher"], Doubled)
    finally:
        del SOURCES._own["Doubled"]
