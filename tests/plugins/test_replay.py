"""A part of the teacher that runs on what the student drew, in plain PyTorch; and terms that share the host's loss."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdgraft import TERMS, Batch, Engine, FeatureImitation, Step, Stop, Teacher, WiringError
from kdgraft.engine import Replay
from kdgraft.losses import Ratio
from kdgraft.regions import All
from kdgraft.taps import Tap
from kdgraft.terms import Term
from kdgraft.terms.features import build_region, placed
from kdgraft.wiring import Wiring


class Head(nn.Module):
    """Looks at picked rows of the features."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def look(self, features: Tensor, rows: Tensor) -> Tensor:
        return self.layer(features[rows])


class Picker(nn.Module):
    """Two stages: the model draws rows (the largest first), then looks at them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.backbone, self.scores, self.head = nn.Linear(2, 4), nn.Linear(4, 1), Head()
        self.drawn: list[list[int]] = []

    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone(x)
        rows = self.scores(features)[:, 0].argsort(descending=True)[:3]
        self.drawn.append(rows.tolist())
        return self.head.look(features, rows=rows)


DRAWN = Tap.parse("head.look():inputs")
FEATURES = Tap.parse("backbone")


def _look(teacher, student, recorded, batch):
    teacher.head.look(recorded[FEATURES], student[DRAWN]["rows"] + batch.extra.get("shift", 0))


REPLAY = Replay("head", (DRAWN,), (FEATURES,), _look)
X = torch.sin(torch.arange(12.0)).reshape(6, 2)


def wired(*terms, replay: Replay | None = REPLAY):
    student, teacher = Picker(0), Picker(5)
    distiller = Engine(Teacher(teacher), list(terms))
    distiller.wire(student, lambda: student(X), lambda source: source.model(X), replay=replay)
    return student, teacher, distiller


def step(student, distiller, batch: Batch):
    with distiller.step(student, batch, Step(0, 0), lambda source: source.model(X)) as current:
        student(X)
    return current.losses()


def look():
    return FeatureImitation("head.layer", adapter="none", name="look")


@pytest.mark.parametrize("shift", [0, -1])
def test_the_teacher_looks_at_what_the_student_drew(shift: int):
    student, teacher, distiller = wired(look(), FeatureImitation("backbone", adapter="none", name="early"))
    found = step(student, distiller, Batch(extra={"shift": shift}))
    rows = student.drawn[-1]
    with torch.no_grad():
        ours, theirs = student.backbone(X), teacher.backbone(X)
        expected = F.mse_loss(student.head.layer(ours[rows]), teacher.head.layer(theirs[[row + shift for row in rows]]))
        early = F.mse_loss(ours, theirs)
        assert teacher.scores(theirs)[:, 0].argsort(descending=True)[:3].tolist() != rows
    assert found["distill.look.loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert found["distill.early.loss"].item() == pytest.approx(early.item(), rel=1e-6)
    assert not any(value.requires_grad for value in teacher.parameters())


def test_the_teachers_own_pass_ends_before_it_draws():
    student, teacher, distiller = wired(look())
    before = len(teacher.drawn)
    ran: list[int] = []
    teacher.scores.register_forward_hook(lambda *_: ran.append(1))
    step(student, distiller, Batch())
    assert not ran and len(teacher.drawn) == before


def test_without_a_tap_in_it_nothing_is_replayed():
    student, _, distiller = wired(FeatureImitation("backbone", adapter="none"))
    with distiller.step(student, Batch(), Step(0, 0), lambda source: source.model(X)) as current:
        student(X)
        recorded = current.recordings["teacher"]
    assert current.recordings["teacher"] is recorded
    with pytest.raises(KeyError):
        current.recordings["student"].calls(DRAWN)  # and what the replay would need is not recorded


def test_without_a_replay_the_teacher_runs_as_ever():
    student, teacher, distiller = wired(look(), replay=None)
    found = step(student, distiller, Batch())
    with torch.no_grad():
        expected = F.mse_loss(student(X), teacher(X))
    assert found["distill.look.loss"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_nothing_is_left_in_either_model_and_a_copy_works():
    student, teacher, distiller = wired(look())
    twin, other = copy.deepcopy((student, distiller))
    assert other.teacher.model is teacher
    values = [step(*pair, Batch())["distill.look.loss"] for pair in ((student, distiller), (twin, other))]
    assert torch.equal(*values)
    assert not any({"forward", "look"} & set(vars(m)) for model in (student, teacher) for m in model.modules())
    values[1].backward()
    assert twin.backbone.weight.grad.abs().sum() > 0
    assert student.backbone.weight.grad is None


def test_a_student_that_draws_nothing():
    teacher = Picker(5)
    distiller = Engine(Teacher(teacher), [FeatureImitation(student_tap="0", teacher_tap="head.layer")])
    student = nn.Sequential(nn.Linear(2, 3))
    with pytest.raises(WiringError, match="the student has no module 'head'") as caught:
        distiller.wire(student, lambda: student(X), lambda source: source.model(X), replay=REPLAY)
    assert "\n" not in str(caught.value)


# --- regions on maps that are no pictures of the image


def wiring(*outside: str, fields: frozenset[str] = frozenset()) -> Wiring:
    nothing: dict = {}
    return Wiring(nn.Identity(), nn.Identity(), nothing, nothing, fields, outside=outside)  # type: ignore[arg-type]


MAP, VECTORS = torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 3)
SIZES = frozenset({"image_sizes", "boxes"})


@pytest.mark.parametrize(
    ("region", "tap", "tensor", "outside", "fields", "expected"),
    [
        ("all", "neck", MAP, ("head",), SIZES, True),
        ("all", "head.layer", MAP, ("head",), SIZES, False),
        ("all", "head", VECTORS, ("head",), SIZES, False),
        ("all", "header", MAP, ("head",), SIZES, True),
        ("all", "neck", VECTORS, (), frozenset(), True),  # no padding to leave out
        ("foreground", "neck", MAP, ("head",), SIZES, True),
    ],
)
def test_what_a_region_places(region, tap, tensor, outside, fields, expected):
    term = FeatureImitation("neck")
    built, name = build_region(region, term)
    assert placed(term, built, name, tensor, Tap.parse(tap), wiring(*outside, fields=fields)) is expected


@pytest.mark.parametrize(
    ("region", "tap", "tensor", "advice"),
    [
        ("foreground", "head.layer", MAP, "use region='all'"),
        ("foreground", "neck", VECTORS, "tap a map (B, C, H, W), such as the output of a stage"),
        ("all", "neck", VECTORS, "tap a map (B, C, H, W), such as the output of a stage"),
    ],
)
def test_what_a_region_cannot_place(region, tap, tensor, advice):
    term = FeatureImitation("neck")
    built, name = build_region(region, term)
    with pytest.raises(WiringError) as caught:
        placed(term, built, name, tensor, Tap.parse(tap), wiring("head", fields=SIZES))
    message = str(caught.value)
    assert f"region '{region}' cannot place the positions of {tap}" in message and advice in message
    assert "\n" not in message


def test_maps_of_what_was_drawn_count_all_alike():
    # As if the rows were images: a region "all" that knew of padding would leave some out.
    student, _, distiller = wired(look())
    found = [step(student, distiller, Batch(padded_size=(4, 4), image_sizes=sizes)) for sizes in (None, [(1, 1)])]
    assert found[0]["distill.look.loss"].item() == found[1]["distill.look.loss"].item()
    assert isinstance(distiller.terms["look"].region, All)


# --- shares of the host's losses


class Sharing(Term):
    """Takes a share of the host's losses."""

    def __init__(self, share: float, *losses: str, **settings: object) -> None:
        super().__init__(**settings)  # type: ignore[arg-type]
        self.host_share, self.host_losses = share, losses

    def forward(self, student, teacher, batch) -> Ratio:
        return Ratio(torch.zeros(()), torch.ones(()))


