"""What segmentation terms share: where logits and features are read, on which grid they meet, which pixels count."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.segmentors import DepthEstimator
from torch import Tensor, nn

from kdgraft.adapters import resize_to
from kdgraft.errors import DistillError, WiringError
from kdgraft.regions import Batch, on_grid
from kdgraft.taps import Recording, Tap
from kdgraft.terms import Taps, TapTerm, Wiring

LOGITS = "decode_head"
FEATURES = "decode_head.cls_seg():input"
"""What the classifier is given, before its dropout."""

Grid = Literal["teacher", "labels"]
# Heads that return several maps, some only in training: which of them is the one that counts.
_MAIN_OUTPUT = {"PIDHead": 1, "DDRHead": 0, "EncHead": 0, "DAHead": 0, "IterativeDecodeHead": -1}


def main_head(model: Any) -> Any:
    """The decode head, of a cascade the last one."""
    head = model.decode_head
    return head[-1] if isinstance(head, nn.ModuleList) else head


def scores_pixels(model: Any) -> bool:
    """Whether a segmentor predicts the classes of pixels; an estimator of depths predicts none, and knows no label to ignore."""
    return not isinstance(model, DepthEstimator) and hasattr(main_head(model), "ignore_index")


class HeadTerm(TapTerm):
    """Knows the decode heads of both models; its default taps lead to the last head of a cascade."""

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        models = {"student": student, "teacher": teacher}
        for side, model in models.items():
            head = main_head(model)
            if not isinstance(head, BaseDecodeHead):
                raise WiringError(
                    f"{self.name}: the {side}'s {type(head).__name__} returns no map of class scores; distilling needs a "
                    "segmentor whose head scores every pixel"
                )
        self._heads = {side: type(main_head(model)).__name__ for side, model in models.items()}
        self.corners = {side: bool(main_head(model).align_corners) for side, model in models.items()}
        self._indices = {side: getattr(main_head(model), "in_index", -1) for side, model in models.items()}
        self.reading = _MAIN_OUTPUT.get(self._heads["teacher"]), self.corners["teacher"]
        self.student_taps = [_of_last_head(tap, student) for tap in self.student_taps]
        self.teacher_taps = [_of_last_head(tap, teacher) for tap in self.teacher_taps]

    def tensors_of(self, recording: Recording, tap: Tap) -> list[Tensor]:
        if tap.method == "cls_seg" and not recording.calls(tap):
            owner, index = recording.owner, self._indices[recording.owner]
            last = index[-1] if isinstance(index, (list, tuple)) else index
            raise WiringError(
                f"{self.name}: the {owner}'s {self._heads[owner]} does not call cls_seg(), where '{tap}' reads; set {owner}_tap="
                f"'{tap.path}:input[{last}]' (a recipe's terms are printed by 'kdgraft list', to be edited)"
            )
        return super().tensors_of(recording, tap)


def _of_last_head(tap: Tap, model: Any) -> Tap:
    if tap.text not in (LOGITS, FEATURES) or not isinstance(model.decode_head, nn.ModuleList):
        return tap
    return Tap.parse(tap.text.replace("decode_head", f"decode_head.{len(model.decode_head) - 1}"))


def reads_scores(tap: Tap) -> bool:
    """Whether a tap reads what a decode head returns."""
    return re.fullmatch(r"decode_head(\.\d+)?", tap.path) is not None and tap.method == "forward" and not tap.input


class ClassScores(HeadTerm):
    """Knows which of a head's outputs are the class scores, and how the host resizes them."""

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        super().prepare(student, teacher)
        for side, model in (("student", student), ("teacher", teacher)):
            if self.compares_classes and not scores_pixels(model):
                raise WiringError(
                    f"{self.name}: the {side}, a {type(model).__name__}, scores no classes of pixels; distil features "
                    "(FeatureImitation with tap='backbone[*]')"
                )

    def check_classes(self, s: Tensor, t: Tensor, s_tap: Tap, t_tap: Tap) -> None:
        """Raises a :class:`WiringError` unless both score the same number of classes."""
        if s.shape[1] != t.shape[1]:
            raise WiringError(
                f"{self.name}: the student's {s_tap} scores {s.shape[1]} classes, the teacher's {t_tap} {t.shape[1]}; "
                "class scores are compared class by class: use a teacher of the same classes, or a term on features"
            )

    def tensors_of(self, recording: Recording, tap: Tap) -> list[Tensor]:
        if not reads_scores(tap):
            return super().tensors_of(recording, tap)
        value = recording[tap]
        head = self._heads[recording.owner]
        if isinstance(value, (tuple, list)) and not tap.index and head in _MAIN_OUTPUT:
            return [value[_MAIN_OUTPUT[head]]]
        if not isinstance(value, (Tensor, tuple, list)):
            raise WiringError(
                f"{self.name}: '{tap}' of the {recording.owner} ({head}) yields a {type(value).__name__}, no map of class "
                "scores; this term needs a head that scores every pixel"
            )
        return super().tensors_of(recording, tap)


