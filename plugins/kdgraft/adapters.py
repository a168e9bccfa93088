"""Adapters make the student's tensor comparable with the teacher's; the dry run determines their channel numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from .errors import WiringError

AdapterKind = Literal["auto", "conv1x1", "mlp", "linear", "none", "any"]


class ConvAdapter(nn.Module):
    """1×1 convolution to the teacher's channels, then a bilinear resize to the teacher's grid where the grids differ.

    Shapes: ``(B, C_s, H, W) -> (B, C_t, H_t, W_t)``. The adapter helps even where the channels match: Chen et al. 2017, table 4,
    report a gain of 1.1 mAP (hint 56.9, with adapter 58.0).
    """

    def __init__(self, student_channels: int, teacher_channels: int, *, align_corners: bool = False) -> None:
        super().__init__()
        self.project = nn.Conv2d(student_channels, teacher_channels, 1)
        self.align_corners = align_corners

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Map the student's features into the teacher's space; only the grid of ``teacher`` is used."""
        projected = self.project(student.to(self.project.weight.dtype))
        return resize_to(projected, teacher.shape[-2:], align_corners=self.align_corners)

    def extra_repr(self) -> str:
        return f"{self.project.in_channels}→{self.project.out_channels}"


class PerceptronAdapter(ConvAdapter):
    """Two 1×1 convolutions with a ReLU between them, and the resize of :class:`ConvAdapter`.

    Shapes: ``(B, C_s, H, W) -> (B, C_t, H_t, W_t)``. The hidden layer has the teacher's channels, as in Ultralytics' distillation.
    """

    def __init__(self, student_channels: int, teacher_channels: int, *, align_corners: bool = False) -> None:
        super().__init__(student_channels, teacher_channels, align_corners=align_corners)
        self.output = nn.Conv2d(teacher_channels, teacher_channels, 1)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        projected = self.output(self.project(student.to(self.project.weight.dtype)).relu())
        return resize_to(projected, teacher.shape[-2:], align_corners=self.align_corners)


class LinearAdapter(nn.Module):
    """Linear map of the last dimension, such as a token's, to the teacher's width: ``(…, C_s) -> (…, C_t)``."""

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.project = nn.Linear(student_width, teacher_width)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Map the student's vectors into the teacher's space."""
        return self.project(student.to(self.project.weight.dtype))

    def extra_repr(self) -> str:
        return f"{self.project.in_features}→{self.project.out_features}"


class NoAdapter(nn.Module):
    """Adapter without parameters: a bilinear resize where the grids of two maps differ."""

    def __init__(self, *, align_corners: bool = False) -> None:
        super().__init__()
        self.align_corners = align_corners

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the student's tensor on the teacher's grid."""
        if student.ndim != 4:
            return student
        return resize_to(student, teacher.shape[-2:], align_corners=self.align_corners)


def build_adapter(
    kind: AdapterKind, student: Tensor, teacher: Tensor, where: str, *, align_corners: bool = False
) -> nn.Module:
    """Build the adapter between two tensors of the dry run.

    Args:
        kind: ``"auto"`` builds a 1×1 convolution for maps ``(B, C, H, W)`` and a linear map for vectors ``(…, C)``; ``"mlp"`` two
            such convolutions with a ReLU between them; ``"none"`` and ``"any"`` have no parameters, and ``"any"`` accepts channels that differ.
        student, teacher: the tensors of the dry run; the adapter is placed on the student's device.
        where: the term and its taps, for messages.
        align_corners: passed to the resize of maps; set it as the host does.

    Raises:
        WiringError: an adapter of this kind cannot make the tensors comparable.
    """
    shapes = f"{where}: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}"
    if student.ndim != teacher.ndim:
        raise WiringError(f"{shapes}: a map and a sequence cannot be compared; tap two of the same kind")
    if kind == "auto":
        kind = "conv1x1" if student.ndim == 4 else "linear"
    if kind in ("conv1x1", "mlp"):
        if student.ndim != 4:
            raise WiringError(f"{shapes}: adapter {kind!r} needs (B, C, H, W); use adapter='linear'")
        convolution = ConvAdapter if kind == "conv1x1" else PerceptronAdapter
        return convolution(student.shape[1], teacher.shape[1], align_corners=align_corners).to(student.device)
    if kind == "linear":
        if student.ndim == 4 or student.shape[1:-1] != teacher.shape[1:-1]:
            raise WiringError(
                f"{shapes}: adapter 'linear' needs (…, C) of the same length; use adapter='conv1x1' for maps"
            )
        return LinearAdapter(student.shape[-1], teacher.shape[-1]).to(student.device)
    if kind == "any":
        return NoAdapter(align_corners=align_corners)
    if kind == "none":
        matches = student.shape[1] == teacher.shape[1] if student.ndim == 4 else student.shape[1:] == teacher.shape[1:]
        if not matches:
            raise WiringError(f"{shapes}: adapter 'none' needs equal channels; use adapter='auto'")
        return NoAdapter(align_corners=align_corners)
    raise WiringError(f"{where}: adapter must be 'auto', 'conv1x1', 'mlp', 'linear', 'none' or 'any', got {kind!r}")


def adapter_label(adapter: nn.Module, student: Tensor, teacher: Tensor) -> str:
    """Describe an adapter for ``kdgraft check``."""
    resized = student.ndim == 4 and student.shape[-2:] != teacher.shape[-2:]
    return f"{type(adapter).__name__} {adapter.extra_repr()}".strip() + (", resize" if resized else "")


def resize_to(maps: Tensor, size: Sequence[int], *, align_corners: bool = False) -> Tensor:
    """Resize maps ``(B, C, H, W)`` bilinearly to ``size``; a tensor of that size is returned unchanged."""
    if maps.shape[-2:] == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=align_corners)
