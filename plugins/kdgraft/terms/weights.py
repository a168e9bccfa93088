"""Terms on weights, which are read while the modules that own them run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..balance import Weight
from ..batch import Batch
from ..errors import DistillError, WiringError
from ..losses import Ratio, weight_matching
from ..losses.reduction import upcast
from ..registry import TERMS
from ..taps import Recording, Tap
from ..wiring import Wiring
from .base import Taps, Term, check_choice


class WeightMap(nn.Module):
    """Learned linear map between weights of two widths, one matrix for the outputs and one for the inputs.

    Shapes: ``(O_t, I_t, …) -> (O_s, I_s, …)``, or ``(O_t,) -> (O_s,)``. It starts by cutting off the outputs and inputs beyond the
    student's, or by adding zeros. A side whose sizes agree has no matrix.
    """

    def __init__(self, teacher: torch.Size, student: torch.Size) -> None:
        super().__init__()
        sizes = list(zip(student[:2], teacher[:2], strict=True))
        self.outputs = nn.Parameter(torch.eye(*sizes[0])) if sizes[0][0] != sizes[0][1] else None
        apart = len(sizes) > 1 and sizes[1][0] != sizes[1][1]
        self.inputs = nn.Parameter(torch.eye(*sizes[1])) if apart else None

    def forward(self, weight: Tensor) -> Tensor:
        """Map the teacher's weight to the student's shape."""
        weight = upcast(weight)
        if self.outputs is not None:
            weight = torch.tensordot(self.outputs.to(weight.dtype), weight, dims=1)
        if self.inputs is not None:
            weight = torch.tensordot(weight, self.inputs.to(weight.dtype), dims=([1], [1])).movedim(-1, 1)
        return weight


@TERMS.register
class WeightMatching(Term):
    """Squared distance of the student's weights to the teacher's, or to a learned linear map of them where shapes differ.

    The weights of a module, and of all modules in it, are compared by name. They are read when the module runs, so that it must run
    in both models; the teacher runs no further than to its last module. The loss is a sum over all weights, like weight decay, and
    does not depend on the batch. No weight is published for a teacher and a student of two sizes; with a teacher from which the
    student started, this is L2-SP (Li et al. 2018, arXiv 1802.01483), whose α is twice this weight and chosen by validation.

    Weights that are sharded (FSDP) are refused, and so are those of a class output whose classes stand in another order than the
    student's, where the host knows it. To start from the teacher's weights, see :func:`kdgraft.inherit`.

    Args:
        modules: one path of a module or several, in both models.
        student_modules, teacher_modules: the paths in each model, where they differ.
        adapter: ``"auto"`` learns a linear map where shapes differ, from the teacher's outputs and inputs to the student's;
            ``"none"`` refuses such weights. Kernel sizes must agree.

    Example:
        >>> term = WeightMatching("conv")
        >>> for row in Distiller(student, teacher, [term], example=images).rows: print(row.student_tap, row.adapter)
        conv.weight WeightMap 8×3×3×3→4×3×3×3
        conv.bias WeightMap 8→4
    """

    def __init__(
        self,
        modules: Taps | None = None,
        *,
        student_modules: Taps | None = None,
        teacher_modules: Taps | None = None,
        adapter: Literal["auto", "none"] = "auto",
        weight: Weight = 0.01,
        **settings: Any,
    ) -> None:
        super().__init__(weight=weight, **settings)
        sides = (("student_modules", student_modules), ("teacher_modules", teacher_modules))
        self.student_taps, self.teacher_taps = (_taps(side, modules if own is None else own) for side, own in sides)
        check_choice(self, "adapter", adapter, ("auto", "none"))
        self.adapter = adapter
        self.maps = nn.ModuleList()

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        self.student_taps, self.teacher_taps = (
            [self.reader.settle(tap, model) for tap in taps]
            for taps, model in ((self.student_taps, student), (self.teacher_taps, teacher))
        )

    def wire(self, wiring: Wiring) -> None:
        for (name, ours), (other, theirs) in self._weights(wiring.student_recording, wiring.teacher_recording):
            self._check(name, ours, other, theirs)
            same = ours.shape == theirs.shape
            self.maps.append((nn.Identity() if same else WeightMap(theirs.shape, ours.shape)).to(ours.device))
            shapes = ("×".join(map(str, shape)) for shape in (theirs.shape, ours.shape))
            label = "–" if same else "WeightMap " + "→".join(shapes)
            self.rows.append(self.row(ours, theirs, taps=(Tap.parse(name), Tap.parse(other)), adapter=label))

    def _check(self, name: str, ours: Tensor, other: str, theirs: Tensor) -> None:
        """Raise a :class:`WiringError` unless the term can compare two weights."""
        shapes = (
            f"{self.name}: the student's {name} {tuple(ours.shape)} and the teacher's {other} {tuple(theirs.shape)}"
        )
        for weight in (ours, theirs):
            if not weight.is_floating_point():
                raise WiringError(
                    f"{shapes} cannot be compared, as one is {weight.dtype} (quantised); leave the module out"
                )
        if ours.ndim != theirs.ndim or ours.shape[2:] != theirs.shape[2:] or not ours.ndim:
            raise WiringError(f"{shapes} are of different kinds of layers or kernel sizes; name modules that are alike")
        if self.adapter == "none" and ours.shape != theirs.shape:
            raise WiringError(f"{shapes} differ; use adapter='auto', which learns a map")

    def _weights(self, student: Recording, teacher: Recording) -> list[tuple[tuple[str, Tensor], tuple[str, Tensor]]]:
        """Return the weights of both models in pairs, each with its name; raise a :class:`WiringError` if one has no partner."""
        left, right = (
            [(tap, found) for tap in taps for found in _listed(recording[tap])]
            for recording, taps in ((student, self.student_taps), (teacher, self.teacher_taps))
        )
        if len(left) != len(right):
            raise WiringError(
                f"{self.name}: {len(left)} modules of the student, and {len(right)} of the teacher; name as many"
            )
        pairs = []
        for (s_tap, ours), (t_tap, theirs) in zip(left, right, strict=True):
            for key in {**ours, **theirs}:
                if key not in ours or key not in theirs:
                    sides = [f"'{s_tap.path}' of the student", f"'{t_tap.path}' of the teacher"]
                    lacking, other = sides if key not in ours else sides[::-1]
                    raise WiringError(
                        f"{self.name}: {lacking} has no weight '{key}', which {other} has; name modules that are alike"
                    )
                pairs.append(((_joined(s_tap, key), ours[key]), (_joined(t_tap, key), theirs[key])))
        if not pairs:
            paths = ", ".join(f"'{tap.path}'" for tap in self.student_taps)
            raise WiringError(f"{self.name}: {paths} of the student has no weights; name a module that has some")
        return pairs

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        pairs = self._weights(student, teacher)
        with torch.autocast(pairs[0][0][1].device.type, enabled=False):
            mapped = [convert(theirs) for convert, (_, (_, theirs)) in zip(self.maps, pairs, strict=True)]
            value = weight_matching([ours for (_, ours), _ in pairs], mapped)
        return Ratio(value, value.new_ones(()))


def _taps(side: str, paths: Taps | None) -> list[Tap]:
    if not paths:
        raise DistillError(
            f"WeightMatching needs modules, or both student_modules and teacher_modules; {side} is missing"
        )
    if not isinstance(paths, (str, list, tuple)):
        raise DistillError(f"WeightMatching: modules must be the path of a module or a list of paths, got {paths!r}")
    return [Tap.parse(f"{path}:parameters") for path in ([paths] if isinstance(paths, str) else paths)]


def _listed(found: Any) -> list[Mapping[str, Tensor]]:
    return found if isinstance(found, list) else [found]


def _joined(tap: Tap, key: str) -> str:
    return f"{tap.path}.{key}" if tap.path else key
