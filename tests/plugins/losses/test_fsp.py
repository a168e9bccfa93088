"""Flow of solution procedure (FSP)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from golden.dense import chirp
from kdgraft import FSP, Batch, Distiller, DistillError, WiringError
from kdgraft.losses import fsp

SHAPES = ((2, 3, 6, 6), (2, 4, 3, 3), (2, 5, 3, 3))
STUDENT = [chirp(shape, 0.41 + 0.1 * place, 0.6, 1.2) for place, shape in enumerate(SHAPES)]
TEACHER = [chirp(shape, 0.53 + 0.1 * place, 0.9, 2.0) for place, shape in enumerate(SHAPES)]

# The authors published no code. HobbitLong/RepDistiller@b84f547c5db6a35318d4671d7d5c4de74c822403: distiller_zoo/FSP.py, FSP, in
# float64, on STUDENT and TEACHER: the loss of each layer with the next one; of their sum the gradient at each map's first number,
# and the sum of its squares.
FIGURES = (0.19335192781451402, 0.4300660055791662)
SLOPES = (
    (-0.00023237919779323362, 0.0004309032494899628),
    (-0.004826087549904087, 0.004805654281587517),
    (-0.00557406444340128, 0.0035239083627543848),
)


def test_figures_of_a_port():
    student = [maps.clone().requires_grad_() for maps in STUDENT]
    losses = [fsp(tuple(student[i : i + 2]), tuple(TEACHER[i : i + 2])) for i in (0, 1)]
    assert [loss.item() for loss in losses] == pytest.approx(FIGURES, rel=1e-12)
    slopes = torch.autograd.grad(sum(losses), student)
    for slope, expected in zip(slopes, SLOPES, strict=True):
        assert (slope.flatten()[0].item(), slope.square().sum().item()) == pytest.approx(expected, rel=1e-12)


def test_two_positions_by_hand():
    # The student's products are (1·3 + 2·5) / 2 = 6.5 and (1·0 + 2·1) / 2 = 1; the teacher's 1 and 0: (5.5² + 1²) / 2.
    student = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[3.0, 5.0]], [[0.0, 1.0]]]])
    teacher = torch.tensor([[[[2.0, 0.0]]]]), torch.tensor([[[[1.0, 9.0]], [[0.0, 7.0]]]])
    assert fsp(student, teacher).item() == pytest.approx((5.5**2 + 1) / 2)


def test_order_of_positions_does_not_matter_but_that_of_channels_does():
    (one, other), teacher = STUDENT[1:], tuple(TEACHER[1:])
    expected = fsp((one, other), teacher)
    turned = fsp((one.flip(2, 3), other.flip(2, 3)), teacher)
    torch.testing.assert_close(turned, expected)
    assert not math.isclose(fsp((one.flip(1), other), teacher).item(), expected.item())
    # The teacher's positions may be in yet another order.
    torch.testing.assert_close(fsp((one, other), tuple(maps.mT for maps in teacher)), expected)


def test_either_layer_may_be_the_larger_one():
    student, teacher = tuple(STUDENT[:2]), tuple(TEACHER[:2])
    torch.testing.assert_close(fsp(student[::-1], teacher[::-1]), fsp(student, teacher))
    wide = tuple(torch.nn.functional.interpolate(maps, scale_factor=(1, 3)) for maps in (student[1], teacher[1]))
    halved = tuple(torch.nn.functional.adaptive_avg_pool2d(maps, (3, 6)) for maps in (student[0], teacher[0]))
    # 6×6 and 3×9 meet on 3×6.
    met = tuple(torch.nn.functional.adaptive_avg_pool2d(maps, (3, 6)) for maps in wide)
    torch.testing.assert_close(
        fsp((student[0], wide[0]), (teacher[0], wide[1])), fsp((halved[0], met[0]), (halved[1], met[1]))
    )


def test_padding_changes_nothing():
    student, teacher = tuple(STUDENT[:2]), tuple(TEACHER[:2])
    masks = torch.zeros(2, 6, 6), torch.zeros(2, 3, 3)
    masks[0][:, :, :4], masks[1][:, :, :2] = 1, 1
    cut = lambda layers: (layers[0][..., :4], layers[1][..., :2])  # noqa: E731
    torch.testing.assert_close(fsp(student, teacher, valid=masks), fsp(cut(student), cut(teacher)))
    # A border within a patch: its average is that of its first column.
    masks[0][:, :, 3] = 0
    narrow = [maps.clone() for maps in (student[0], teacher[0])]
    for maps in narrow:
        maps[..., 3] = maps[..., 2]
    expected = fsp(cut((narrow[0], student[1])), cut((narrow[1], teacher[1])))
    torch.testing.assert_close(fsp(student, teacher, valid=masks), expected)


def test_images_without_a_common_position_are_left_out():
    student, teacher = tuple(STUDENT[1:]), tuple(TEACHER[1:])
    masks = torch.ones(2, 3, 3), torch.ones(2, 3, 3)
    masks[0][1, 0], masks[1][1, 1:] = 0, 0
    first = lambda layers: (layers[0][:1], layers[1][:1])  # noqa: E731
    torch.testing.assert_close(fsp(student, teacher, valid=masks), fsp(first(student), first(teacher)))
    assert fsp(student, teacher, valid=masks, reduction="none")[1] == 0


def test_mistakes():
    with pytest.raises(DistillError, match=r"^fsp: student .* must have the same shape"):
        fsp(tuple(STUDENT[:2]), (TEACHER[0][:, :2], TEACHER[1]))
    with pytest.raises(DistillError, match="hold 2 and 1 images"):
        fsp((STUDENT[0], STUDENT[1][:1]), (TEACHER[0], TEACHER[1][:1]))


# --- the term


class Net(nn.Module):
    """Three layers, each half as high and wide as the one before."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        ins = (3, *widths[:-1])
        self.layers = nn.ModuleList(nn.Conv2d(i, o, 2, stride=2) for i, o in zip(ins, widths, strict=True))

    def forward(self, x: Tensor) -> list[Tensor]:
        found = []
        for layer in self.layers:
            found.append(x := layer(x))
        return found


