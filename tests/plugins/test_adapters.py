"""Adapters: which one is built, how large, what it computes, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import golden
from kdgraft import WiringError
from kdgraft.adapters import ConvAdapter, LinearAdapter, NoAdapter, PerceptronAdapter, build_adapter, resize_to


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("kind", "student", "teacher", "built", "parameters"),
    [
        ("auto", (2, 3, 8, 8), (2, 5, 8, 8), ConvAdapter, [(5, 3, 1, 1), (5,)]),
        ("auto", (2, 4, 8, 8), (2, 4, 8, 8), ConvAdapter, [(4, 4, 1, 1), (4,)]),
        ("auto", (2, 3, 8, 6), (2, 5, 4, 3), ConvAdapter, [(5, 3, 1, 1), (5,)]),
        ("auto", (2, 7, 3), (2, 7, 5), LinearAdapter, [(5, 3), (5,)]),
        ("auto", (2, 3), (2, 5), LinearAdapter, [(5, 3), (5,)]),
        ("conv1x1", (2, 3, 8, 8), (2, 5, 8, 8), ConvAdapter, [(5, 3, 1, 1), (5,)]),
        ("mlp", (2, 3, 8, 8), (2, 5, 4, 4), PerceptronAdapter, [(5, 3, 1, 1), (5,), (5, 5, 1, 1), (5,)]),
        ("linear", (2, 7, 3), (2, 7, 5), LinearAdapter, [(5, 3), (5,)]),
        ("none", (2, 4, 8, 8), (2, 4, 4, 4), NoAdapter, []),
        ("none", (2, 7, 3), (2, 7, 3), NoAdapter, []),
    ],
)
def test_kind_and_size(kind: str, student: tuple, teacher: tuple, built: type, parameters: list):
    adapter = build_adapter(kind, zeros(*student), zeros(*teacher), "hint")
    assert type(adapter) is built
    assert [tuple(p.shape) for p in adapter.parameters()] == parameters
    assert all(p.requires_grad for p in adapter.parameters())
    assert adapter(zeros(*student), zeros(*teacher)).shape == teacher


def test_convolution_by_hand():
    _, _, weight, bias = golden.regressor()
    adapter = ConvAdapter(3, 6).double()
    adapter.load_state_dict({"project.weight": weight, "project.bias": bias})
    student = golden.wave((1, 3, 2, 2), 0.9, 0.2, 1.0)
    expected = torch.einsum("oc,bchw->bohw", weight[:, :, 0, 0], student) + bias[:, None, None]
    torch.testing.assert_close(adapter(student, torch.zeros(1, 6, 2, 2)), expected)


def test_linear_maps_the_last_dimension():
    adapter = LinearAdapter(3, 2)
    student = golden.wave((2, 4, 3), 0.9, 0.2, 1.0).float()
    expected = student @ adapter.project.weight.T + adapter.project.bias
    torch.testing.assert_close(adapter(student, torch.zeros(2, 4, 2)), expected)


def test_resize_by_hand():
    # 1×4 to 1×2, pixel centres at ½ and 2½ of the old grid: the means of two neighbours.
    student = torch.tensor([[[[1.0, 3.0, 5.0, 9.0]]]])
    assert resize_to(student, (1, 2)).tolist() == [[[[2, 7]]]]
    assert NoAdapter()(student, zeros(1, 1, 1, 2)).tolist() == [[[[2, 7]]]]
    assert resize_to(student, (1, 4)) is student


def test_corners_are_aligned_where_the_host_aligns_them():
    # 1×4 to 1×2: the first and the last.
    student = torch.tensor([[[[1.0, 3.0, 5.0, 9.0]]]])
    assert resize_to(student, (1, 2), align_corners=True).tolist() == [[[[1, 9]]]]
    assert NoAdapter(align_corners=True)(student, zeros(1, 1, 1, 2)).tolist() == [[[[1, 9]]]]
    for kind in ("none", "conv1x1"):
        adapter = build_adapter(kind, student, zeros(1, 1, 1, 2), "here", align_corners=True)
        mapped = adapter.project(student) if kind == "conv1x1" else student
        assert torch.equal(adapter(student, zeros(1, 1, 1, 2)), mapped[..., [0, 3]])
        assert not build_adapter(kind, student, zeros(1, 1, 1, 2), "here").align_corners


def test_resize_comes_after_the_projection():
    adapter = ConvAdapter(3, 5)
    student = golden.wave((2, 3, 4, 4), 0.9, 0.2, 1.0).float()
    expected = F.interpolate(adapter.project(student), size=(8, 6), mode="bilinear", align_corners=False)
    assert torch.equal(adapter(student, zeros(2, 5, 8, 6)), expected)


@pytest.mark.parametrize(
    ("kind", "student", "teacher", "message"),
    [
        ("auto", (2, 3, 8, 8), (2, 64, 3), "a map and a sequence cannot be compared"),
        ("auto", (2, 7, 3), (2, 9, 5), "adapter 'linear' needs (…, C) of the same length; use adapter='conv1x1'"),
        ("linear", (2, 3, 8, 8), (2, 5, 8, 8), "use adapter='conv1x1' for maps"),
        ("conv1x1", (2, 7, 3), (2, 7, 5), "adapter 'conv1x1' needs (B, C, H, W); use adapter='linear'"),
        ("none", (2, 3, 8, 8), (2, 5, 8, 8), "adapter 'none' needs equal channels; use adapter='auto'"),
        ("none", (2, 7, 3), (2, 7, 5), "adapter 'none' needs equal channels"),
        ("none", (2, 7, 3), (2, 9, 3), "adapter 'none' needs equal channels"),
    ],
)
def test_errors_name_both_shapes(kind: str, student: tuple, teacher: tuple, message: str):
    with pytest.raises(WiringError) as error:
        build_adapter(kind, zeros(*student), zeros(*teacher), "hint (a → b)")
    assert str(error.value).startswith(f"hint (a → b): student {student}, teacher {teacher}: ")
    assert message in str(error.value)


def test_unknown_kind():
    with pytest.raises(
        WiringError, match="adapter must be 'auto', 'conv1x1', 'mlp', 'linear', 'none' or 'any', got 'conv3x3'"
    ):
        build_adapter("conv3x3", zeros(1, 2, 2, 2), zeros(1, 2, 2, 2), "hint")


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 3)])
def test_an_adapter_lies_where_the_student_does(shape: tuple[int, ...]):
    tensor = torch.zeros(shape, device="meta")
    adapter = build_adapter("auto", tensor, tensor, "hint")
    assert {p.device.type for p in adapter.parameters()} == {"meta"}


def test_representation():
    assert str(ConvAdapter(3, 5)).startswith("ConvAdapter(\n  3→5")
    assert LinearAdapter(3, 5).extra_repr() == "3→5"
