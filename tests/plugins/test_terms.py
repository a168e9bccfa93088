"""Terms: arguments, wiring and what each computes."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import golden
from kdgraft import (
    LOSSES,
    RECIPES,
    AttentionTransfer,
    Batch,
    ChannelWise,
    Constant,
    Distiller,
    DistillError,
    FeatureImitation,
    Hint,
    LogitMatching,
    PearsonImitation,
    Reader,
    Region,
    ReverseKL,
    SoftTargets,
    Step,
    Stop,
    Term,
    WarmUp,
    WiringError,
)
from kdgraft.losses import binary_soft_targets, channel_wise, hint, localization, logit_matching, pearson, soft_targets
from kdgraft.regions import foreground_weights
from kdgraft.registry import expand_recipe
from kdgraft.terms import build_terms


class Emit(nn.Module):
    """Hands on a parameter per name, so that a test chooses what a tap sees."""

    def __init__(self, **values: Tensor) -> None:
        super().__init__()
        self.values = nn.ParameterDict(values)
        self.parts = nn.ModuleDict({name: nn.Identity() for name in values})

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: self.parts[name](value * 1) for name, value in self.values.items()}


EXAMPLE = torch.zeros(1)


def distil(student: dict[str, Tensor], teacher: dict[str, Tensor], *terms: object) -> Distiller:
    return Distiller(Emit(**student), Emit(**teacher), terms=list(terms), example=EXAMPLE)


def one(student: Tensor, teacher: Tensor, term: object, **options: object) -> Tensor:
    """The loss of one term on one pair of tensors, tapped as ``parts.a``."""
    distiller = distil({"a": student}, {"a": teacher}, term)
    (value,) = distiller(EXAMPLE, **options).losses.values()
    return value


# --- arguments


def test_defaults_and_names():
    term = SoftTargets()
    assert (term.name, term.weight, type(term.schedule)) == ("soft_targets", 1.0, Constant)
    assert FeatureImitation("a").name == "feature_imitation"
    assert SoftTargets(name="kd").name == "kd"
    (row,) = Distiller(nn.Linear(2, 3), nn.Linear(2, 3), [term], torch.zeros(1, 2)).rows
    assert row.student_tap == row.teacher_tap == "(output)"


def test_weight_follows_the_schedule():
    term = SoftTargets(weight=2, schedule=[WarmUp(10), Stop(20)])
    assert [term.weight_at(Step(i)) for i in (0, 5, 10, 20)] == [0, 1, 2, 0]
    assert SoftTargets(weight=0).weight_at(Step()) == 0


@pytest.mark.parametrize("weight", [-1, -1e-9, float("nan"), float("inf"), 1e39, 10**400, "1", True, None])
def test_wrong_weight(weight: object):
    with pytest.raises(
        DistillError, match=r'SoftTargets: weight must be a number >= 0(, "auto" or dict\(type="auto", share=…\))?, got'
    ):
        SoftTargets(weight=weight)


def test_a_weight_that_its_schedule_makes_too_large():
    steep = dict(type="Ramp", end=5, final=1e30)
    with pytest.raises(
        DistillError, match=r"weight times the schedule's largest factor .*1e\+60, which exceeds the range of float32"
    ):
        SoftTargets(weight=1e30, schedule=steep)
    with pytest.raises(DistillError, match="weight times the schedule's largest factor must be a number >= 0"):
        SoftTargets(schedule=[steep, steep])
    assert SoftTargets(weight=1e-30, schedule=steep).weight_at(Step(5)) == pytest.approx(1)


@pytest.mark.parametrize("name", ["", "a.b", "a b", "a-b"])
def test_wrong_name(name: str):
    with pytest.raises(DistillError, match="a name must be letters, digits and underscores"):
        SoftTargets(name=name)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            dict(type="FeatureImitation", tap="a", wieght=2),
            "term FeatureImitation takes no argument 'wieght'; did you mean 'weight'",
        ),
        (
            dict(type="FeatureImitation"),
            "FeatureImitation needs a tap, or both student_tap and teacher_tap; student_tap is missing",
        ),
        (
            dict(type="Hint", student_tap="a"),
            "Hint needs a tap, or both student_tap and teacher_tap; teacher_tap is missing",
        ),
        (dict(type="FeatureImitation", tap="a["), "cannot read tap 'a['"),
        (
            dict(type="FeatureImitation", tap="a", region="forground"),
            "no region is called 'forground'; did you mean 'foreground'",
        ),
        (dict(type="FeatureImitation", tap="a", loss="hints"), "no loss is called 'hints'; did you mean 'hint'"),
        (dict(type="FeatureImitation", tap="a", loss=dict(type="hint", nrom="l1")), "loss hint takes no 'nrom'"),
        (dict(type="FeatureImitation", tap="a", loss=localization), "loss localization must take dim and reduction"),
        (dict(type="FeatureImitation", tap="a", loss="localization"), "no loss is called 'localization'"),
        (
            dict(type="FeatureImitation", tap="a", loss=3),
            "loss must be a name, a dict with a type, or a function; got 3",
        ),
        (dict(type="FeatureImitation", tap=[]), "a term needs at least one tap, got an empty list"),
        (dict(type="FeatureImitation", tap="a", loss=dict(type="hint", dim=3)), "loss hint takes no 'dim'"),
        (dict(type="FeatureImitation", tap="a", loss=dict(type="hint", weight=3)), "loss hint takes no 'weight'"),
        (dict(type="PearsonImitation", tap="a", loss="cosine"), "term PearsonImitation takes no argument 'loss'"),
        (dict(type="MaskedGeneration", tap="a", loss="hint"), "term MaskedGeneration takes no argument 'loss'"),
        (dict(type="ChannelWise", tap="a", loss="hint"), "term ChannelWise takes no argument 'loss'"),
        (dict(type="LogitMatching", center="false"), "LogitMatching: center must be true or false, got 'false'"),
        (dict(type="LogitMatching", temperature=2), "term LogitMatching takes no argument 'temperature'"),
        (dict(type=int), "term int cannot be built from a config"),
        (dict(type="SoftTargets", temperature=0), "temperature must be > 0, got 0"),
        (dict(type="SoftTargets", temperature=1e200), "temperature must be > 0, got 1e+200"),
        (
            dict(type="SoftTargets", temperature=1e20),
            "temperature must be a number whose square float32 holds, got 1e+20",
        ),
        (
            dict(type="SoftTargets", temperature=1e-30),
            "temperature must be a number whose square float32 holds, got 1e-30",
        ),
        (dict(type="SoftTargets", hard_weight="0.5"), "hard_weight must be in [0, 1], got '0.5'"),
        (dict(type="SkewedKL", alpha=1.0), "SkewedKL: alpha must be below 1"),
        (dict(type="SoftTargets", hard_weight=1.5), "hard_weight must be in [0, 1], got 1.5"),
        (dict(type="SoftTargets", schedule="Warmup"), "no schedule is called 'Warmup'"),
    ],
)
def test_wrong_arguments(spec: dict, message: str):
    with pytest.raises(DistillError) as error:
        build_terms([spec])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_list_of_terms():
    ready = SoftTargets(name="ready")
    built = build_terms(["SoftTargets", dict(type="Hint", tap="a"), ready])
    assert [type(term) for term in built] == [SoftTargets, Hint, SoftTargets]
    assert built[2] is ready


def test_terms_of_one_name_are_numbered_and_none_is_lost():
    names = [term.name for term in build_terms([SoftTargets(), SoftTargets(), SoftTargets()])]
    assert names == ["soft_targets", "soft_targets_2", "soft_targets_3"]
    names = [term.name for term in build_terms([SoftTargets(), SoftTargets(name="soft_targets_2"), SoftTargets()])]
    assert names == ["soft_targets", "soft_targets_2", "soft_targets_3"]


def test_one_term_listed_twice():
    term = SoftTargets()
    with pytest.raises(DistillError, match="lists the same SoftTargets twice"):
        build_terms([term, term])


@pytest.mark.parametrize("specs", ["SoftTargets", dict(type="SoftTargets"), None, SoftTargets()])
def test_terms_must_be_a_list(specs: object):
    with pytest.raises(DistillError, match="terms must be a list"):
        build_terms(specs)


def test_a_list_of_something_else():
    with pytest.raises(DistillError, match="a term is a name, a dict with a type, or a Term; got 3"):
        build_terms([3])


# --- wiring


def test_rows_for_the_user():
    student = {"a": torch.zeros(2, 3, 4, 4), "b": torch.zeros(2, 5)}
    teacher = {"a": torch.zeros(2, 6, 8, 8), "b": torch.zeros(2, 5)}
    distiller = distil(
        student,
        teacher,
        FeatureImitation("parts.a", weight=0.5, schedule=Stop(9)),
        SoftTargets(tap="parts.b"),
        LogitMatching(tap="[b]"),
    )
    first, second, third = distiller.rows
    assert first == (
        "feature_imitation", "parts.a", "2×3×4×4", "ConvAdapter 3→6, resize", "parts.a", "2×6×8×8", "all",
        "0.5 × Stop(end=9, by='iter')",
    )  # fmt: skip
    assert second == ("soft_targets", "parts.b", "2×5", "–", "parts.b", "2×5", "–", "1")
    assert third.student_tap == "[b]"


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (lambda: Hint("parts.c"), "hint: the student has no module 'parts.c' (tap 'parts.c'); did you mean 'parts.b', 'parts.a'"),
        (lambda: Hint(student_tap="parts.a", teacher_tap="parts.c"), "hint: the teacher has no module 'parts.c'"),
        (lambda: Hint("parts.a", adapter="none"), "hint (parts.a → parts.a): student (2, 3, 4, 4), teacher (2, 6, 4, 4): adapter 'none' needs equal channels"),
        (lambda: Hint(student_tap="parts.a", teacher_tap="parts.b"), "student (2, 3, 4, 4), teacher (2, 5): a map and a sequence"),
        (lambda: Hint(student_tap=["parts.a", "parts.b"], teacher_tap="parts.a"), "hint: the student's 'parts.a', 'parts.b' yields 2 tensors [(2, 3, 4, 4), (2, 5)], the teacher's 'parts.a' 1 [(2, 6, 4, 4)]"),
        (lambda: SoftTargets(tap="parts.a"), "soft_targets: student parts.a (2, 3, 4, 4) and teacher parts.a (2, 6, 4, 4) must agree"),
        (lambda: LogitMatching(tap="parts.a"), "logit_matching: student parts.a (2, 3, 4, 4) and teacher"),
        (lambda: SoftTargets(), "tap '(output)' of the student yields a dict, not a tensor"),
        (lambda: Hint("parts.a", region=NeedsMasks()), "hint: region 'NeedsMasks' needs masks, not given here"),
    ],
)  # fmt: skip
def test_what_cannot_be_wired_fails_when_it_is_built(term, message: str):
    student = {"a": torch.zeros(2, 3, 4, 4), "b": torch.zeros(2, 5)}
    teacher = {"a": torch.zeros(2, 6, 4, 4), "b": torch.zeros(2, 5)}
    with pytest.raises(WiringError) as error:
        distil(student, teacher, term())
    assert message in str(error.value)
    assert "\n" not in str(error.value)


class NeedsMasks(Region):
    needs = frozenset({"masks"})


def test_a_term_belongs_to_one_distiller():
    term = Hint("parts.a")
    maps = {"a": torch.zeros(1, 2, 3, 3)}
    distil(maps, maps, term)
    with pytest.raises(WiringError, match="hint is wired to another student already"):
        distil(maps, maps, term)


# --- what each computes


def test_soft_targets():
    student, teacher = (x.float() for x in golden.logits())
    assert one(student, teacher, SoftTargets(4, tap="parts.a")).item() == pytest.approx(
        golden.SOFT_TARGETS[4][0], rel=1e-5
    )
    assert one(student, teacher, SoftTargets(20, tap="[a]", weight=0.5)).item() == pytest.approx(
        golden.SOFT_TARGETS[20][0] / 2, rel=1e-5
    )


def test_soft_targets_on_maps_and_tokens():
    student, teacher = (golden.wave((2, 3, 4, 4), f, 0.3, 2.0).float() for f in (0.7, 0.9))
    as_rows = [x.permute(0, 2, 3, 1).reshape(-1, 3) for x in (student, teacher)]
    torch.testing.assert_close(one(student, teacher, SoftTargets(4, tap="parts.a")), soft_targets(*as_rows))
    tokens = [x.reshape(2, 16, 3) for x in as_rows]
    torch.testing.assert_close(one(*tokens, SoftTargets(4, tap="parts.a")), soft_targets(*as_rows))


@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 4), (2, 4, 3, 1)])
def test_soft_targets_mixed_with_labels(shape: tuple[int, ...]):
    student, teacher = (golden.wave(shape, f, 0.3, 2.0).float() for f in (0.7, 0.9))
    labels = torch.tensor([0, 3, -100, 2, 1, -100])
    rows = [(x.permute(0, 2, 3, 1) if x.ndim == 4 else x).reshape(6, 4) for x in (student, teacher)]
    keep = labels != -100
    hard = F.cross_entropy(rows[0][keep], labels[keep])
    expected = 0.3 * hard + 0.7 * soft_targets(rows[0][keep], rows[1][keep])
    distiller = distil({"a": student}, {"a": teacher}, SoftTargets(4, hard_weight=0.3, tap="parts.a"))
    shaped = labels.reshape([n for d, n in enumerate(shape) if d != (1 if len(shape) == 4 else len(shape) - 1)])
    torch.testing.assert_close(distiller(EXAMPLE, targets=shaped).total(hard), expected)


def test_soft_targets_all_ignored():
    student, teacher = (x.float() for x in golden.logits())
    distiller = distil({"a": student}, {"a": teacher}, SoftTargets(hard_weight=0.5, tap="parts.a"))
    loss = distiller(EXAMPLE, targets=torch.full((5,), -100)).loss
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(distiller.student.values["a"].grad, torch.zeros_like(student))


def test_soft_targets_without_labels_compare_every_item():
    student, teacher = (x.float() for x in golden.logits())
    out = distil({"a": student}, {"a": teacher}, SoftTargets(4, hard_weight=0.25, tap="parts.a"))(EXAMPLE)
    torch.testing.assert_close(out.loss, 0.75 * soft_targets(student, teacher))
    assert out.host_share == 0.25


def test_one_output_for_two_classes_is_compared_as_a_probability():
    student, teacher = torch.tensor([[0.3], [-2.0]]), torch.tensor([[1.0], [0.5]])
    expected = binary_soft_targets(student, teacher, 2.0)
    torch.testing.assert_close(one(student, teacher, SoftTargets(2, tap="parts.a")), expected)
    with pytest.raises(DistillError, match="score each class on its own; use SoftTargets"):
        one(student, teacher, ReverseKL(tap="parts.a"))
    with pytest.raises(WiringError, match="center=True is not defined for independent classes"):
        distil({"a": student}, {"a": teacher}, LogitMatching(center=True, tap="parts.a"))


def test_logit_matching():
    student, teacher = (x.float() for x in golden.logits())
    assert one(student, teacher, LogitMatching(tap="parts.a")).item() == pytest.approx(golden.LOGITS_MSE / 2, rel=1e-5)
    torch.testing.assert_close(
        one(student, teacher, LogitMatching(center=True, tap="parts.a")), logit_matching(student, teacher, center=True)
    )


def test_hint_without_an_adapter():
    student, teacher = (x.float() for x in golden.features())
    assert one(student, teacher, Hint("parts.a", adapter="none")).item() == pytest.approx(golden.HINT, rel=1e-5)


def test_hint_with_an_adapter():
    student, teacher, weight, bias = (x.float() for x in golden.regressor())
    distiller = distil({"a": student}, {"a": teacher}, Hint("parts.a"))
    with torch.no_grad():
        for parameter, value in zip(distiller.terms.parameters(), (weight, bias), strict=True):
            parameter.copy_(value)
    assert distiller(EXAMPLE).loss.item() == pytest.approx(golden.HINT_REGRESSOR, rel=1e-5)


@pytest.mark.parametrize("name", list(LOSSES))
def test_every_loss_that_is_registered_can_be_named_on_features(name: str):
    student, teacher = (x.float() for x in golden.features())
    expected = LOSSES.get(name)(student, teacher, dim=1)
    torch.testing.assert_close(one(student, teacher, FeatureImitation("parts.a", adapter="none", loss=name)), expected)


def test_a_loss_of_any_two_widths_waives_the_check_of_channels():
    def strength(s: Tensor, t: Tensor, *, dim: int, reduction: str) -> Tensor:
        return (s.square().mean(dim) - t.square().mean(dim)).abs()

    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)
    term = FeatureImitation("parts.a", adapter="any", loss=strength)
    expected = (student.square().mean(1) - teacher.square().mean(1)).abs().mean()
    torch.testing.assert_close(one(student, teacher, term), expected)
    with pytest.raises(WiringError, match=r"feature_imitation: hint: .* must have the same shape; use adapter='auto'"):
        one(student, teacher, FeatureImitation("parts.a", adapter="any"))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (dict(type="hint", norm="l1"), lambda s, t: (s - t).abs().mean()),
        (dict(type="soft_targets", temperature=2.0), lambda s, t: soft_targets(s, t, 2.0, dim=1)),
        ("logit_matching", lambda s, t: ((s - t) ** 2).mean() / 2),
        (lambda s, t, *, dim, reduction: 1 - F.cosine_similarity(s, t, dim=dim), lambda s, t: 1 - F.cosine_similarity(s, t, dim=1).mean()),
    ],
)  # fmt: skip
def test_any_loss_per_position(loss: object, expected):
    student, teacher = (x.float() for x in golden.features())
    term = FeatureImitation("parts.a", adapter="none", loss=loss)
    torch.testing.assert_close(one(student, teacher, term), expected(student, teacher))


def test_levels_weigh_alike():
    # Errors of 1 on 16 positions and of 3 on one position: (1 + 9) / 2, not (16·1 + 9) / 17.
    levels = {"a": torch.ones(1, 2, 4, 4), "b": torch.full((1, 2, 1, 1), 3.0)}
    zeros = {name: torch.zeros_like(value) for name, value in levels.items()}
    distiller = distil(levels, zeros, FeatureImitation(["parts.a", "parts.b"], adapter="none"))
    assert distiller(EXAMPLE).loss.item() == 5


def test_foreground():
    student, teacher = (
        golden.wave((2, 3, 4, 4), 0.7, 0.3, 2.0).float(),
        golden.wave((2, 3, 4, 4), 0.9, 0.3, 2.0).float(),
    )
    boxes = [torch.tensor([[0.0, 0.0, 8.0, 16.0], [9.0, 9.0, 31.0, 31.0]]), torch.zeros(0, 4)]
    batch = Batch(padded_size=(32, 32), image_sizes=[(32, 32)] * 2, boxes=boxes)
    value = one(student, teacher, FeatureImitation("parts.a", adapter="none", region="foreground"), batch=batch)
    # Two boxes weigh 1 each: half the sum of their positions' weighted errors; the image without boxes adds nothing.
    errors = ((student - teacher) ** 2).mean(1)
    expected = (errors * foreground_weights(boxes, (32, 32), student)).sum() / 2
    torch.testing.assert_close(value, expected)


def test_foreground_without_a_single_box():
    maps = torch.ones(1, 2, 4, 4)
    batch = Batch(padded_size=(32, 32), image_sizes=[(32, 32)], boxes=[torch.zeros(0, 4)])
    distiller = distil({"a": maps}, {"a": maps * 3}, FeatureImitation("parts.a", region="foreground"))
    loss = distiller(EXAMPLE, batch=batch).loss
    loss.backward()
    assert loss.item() == 0
    gradients = [p.grad for p in (distiller.student.values["a"], *distiller.terms.parameters())]
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


def test_padding_changes_no_value_and_no_gradient():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, 3, 4, 4, generator=generator)
    teacher = torch.randn(2, 5, 4, 4, generator=generator)
    # The first image fills 4×2 of 4×4 positions, the second all of them.
    batch = Batch(padded_size=(32, 32), image_sizes=[(32, 16), (32, 32)])
    results = []
    for junk in (0.0, 1e6):
        s, t = student.clone(), teacher.clone()
        s[0, :, :, 2:], t[0, :, :, 2:] = junk, -junk
        torch.manual_seed(1)
        distiller = distil({"a": s}, {"a": t}, FeatureImitation("parts.a"))
        loss = distiller(EXAMPLE, batch=batch).loss
        loss.backward()
        slope = distiller.student.values["a"].grad
        assert torch.equal(slope[0, :, :, 2:], torch.zeros(3, 4, 2))
        assert (slope[0, :, :, :2] != 0).all()
        results.append([loss.detach(), slope, *(p.grad for p in distiller.terms.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    # and the mean is one over the 8 + 16 positions that are there
    adapted = distiller.terms["feature_imitation"].adapters[0](s, t)
    items = hint(adapted, t, reduction="none")
    torch.testing.assert_close(results[1][0], (items[0, :, :2].sum() + items[1].sum()).detach() / 24)


def test_unpadded_and_padded_inputs_of_one_image_teach_the_same():
    generator = torch.Generator().manual_seed(0)
    s, t = torch.randn(1, 3, 4, 2, generator=generator), torch.randn(1, 3, 4, 2, generator=generator)
    term = lambda: FeatureImitation("parts.a", adapter="none")  # noqa: E731
    alone = one(s, t, term(), batch=Batch(padded_size=(32, 16), image_sizes=[(32, 16)]))
    wide = one(
        F.pad(s, (0, 2)), F.pad(t, (0, 2), value=5), term(), batch=Batch(padded_size=(32, 32), image_sizes=[(32, 16)])
    )
    torch.testing.assert_close(alone, wide)


def test_the_base_term_is_abstract():
    with pytest.raises(NotImplementedError):
        Term()(None, None, Batch())


def test_a_name_with_loss_in_it_is_refused_because_hosts_add_up_such_keys():
    with pytest.raises(DistillError, match="must not contain 'loss'"):
        SoftTargets(name="my_loss")

    class WarpLoss(SoftTargets):
        pass

    assert WarpLoss().name == "warp"


# --- channel-wise


def test_channel_wise_of_equal_channels_has_no_adapter():
    student, teacher = (golden.wave((2, 3, 4, 4), f, 0.3, 2.0).float() for f in (0.7, 0.9))
    distiller = distil({"a": student}, {"a": teacher}, ChannelWise("parts.a", temperature=2.0, weight=3.0))
    out = distiller(EXAMPLE)
    torch.testing.assert_close(out.loss, 3 * channel_wise(student, teacher, 2.0))
    assert not list(distiller.terms.parameters())
    assert distiller.rows[0].adapter == "NoAdapter"


def test_channel_wise_of_other_channels_and_grids_has_one():
    student, teacher = (
        golden.wave((2, 3, 8, 8), 0.7, 0.3, 2.0).float(),
        golden.wave((2, 5, 4, 4), 0.9, 0.3, 2.0).float(),
    )
    distiller = distil({"a": student}, {"a": teacher}, ChannelWise("parts.a"))
    out = distiller(EXAMPLE)
    adapted = distiller.terms["channel_wise"].adapters[0](student, teacher)
    torch.testing.assert_close(out.loss, channel_wise(adapted, teacher, 4.0))
    assert distiller.rows[0].adapter == "ConvAdapter 3→5, resize"
    out.loss.backward()
    assert all(p.grad is not None for p in distiller.terms.parameters())


def test_channel_wise_leaves_padding_and_empty_images_out():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(2))
    batch = Batch(padded_size=(32, 32), image_sizes=[(32, 16), (32, 32)])
    found = []
    for junk in (0.0, 1e6):
        s, t = student.clone(), teacher.clone()
        s[0, :, :, 2:], t[0, :, :, 2:] = junk, -junk
        found.append(one(s, t, ChannelWise("parts.a"), batch=batch))
    assert torch.equal(*found)
    halves = channel_wise(student[:1, :, :, :2], teacher[:1, :, :, :2]), channel_wise(student[1:], teacher[1:])
    torch.testing.assert_close(found[0], sum(halves) / 2)
    alone = Batch(padded_size=(32, 32), image_sizes=[(0, 0), (32, 32)])
    torch.testing.assert_close(one(student, teacher, ChannelWise("parts.a"), batch=alone), halves[1])


def test_channel_wise_takes_maps_alone():
    with pytest.raises(WiringError, match=r"channel_wise: parts\.a \(2, 5\) and parts\.a \(2, 5\) must be maps"):
        distil({"a": torch.zeros(2, 5)}, {"a": torch.zeros(2, 5)}, ChannelWise("parts.a"))
    with pytest.raises(DistillError, match="temperature must be > 0"):
        ChannelWise("parts.a", temperature=0)


# --- Pearson imitation


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 3)])
def test_a_loss_on_features_gives_a_value_a_position(shape):
    tensor = torch.ones(shape)
    with pytest.raises(
        WiringError,
        match=r"one value per position, \(2.*here, but this one gives \(3,\); use another.*PearsonImitation",
    ):
        distil({"a": tensor}, {"a": tensor}, FeatureImitation("parts.a", loss=pearson))


def test_pearson_imitation_of_equal_channels_has_no_adapter():
    student, teacher = (golden.wave((2, 3, 4, 4), f, 0.3, 2.0).float() for f in (0.7, 0.9))
    distiller = distil({"a": student}, {"a": teacher}, PearsonImitation("parts.a", weight=3.0))
    torch.testing.assert_close(distiller(EXAMPLE).loss, 3 * pearson(student, teacher))
    assert not list(distiller.terms.parameters())
    assert distiller.rows[0].adapter == "NoAdapter"
    wider = golden.wave((2, 5, 2, 2), 0.9, 0.3, 2.0).float()
    distiller = distil({"a": student}, {"a": wider}, PearsonImitation("parts.a"))
    assert distiller.rows[0].adapter == "ConvAdapter 3→5, resize"
    distiller(EXAMPLE).loss.backward()
    assert all(p.grad is not None for p in distiller.terms.parameters())


def test_pearson_imitation_of_several_tensors_adds_up():
    student, teacher = (
        {n: golden.wave((2, 3, 4, 4), f * i, 0.3, 2.0).float() for n, i in zip("ab", (1, 3), strict=True)}
        for f in (0.7, 0.9)
    )
    term = PearsonImitation(["parts.a", "parts.b"], weight=3.0)
    alone = [3 * pearson(student[name], teacher[name]) for name in "ab"]
    torch.testing.assert_close(distil(student, teacher, term)(EXAMPLE).loss, sum(alone))


def test_pearson_imitation_leaves_padding_out():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(2))
    batch = Batch(padded_size=(32, 32), image_sizes=[(32, 16), (32, 32)])
    found = []
    for junk in (0.0, 1e6):
        s, t = student.clone(), teacher.clone()
        s[0, :, :, 2:], t[0, :, :, 2:] = junk, -junk
        found.append(one(s, t, PearsonImitation("parts.a"), batch=batch))
    torch.testing.assert_close(*found)
    kept = [torch.cat([x[0, :, :, :2].flatten(1), x[1].flatten(1)], 1).T for x in (student, teacher)]
    torch.testing.assert_close(found[0], pearson(*kept, dim=-1))


# --- what a term shows and hides


class Counting(Hint):
    """Counts its steps out of sight, and shows the count."""

    def __init__(self, *args: object, **settings: object) -> None:
        super().__init__(*args, **settings)
        self.steps = 0

    def forward(self, *args: object):
        self.steps += 1
        self.monitor = {"steps": torch.tensor(float(self.steps))}
        return super().forward(*args)

    def hidden_state(self) -> dict:
        return {"steps": self.steps}

    def load_hidden_state(self, state) -> None:
        self.steps = state["steps"]


MAPS = {"a": torch.ones(1, 2, 3, 3)}


def test_what_a_term_monitors_is_logged_and_is_no_loss():
    distiller = distil(MAPS, MAPS, Counting("parts.a", name="counted"), Hint("parts.a"))
    for step in (1, 2):
        out = distiller(EXAMPLE)
        assert out.losses["distill.counted.steps"] == step
    assert set(out.losses) == {"distill.counted.loss", "distill.hint.loss", "distill.counted.steps"}
    torch.testing.assert_close(out.loss, out.losses["distill.counted.loss"] + out.losses["distill.hint.loss"])


def test_a_term_that_rests_shows_nothing():
    distiller = distil(MAPS, MAPS, Counting("parts.a", name="counted", schedule=Stop(1)))
    assert "distill.counted.steps" in distiller(EXAMPLE).losses
    assert set(distiller(EXAMPLE).losses) == {"distill.counted.loss"}


def test_hidden_state_travels_in_live_state_and_in_the_state_dict(tmp_path):
    first = distil(MAPS, MAPS, Counting("parts.a", name="counted"), Hint("parts.a"))
    for _ in range(3):
        first(EXAMPLE)
    assert first.live_state()["hidden"] == {"counted": {"steps": 3}}
    by_live, by_dict, plain = (
        distil(MAPS, MAPS, Counting("parts.a", name="counted"), Hint("parts.a")) for _ in range(3)
    )
    by_live.load_live_state(first.live_state())
    torch.save(first.state_dict(), tmp_path / "state.pth")
    by_dict.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True), strict=True)
    assert [d.terms["counted"].steps for d in (by_live, by_dict, plain)] == [3, 3, 0]
    assert by_dict.iteration == 3
    # Terms that hide nothing add nothing, and a state from before there was anything to hide loads.
    bare = distil(MAPS, MAPS, Hint("parts.a"))
    assert bare.get_extra_state() == {"iteration": 0} and bare.live_state()["hidden"] == {}
    older = first.live_state()
    del older["hidden"]
    plain.load_live_state(older)
    assert plain.terms["counted"].steps == 0


def test_a_term_that_is_a_method_is_its_own_recipe():
    assert expand_recipe("at", RECIPES) == [{"type": "AttentionTransfer"}]
    maps = [{"a": torch.rand(2, width, 3, 3)} for width in (2, 4)]
    recipe = dict(type="at", tap="parts.a", weight=2.0)
    distiller = Distiller(Emit(**maps[0]), Emit(**maps[1]), recipe=recipe, example=EXAMPLE)
    assert [(type(term), term.weight) for term in distiller.all_terms] == [(AttentionTransfer, 2.0)]


def test_a_host_that_lacks_what_a_term_needs_refuses_it():
    class Blind(Reader):
        lacks: ClassVar = {"maps": "these models have none; use Hint"}

    with pytest.raises(
        DistillError, match=r"^AttentionTransfer needs feature maps .*: these models have none; use Hint$"
    ):
        build_terms([dict(type="AttentionTransfer", tap="conv")], reader=Blind)


@pytest.mark.parametrize("indices", [5, [[1], [2]], torch.ones(2, 2)])
def test_names_of_samples_that_are_none_are_one_line(indices):
    distiller = distil({"a": torch.rand(2, 3)}, {"a": torch.rand(2, 3)}, Hint("parts.a"))
    with pytest.raises(DistillError, match=r"^indices must be a list or a tensor \(B,\)"):
        distiller(EXAMPLE, indices=indices)


def test_modules_that_are_no_paths_are_one_line():
    with pytest.raises(
        DistillError, match=r"^WeightMatching: modules must be the path of a module or a list of paths, got 3$"
    ):
        build_terms([dict(type="WeightMatching", modules=3)])