def shares(*terms: Term, iteration: int = 0) -> dict[str, float]:
    """What is left of losses of 1, of those that count less."""
    student = nn.Identity()
    engine = Engine(Teacher(nn.Identity()), list(terms))
    engine.wire(student, lambda: student(X), lambda source: source.model(X))
    host = {name: torch.tensor(1.0) for name in ("loss_cls", "loss_obj", "loss_box")}
    with engine.step(student, Batch(), Step(iteration, 0), lambda source: source.model(X)) as current:
        student(X)
    current.losses(host)
    return {name: value.item() for name, value in host.items() if value != 1}


def test_shares_multiply_while_their_terms_are_active():
    first = Sharing(0.5, "loss_cls", "loss_obj", name="first")
    second = Sharing(0.8, "loss_cls", name="second", schedule=Stop(10))
    silent = Sharing(0.1, "loss_cls", name="silent", weight=0.0)
    whole = Sharing(1.0, "loss_box", name="whole")
    assert shares(first, second, silent, whole) == {"loss_cls": pytest.approx(0.4), "loss_obj": 0.5}
    second = Sharing(0.8, "loss_cls", name="second", schedule=Stop(10))
    assert shares(first, second, iteration=10) == {"loss_cls": 0.5, "loss_obj": 0.5}
    assert shares(whole) == {}


def test_without_names_a_term_shares_all_of_the_hosts_losses():
    assert shares(Sharing(0.25)) == {"loss_cls": 0.25, "loss_obj": 0.25, "loss_box": 0.25}


def test_lists_are_shared_too_and_figures_are_left():
    one, levels, other = (
        torch.tensor(2.0, requires_grad=True),
        [torch.tensor(4.0), torch.tensor(6.0)],
        torch.tensor(3.0),
    )
    losses = {"loss_cls": one, "loss_rpn_cls": levels, "loss_bbox": other, "acc": other}
    engine, student = Engine(Teacher(nn.Identity()), [Sharing(0.5, "loss_cls", "loss_rpn_cls", "acc")]), nn.Identity()
    engine.wire(student, lambda: student(X), lambda source: source.model(X))
    with engine.step(student, Batch(), Step(0, 0), lambda source: source.model(X)) as current:
        student(X)
    current.losses(losses)
    assert losses["loss_cls"].item() == 1 and losses["loss_rpn_cls"] == [2.0, 3.0]
    assert losses["loss_bbox"] is other and losses["acc"] is other
    losses["loss_cls"].backward()
    assert one.grad.item() == 0.5
    # An RoI head without a proposal has no class loss: a step may lack what is shared.
    lacking = {"loss_bbox": torch.ones(())}
    current.losses(lacking)
    assert lacking == {"loss_bbox": 1}


def test_a_plain_term_shares_nothing():
    assert TERMS.build(dict(type="SoftTargets")).host_losses == ()
    assert shares(FeatureImitation("", adapter="none", name="look")) == {}