class LogitTerm(ClassScores):
    """Base of the terms that compare class scores pixel by pixel.

    Args:
        tap: the scores ``(B, C, H, W)``; the decode head's by default.
        grid: where student and teacher meet. ``"teacher"``: the student's scores are resized to the teacher's grid, and a
            position counts as the pixel at its centre does. ``"labels"``: both are resized to the labels' grid, as the host
            does for its own loss. Both resize as the host does: bilinear, with the head's own ``align_corners``.
    """

    compares_classes = True
    hears_ensembles = True

    def __init__(self, *, tap: Taps = LOGITS, grid: Grid = "teacher", **settings: Any) -> None:
        super().__init__(tap, **settings)
        if grid not in ("teacher", "labels"):
            raise DistillError(f"{type(self).__name__}: grid must be 'teacher' or 'labels', got {grid!r}")
        self.grid = grid

    def wire(self, wiring: Wiring) -> None:
        for s, t, s_tap, t_tap in self.pairs(wiring.student_recording, wiring.teacher_recording):
            if s.ndim != 4 or t.ndim != 4:
                raise WiringError(
                    f"{self.name}: student {s_tap} {tuple(s.shape)} and teacher {t_tap} {tuple(t.shape)} must be class "
                    "scores (B, C, H, W)"
                )
            self.check_classes(s, t, s_tap, t_tap)
            resized = "resize" if s.shape[-2:] != t.shape[-2:] or self.grid == "labels" else "–"
            self.rows.append(self.row(s, t, taps=(s_tap, t_tap), adapter=resized, region="valid"))

    def aligned(self, student: Recording, teacher: Recording, batch: Batch) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Student's and teacher's scores ``(B, C, H, W)`` on one grid and in one order of classes, with what counts ``(B, H, W)``."""
        found = []
        for s, t in self.scores(student, teacher):
            size = t.shape[-2:] if self.grid == "teacher" else batch.labels.shape[-2:]
            s = resize_to(s, size, align_corners=self.corners["student"])
            t = resize_to(t, size, align_corners=self.corners["teacher"])
            valid = counted(batch, size)
            # Nothing at a pixel that does not count may reach the gradient, not even an infinity (0 · inf is NaN).
            outside = ~valid[:, None]
            found.append((s.masked_fill(outside, 0), t.masked_fill(outside, 0), valid))
        return found


class FeatureTerm(HeadTerm):
    """Base of the terms that compare how each model's features relate to each other: no adapter, any numbers of channels.

    Args:
        tap: maps ``(B, C, H, W)``; what the classifier is given by default. The student's are resized to the teacher's grid.
    """

    needs_labels = False
    """Whether the term groups pixels by their class."""

    def __init__(self, *, tap: Taps = FEATURES, **settings: Any) -> None:
        super().__init__(tap, **settings)

    def wire(self, wiring: Wiring) -> None:
        if self.needs_labels and "labels" not in wiring.fields:
            raise WiringError(
                f"{self.name}: needs classes of pixels, and the student, a {type(wiring.student).__name__}, is trained without; "
                "use FeatureImitation or PairwiseAffinity"
            )
        for s, t, s_tap, t_tap in self.pairs(wiring.student_recording, wiring.teacher_recording):
            if s.ndim != 4 or t.ndim != 4:
                raise WiringError(
                    f"{self.name}: student {s_tap} {tuple(s.shape)} and teacher {t_tap} {tuple(t.shape)} must be maps "
                    "(B, C, H, W), such as the output of a stage"
                )
            resized = "resize" if s.shape[-2:] != t.shape[-2:] else "–"
            self.rows.append(self.row(s, t, taps=(s_tap, t_tap), adapter=resized, region="valid"))

    def aligned(self, student: Recording, teacher: Recording, batch: Batch) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Student's and teacher's maps on the teacher's grid, with what counts there ``(B, H, W)``."""
        return [
            (resize_to(s, t.shape[-2:]), t, counted(batch, t.shape[-2:])) for s, t, _, _ in self.pairs(student, teacher)
        ]


def counted(batch: Batch, size: Sequence[int]) -> Tensor:
    """Which positions of a grid count: true where the pixel at the centre is neither ignored nor padding, ``(B, H, W)``."""
    assert batch.valid is not None
    return on_grid(batch.valid, size)


def labels_on(batch: Batch, size: Sequence[int]) -> Tensor:
    """The labels on a grid, -1 where a position does not count."""
    return on_grid(batch.labels, size).masked_fill(~counted(batch, size), -1)