IMAGES = chirp((2, 3, 16, 16), 0.37, 0.2, 1.0).float()


def build(*terms: object, student: tuple[int, ...] = (4, 5, 6), teacher: tuple[int, ...] = (4, 5, 6)) -> Distiller:
    torch.manual_seed(0)
    return Distiller(Net(*student), Net(*teacher), list(terms), IMAGES)


@pytest.mark.parametrize(
    ("pairs", "expected"), [(None, [(0, 1), (1, 2)]), ([[0, 2]], [(0, 2)]), ([[1, 0], [2, 2]], [(1, 0), (2, 2)])]
)
def test_pairs_are_added(pairs: list[list[int]] | None, expected: list[tuple[int, int]]):
    distiller = build(FSP("layers[*]", pairs=pairs, weight=0.5))
    s, t = distiller.student(IMAGES), distiller.teacher.model(IMAGES)
    losses = [fsp((s[i], s[j]), (t[i], t[j])) for i, j in expected]
    torch.testing.assert_close(distiller(IMAGES).loss, 0.5 * torch.stack(losses).sum())
    assert not list(distiller.terms.parameters())


def test_channels_that_differ_are_adapted():
    distiller = build(dict(type="FSP", tap=["layers.0", "layers.1"]), teacher=(7, 5, 6))
    assert [row.adapter for row in distiller.rows] == ["ConvAdapter 4→7", "NoAdapter"]
    (adapter, _), s, t = distiller.terms["fsp"].adapters, distiller.student(IMAGES), distiller.teacher.model(IMAGES)
    out = distiller(IMAGES)
    torch.testing.assert_close(out.loss, fsp((adapter(s[0], t[0]), s[1]), (t[0], t[1])))
    out.loss.backward()
    assert adapter.project.weight.grad.any()


def test_each_layer_has_its_own_region():
    distiller = build(FSP("layers[*]"))
    sizes = [(16, 16), (16, 8)]
    batch = Batch(padded_size=(16, 16), image_sizes=sizes)
    junk = IMAGES.clone()
    junk[1, :, :, 8:] = 1e3
    found = [distiller(images, batch=batch).loss for images in (IMAGES, junk)]
    torch.testing.assert_close(*found, rtol=0, atol=0)
    alone = [distiller(images).loss for images in (IMAGES[:1], IMAGES[1:, :, :, :8])]
    torch.testing.assert_close(found[0], sum(alone) / 2)


def test_recipe():
    torch.manual_seed(0)
    distiller = Distiller(
        Net(4, 5, 6), Net(4, 5, 6), example=IMAGES, recipe=dict(type="fsp", tap="layers[*]", weight=3.0)
    )
    assert distiller(IMAGES).figures["distill.fsp.weight"] == 3


@pytest.mark.parametrize("pairs", [[], [[0]], [[0, -1]], [["layers.0", "layers.1"]], [0, 1], [[0, True]]])
def test_pairs_that_are_none(pairs: list[object]):
    with pytest.raises(DistillError, match=r"^FSP: pairs must be a list of pairs of places"):
        FSP("layers[*]", pairs=pairs)


def test_wiring_mistakes():
    with pytest.raises(
        WiringError, match=r"^fsp: 'layers.0' gives 1 map, but 2 are compared in pairs; tap more layers"
    ):
        build(FSP("layers.0"))
    with pytest.raises(WiringError, match="gives 3 maps, but 4 are compared in pairs"):
        build(FSP("layers[*]", pairs=[[0, 3]]))
    with pytest.raises(WiringError, match=r"'none' needs equal channels; use adapter='auto'"):
        build(FSP("layers[*]", adapter="none"), teacher=(4, 7, 6))
    with pytest.raises(WiringError, match=r"fsp: student .* and teacher .* must agree; use adapter='auto'"):
        build(FSP("layers[*]", adapter="any"), teacher=(4, 7, 6))
    with pytest.raises(DistillError, match="FSP needs a tap, or both"):
        build("FSP")
