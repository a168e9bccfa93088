"""The plain-PyTorch distiller: what it computes, and that it leaves student, teacher and random state alone."""

from __future__ import annotations

import copy
import logging
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdgraft import (
    TERMS,
    Batch,
    Distiller,
    DistillError,
    DistillOutput,
    FeatureImitation,
    Hint,
    LogitMatching,
    SoftTargets,
    Teacher,
    WarmUp,
    WiringError,
)
from kdgraft.losses import Ratio
from kdgraft.terms import TapTerm
from support.tensors import draw


class Net(nn.Module):
    """Two layers with normalisation and dropout, then logits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.layer2 = nn.Sequential(nn.Conv2d(width, width, 3, stride=2, padding=1), nn.Dropout(0.3))
        self.head = nn.Linear(width, 5)
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.head(self.layer2(self.layer1(x)).mean((2, 3)))


def student() -> Net:
    torch.manual_seed(0)
    return Net(4)


def teacher() -> Net:
    torch.manual_seed(1)
    return Net(6)


X = torch.sin(torch.arange(4 * 3 * 8 * 8.0)).reshape(4, 3, 8, 8)
Y = torch.tensor([0, 3, 1, 4])
TERMS_OF_ALL_KINDS = (
    dict(type="SoftTargets", temperature=2, weight=0.5),
    dict(type="LogitMatching", weight=0.1),
    dict(type="Hint", tap="layer1.1"),
    dict(type="FeatureImitation", tap="layer2", schedule=dict(type="WarmUp", end=2)),
)


def distiller(*terms: object, model: nn.Module | None = None) -> Distiller:
    return Distiller(model or student(), teacher(), terms=list(terms), example=X[:1])


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def train(model: nn.Module, steps: int, forward) -> list[Tensor]:
    """A few steps of SGD with momentum; the losses."""
    torch.manual_seed(7)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = forward()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def step(model: Distiller) -> Tensor:
    out = model(X)
    return F.cross_entropy(out.student, Y) + out.loss


# --- beside the student


def test_building_it_draws_nothing_from_the_random_state():
    drawn = []
    for terms in (None, (), TERMS_OF_ALL_KINDS):
        model, other = student(), teacher()
        torch.manual_seed(3), np.random.seed(3), random.seed(3)
        if terms is not None:
            Distiller(model, other, terms=list(terms), example=X[:1])
        drawn.append(draw())
    assert drawn[0] == drawn[1] == drawn[2]


def test_a_term_that_draws_when_it_is_made_takes_nothing_from_the_random_state(their_term: type):
    class Critic(their_term):
        def __init__(self, **settings: object) -> None:
            super().__init__("", **settings)
            self.critic, self.noise = nn.Linear(5, 1), np.random.rand()

    TERMS.register(Critic)
    drawn, seen = [], []
    try:
        for terms in ([], ["Critic"], ["Critic"]):
            model, other = student(), teacher()
            torch.manual_seed(3), np.random.seed(3), random.seed(3)
            built = Distiller(model, other, terms=terms, example=X[:1])
            drawn.append(draw())
            seen.append([p.detach().clone() for p in built.terms.parameters()])
    finally:
        del TERMS._own["Critic"]
    assert drawn[0] == drawn[1] == drawn[2]
    assert all(torch.equal(a, b) for a, b in zip(*seen[1:], strict=True))  # though the seed still decides


def test_building_it_leaves_the_student_as_it_was():
    model = student()
    model.layer1[1].eval()
    model.head.requires_grad_(False)
    before, flags = snapshot(model), [(m.training, [p.requires_grad for p in m.parameters()]) for m in model.modules()]
    distiller(*TERMS_OF_ALL_KINDS, model=model)
    assert same(snapshot(model), before)
    assert [(m.training, [p.requires_grad for p in m.parameters()]) for m in model.modules()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_failed_build_leaves_the_student_as_it_was():
    model = student()
    before = snapshot(model)
    with pytest.raises(WiringError, match=r"hint_2: the student has no module 'layer3'.*did you mean 'layer"):
        distiller(Hint("layer1"), Hint("layer3"), model=model)
    with pytest.raises(WiringError, match=r"adapter 'none' needs equal channels"):
        distiller(Hint("layer1", adapter="none"), model=model)
    assert same(snapshot(model), before)
    assert all(m.training for m in model.modules())


def test_the_student_saves_as_a_plain_student():
    model = distiller(*TERMS_OF_ALL_KINDS)
    train(model, 2, lambda: step(model))
    plain = Net(4)
    plain.load_state_dict(model.student.state_dict(), strict=True)
    assert model.student.state_dict().keys() == Net(4).state_dict().keys()


def test_the_teacher_is_in_no_state_dict_and_no_optimizer():
    model = distiller(Hint("layer1"))
    assert {name.split(".")[0] for name in model.state_dict()} == {"student", "terms", "_extra_state"}
    ours = {id(p) for p in model.parameters()}
    assert not any(id(p) in ours for p in model.teacher.model.parameters())


def test_the_student_cannot_be_its_own_teacher():
    model = student()
    with pytest.raises(WiringError, match=r"share parameters.*copy\.deepcopy"):
        Distiller(model, model, terms=[], example=X)
    assert all(p.requires_grad for p in model.parameters())


# --- what it computes


def test_no_terms_train_bit_for_bit_like_the_plain_student():
    plain, model = student(), distiller()
    expected = train(plain, 3, lambda: F.cross_entropy(plain(X), Y))
    found = train(model, 3, lambda: step(model))
    assert [a.item() for a in found] == [b.item() for b in expected]
    assert same(model.student.state_dict(), plain.state_dict())
    for ours, theirs in zip(model.student.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    assert model.teacher.model.passes == 1  # the dry run


def test_terms_at_weight_0_train_bit_for_bit_like_the_plain_student():
    plain = student()
    model = distiller(*(dict(spec, weight=0) for spec in TERMS_OF_ALL_KINDS))
    train(plain, 3, lambda: F.cross_entropy(plain(X), Y))
    train(model, 3, lambda: step(model))
    assert same(model.student.state_dict(), plain.state_dict())


def test_a_step_written_by_hand():
    model = distiller(
        SoftTargets(temperature=3, weight=0.5), LogitMatching(center=True, weight=0.1), Hint("layer1.1", weight=2)
    )
    plain, (weight, bias) = student(), [p.detach().clone().requires_grad_() for p in model.terms.parameters()]
    guide = teacher().eval()

    torch.manual_seed(11)
    out = model(X)
    loss = F.cross_entropy(out.student, Y) + out.loss
    loss.backward()

    torch.manual_seed(11)
    hidden = plain.layer1[1](plain.layer1[0](X))
    logits = plain.head(plain.layer2(F.relu(hidden)).mean((2, 3)))
    with torch.no_grad():
        guide_hidden, guide_logits = guide.layer1[1](guide.layer1[0](X)), guide(X)
    soft = F.kl_div((logits / 3).log_softmax(1), (guide_logits / 3).softmax(1), reduction="batchmean") * 9
    gap = logits - guide_logits
    matching = 0.5 * (gap - gap.mean(1, keepdim=True)).square().mean()
    feature = F.mse_loss(F.conv2d(hidden, weight, bias), guide_hidden)
    expected = F.cross_entropy(logits, Y) + 0.5 * soft + 0.1 * matching + 2 * feature
    expected.backward()

    torch.testing.assert_close(out.student, logits)
    assert out.losses.keys() == {"distill.soft_targets.loss", "distill.logit_matching.loss", "distill.hint.loss"}
    torch.testing.assert_close(out.losses["distill.hint.loss"], 2 * feature)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(model.student.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    for ours, theirs in zip(model.terms.parameters(), (weight, bias), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert same(model.student.state_dict(), plain.state_dict())  # the running statistics


def test_figures_are_each_losss_raw_value_and_weight_apart():
    ramp = dict(type="WarmUp", end=4)
    model = distiller(dict(type="SoftTargets", weight=0.5), dict(type="Hint", tap="layer1", weight=2, schedule=ramp))
    for step in range(3):
        out = model.train()(X)
        weights = {"soft_targets": 0.5, "hint": 2 * step / 4}
        for name, weight in weights.items():
            assert out.figures[f"distill.{name}.weight"].item() == weight
        assert ("distill.hint.raw" in out.figures) == (step > 0)  # at weight 0 it is not computed
        raw = {name: out.figures.get(f"distill.{name}.raw", torch.zeros(())) for name in weights}
        assert raw["soft_targets"] > 0 and not any(value.requires_grad for value in out.figures.values())
        for name, weight in weights.items():
            torch.testing.assert_close(out.losses[f"distill.{name}.loss"], raw[name] * weight)
        assert not any("loss" in key for key in out.figures)  # hosts add up whatever is called so


def test_gradients_in_double_precision():
    torch.manual_seed(0)
    mine, theirs = nn.Sequential(nn.Linear(3, 2), nn.Tanh()), nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model = Distiller(
        mine, theirs, terms=[Hint(student_tap="0", teacher_tap="1"), SoftTargets()], example=torch.zeros(1, 3)
    ).double()
    x = torch.sin(torch.arange(9.0, dtype=torch.float64)).reshape(3, 3)
    names, values = zip(*[(n, p.detach().requires_grad_()) for n, p in model.named_parameters()], strict=True)

    def loss(*parameters: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (x,)).loss

    assert torch.autograd.gradcheck(loss, values)


def test_eval_mode_runs_the_student_alone():
    model = distiller(*TERMS_OF_ALL_KINDS).eval()
    passes = model.teacher.model.passes
    out = model(X)
    assert isinstance(out, DistillOutput)
    assert torch.equal(out.student, model.student(X))
    assert out.losses == {}
    assert out.loss.item() == 0
    assert model.teacher.model.passes == passes
    assert model.iteration == 0


def test_loss_is_the_sum_of_the_losses_alone():
    out = DistillOutput(None, {k: torch.tensor(v) for k, v in (("a.loss", 1.0), ("a.dropped", 64.0), ("b.loss", 2.0))})
    assert out.loss.item() == 3


def test_arguments_of_the_models_may_be_a_tuple_or_a_dict():
    class Two(nn.Linear):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return super().forward(a - b)

    rows = torch.ones(2, 3)
    for example, args, kwargs in (
        ((rows, rows), (rows, rows), {}),
        ({"a": rows, "b": rows}, (), {"b": rows, "a": rows}),
    ):
        out = Distiller(Two(3, 2), Two(3, 2), terms=["SoftTargets"], example=example)(*args, **kwargs)
        assert out.student.shape == (2, 2)
        assert list(out.losses) == ["distill.soft_targets.loss"]


def test_targets_reach_the_terms_that_want_them():
    model = distiller(SoftTargets(hard_weight=1.0)).train()
    out = model(X, targets=Y)
    torch.testing.assert_close(out.total(F.cross_entropy(out.student, Y)), F.cross_entropy(out.student, Y))
    some = Y.masked_fill(Y[0] == Y, -100)
    for hard_weight, same in ((None, True), (0.5, False)):  # without a mix the teacher teaches what has no label, too
        found = [distiller(SoftTargets(4, hard_weight=hard_weight)).train()(X, targets=y).loss for y in (some, Y)]
        assert torch.equal(*found) is same


def test_under_autocast():
    model, single = distiller(*TERMS_OF_ALL_KINDS), distiller(*TERMS_OF_ALL_KINDS)
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(X)
    torch.manual_seed(5)
    exact = single(X).losses
    assert out.student.dtype is torch.bfloat16
    assert all(value.dtype is torch.float32 for value in out.losses.values())
    for name, value in out.losses.items():
        torch.testing.assert_close(value, exact[name], rtol=0.1, atol=0.02, msg=lambda m, n=name: f"{n}: {m}")
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.terms.parameters())


# --- the teacher


def test_the_teacher_never_changes():
    guide = teacher()
    before = snapshot(guide)
    model = Distiller(student(), guide, terms=list(TERMS_OF_ALL_KINDS), example=X[:1])
    start = snapshot(model.student)
    model.train()
    train(model, 4, lambda: step(model))
    assert same(snapshot(guide), before)
    assert not any(m.training for m in guide.modules())
    assert all(p.grad is None and not p.requires_grad for p in guide.parameters())
    assert not same(snapshot(model.student), start)


def test_a_teacher_that_someone_put_in_training_mode_is_put_back():
    model = distiller("SoftTargets")
    before = snapshot(model.teacher.model)
    model.teacher.model.train()
    model(X)
    assert not any(m.training for m in model.teacher.model.modules())
    assert same(snapshot(model.teacher.model), before)


def test_the_teacher_stops_after_the_last_tap():
    model = distiller(Hint("layer1"))
    ran = []
    model.teacher.model.head.register_forward_hook(lambda *_: ran.append(1))
    model(X)
    assert not ran


def test_a_ready_teacher_is_loaded_before_the_dry_run(tmp_path):
    torch.save({"state_dict": teacher().state_dict()}, tmp_path / "teacher.pth")
    model = Distiller(student(), Teacher(Net(6), tmp_path / "teacher.pth"), terms=["SoftTargets"], example=X[:1])
    assert same(model.teacher.model.state_dict(), teacher().state_dict())


def test_a_deep_copy_shares_the_teacher_and_nothing_else():
    model = distiller(Hint("layer1"))
    other = copy.deepcopy(model)
    assert other.teacher is model.teacher
    ours = {id(p) for p in model.parameters()}
    assert not any(id(p) in ours for p in other.parameters())
    torch.manual_seed(0)
    expected = model(X).loss
    torch.manual_seed(0)
    assert torch.equal(other(X).loss, expected)


def test_moving_it_moves_the_teacher():
    model = distiller(Hint("layer1"))
    single = model(X).loss
    model.double()
    assert {p.dtype for p in [*model.parameters(), *model.teacher.model.parameters()]} == {torch.float64}
    double = model(X.double()).loss
    assert double.dtype is torch.float64
    torch.testing.assert_close(double.float(), single)


# --- weights over training


def test_a_schedule_by_iteration():
    model = distiller(SoftTargets(schedule=[WarmUp(2), dict(type="Stop", end=4)]), SoftTargets(name="constant"))
    factors = []
    for _ in range(6):
        losses = model(X).losses
        factors.append((losses["distill.soft_targets.loss"] / losses["distill.constant.loss"]).item())
    assert factors == pytest.approx([0, 0.5, 1, 1, 0, 0])
    assert model.iteration == 6


def test_a_schedule_by_epoch():
    model = distiller(SoftTargets(schedule=dict(type="Stop", end=1, by="epoch")))
    assert model(X).loss > 0
    model.epoch = 1
    assert model(X).loss == 0


def test_at_weight_0_the_teacher_rests_and_parameters_stay_in_the_graph():
    model = distiller(Hint("layer1", schedule=dict(type="Stop", end=1)), Hint("layer2", weight=0))
    model(X).loss.backward()
    passes = model.teacher.model.passes
    model.zero_grad()
    loss = model(X).loss
    loss.backward()
    assert loss.item() == 0
    assert model.teacher.model.passes == passes
    for parameter in model.terms.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


def test_two_terms_of_one_name():
    model = distiller(Hint("layer1"), Hint("layer2"))
    assert list(model(X).losses) == ["distill.hint.loss", "distill.hint_2.loss"]
    assert {name.split(".")[1] for name, _ in model.named_parameters() if name.startswith("terms")} == {
        "hint",
        "hint_2",
    }


# --- terms that are not finite


def exploding(student: Tensor, teacher: Tensor, *, dim: int, reduction: str) -> Tensor:
    return (student - teacher).square().mean(dim) / 0


def test_a_term_that_is_not_finite_is_dropped_counted_and_reported(caplog: pytest.LogCaptureFixture):
    terms = [Hint("layer1"), FeatureImitation("layer2", loss=exploding, name="bad")]
    model, alone = distiller(*terms), distiller(Hint("layer1"))
    alone.terms.load_state_dict({k: v for k, v in model.terms.state_dict().items() if k.startswith("hint.")})
    with caplog.at_level(logging.WARNING, "kdgraft"):
        for number in range(1, 6):
            torch.manual_seed(5)
            out = model(X)
            assert out.losses["distill.bad.loss"].item() == 0
            assert out.losses["distill.bad.dropped"].item() == number
    out.loss.backward()
    for parameter in model.terms["bad"].parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))
    # Said at the 1st, 2nd and 4th time, not at each.
    assert [record.args for record in caplog.records] == [("bad", 1e30, 1), ("bad", 1e30, 2), ("bad", 1e30, 4)]
    assert model.dropped == {"hint": 0, "bad": 5}

    alone.student.load_state_dict(student().state_dict())
    torch.manual_seed(5)
    expected = alone(X)
    expected.loss.backward()
    assert torch.equal(out.losses["distill.hint.loss"], expected.loss)
    for ours, theirs in zip(model.student.parameters(), alone.student.parameters(), strict=True):
        assert ours.grad is None if theirs.grad is None else torch.equal(ours.grad, theirs.grad)


def test_a_loss_whose_gradient_float32_may_not_hold_is_dropped_too():
    def huge(student: Tensor, teacher: Tensor, *, dim: int, reduction: str) -> Tensor:
        return (student - teacher).square().mean(dim) * 1e33

    model = distiller(Hint("layer1"), FeatureImitation("layer2", loss=huge, name="huge"))
    out = model(X)
    out.loss.backward()
    assert model.dropped == {"hint": 0, "huge": 1} and out.losses["distill.huge.loss"].item() == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_adapter_that_is_not_finite_does_not_reach_the_student(value: float):
    model = distiller(SoftTargets(), Hint("layer1"))
    with torch.no_grad():
        model.terms["hint"].adapters[0].project.weight[0, 0] = value
    out = model(X)
    out.loss.backward()
    assert out.losses["distill.hint.loss"].item() == 0
    assert out.losses["distill.soft_targets.loss"].item() > 0
    assert all(p.grad.isfinite().all() for p in model.student.parameters())


def test_infinite_features_of_the_teacher():
    model = distiller(SoftTargets(), Hint("layer1"))
    model.teacher.model.layer1.register_forward_pre_hook(lambda module, inputs: (inputs[0] * torch.inf,))
    out = model(X)
    assert {name for name in out.losses if name.endswith("dropped")} == {
        "distill.soft_targets.dropped",
        "distill.hint.dropped",
    }
    assert out.loss.item() == 0


# --- saving and resuming


def test_state_dict_round_trip():
    model = distiller(*TERMS_OF_ALL_KINDS)
    train(model, 3, lambda: step(model))
    other = Distiller(Net(4), teacher(), terms=list(TERMS_OF_ALL_KINDS), example=X[:1])
    other.load_state_dict(model.state_dict(), strict=True)
    assert other.iteration == 3
    expected, found = (train(m, 2, lambda m=m: step(m)) for m in (model, other))
    assert [a.item() for a in found] == [b.item() for b in expected]
    assert other.iteration == model.iteration == 5
    assert same(dict(other.named_parameters()), dict(model.named_parameters()))
    assert same(dict(other.named_buffers()), dict(model.named_buffers()))


def test_live_state_round_trip():
    terms = (Hint("layer1"), FeatureImitation("layer2", loss=exploding, name="bad"))
    model = distiller(*terms)
    model(X)
    state = copy.deepcopy(model.live_state())
    other = distiller(Hint("layer1"), FeatureImitation("layer2", loss=exploding, name="bad"))
    with torch.no_grad():
        for parameter in other.terms.parameters():
            parameter.add_(1)
    other.load_live_state(state)
    assert same(other.terms.state_dict(), model.terms.state_dict())
    assert other.dropped == {"hint": 0, "bad": 1}
    assert not any(name.startswith("student") or "teacher" in name for name in state["terms"])


@pytest.mark.parametrize(
    ("terms", "key"),
    [
        (lambda: [Hint("layer1", name="other")], "hint.adapters.0.project.weight"),
        (lambda: [Hint("layer1"), Hint("layer2")], "hint_2.adapters.0.project.weight"),
        (lambda: [], "hint.adapters.0.project.weight"),
        (lambda: [Hint(student_tap="head", teacher_tap="head")], "hint.adapters.0.project.weight"),  # another shape
    ],
)
def test_live_state_of_other_terms_is_refused(terms, key: str):
    state = copy.deepcopy(distiller(Hint("layer1")).live_state())
    other = distiller(*terms())
    before = snapshot(other.terms)
    with pytest.raises(DistillError, match="made with other distillation terms") as error:
        other.load_live_state(state)
    assert key in str(error.value)
    assert same(snapshot(other.terms), before)


# --- open to others


@pytest.fixture
def their_term():
    class CosineOfLogits(TapTerm):
        """1 − cosine of the logits."""

        def forward(self, student, teacher, batch: Batch) -> Ratio:
            ((s, t, _, _),) = self.pairs(student, teacher)
            items = 1 - F.cosine_similarity(s, t, dim=1)
            return Ratio(items.sum(), items.new_tensor(float(len(items))))

    TERMS.register(CosineOfLogits)
    yield CosineOfLogits
    del TERMS._own["CosineOfLogits"]


def test_a_third_party_s_term(their_term: type):
    model = distiller(dict(type="CosineOfLogits", tap="", weight=3))
    out = model(X)
    with torch.no_grad():
        expected = 3 * (1 - F.cosine_similarity(out.student, model.teacher.model(X), dim=1)).mean()
    assert list(out.losses) == ["distill.cosine_of_logits.loss"]
    torch.testing.assert_close(out.loss, expected)


def test_dropout_in_place_does_not_touch_what_is_tapped_before_it():
    def model() -> nn.Sequential:
        return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.9, inplace=True), nn.Linear(8, 2))

    distilled = Distiller(model(), model(), terms=[Hint("0", adapter="none")], example=torch.ones(1, 3))
    rows = torch.sin(torch.arange(12.0)).reshape(4, 3)
    loss = distilled(rows).loss
    torch.testing.assert_close(loss, F.mse_loss(distilled.student[0](rows), distilled.teacher.model[0](rows)))


class Sampling(Net):
    """A teacher that draws random numbers at inference: of torch, numpy and ``random``."""

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand(5) + float(np.random.rand()) + random.random()
        self.drawn = [*getattr(self, "drawn", []), noise]
        return super().forward(x) + noise


def test_a_teacher_that_draws_leaves_the_students_draws_as_they_are():
    def drawn(distil: bool) -> list[Tensor]:
        model = student()
        frozen = Sampling(6)
        step = Distiller(model, frozen, terms=[SoftTargets(4)] if distil else [], example=X)
        frozen.drawn = []
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)
        found = [step(X).student for _ in range(2)]
        assert len(frozen.drawn) == 2 * distil
        if distil:
            assert not torch.equal(*frozen.drawn)
        return [*found, torch.rand(1), torch.tensor([np.random.rand(), random.random()])]

    for with_teacher, without in zip(drawn(True), drawn(False), strict=True):
        assert torch.equal(with_teacher, without)


def test_terms_without_an_example():
    with pytest.raises(DistillError, match=r"^terms need example=…"):
        Distiller(nn.Linear(2, 3), nn.Linear(2, 3), terms=["SoftTargets"])
