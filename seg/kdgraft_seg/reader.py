"""Reader of segmentors: class scores and features of the decode head, on a common grid, at the pixels that count."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.segmentors import DepthEstimator
from torch import Tensor, nn

from kdgraft.adapters import resize_to
from kdgraft.batch import Batch
from kdgraft.errors import DistillError, WiringError
from kdgraft.pairs import Compared, Pairs, Scores
from kdgraft.readers import Reader, Taps, common_width, in_students_order, paired, parse_taps
from kdgraft.regions import on_grid
from kdgraft.sources import Extractor
from kdgraft.taps import Recording, Tap
from kdgraft.wiring import Wiring
from kdgraft_hosts import SEG

LOGITS = "decode_head"
EMBEDDINGS = "decode_head.cls_seg():input"
"""The input features of the classifier, before its dropout."""

Grid = Literal["teacher", "labels"]
# Heads that return several maps, some only in training -> the index of the map with the final class scores.
_MAIN_OUTPUT = {"PIDHead": 1, "DDRHead": 0, "EncHead": 0, "DAHead": 0, "IterativeDecodeHead": -1}


def main_head(model: Any) -> Any:
    """Return the decode head, or the last one of a cascade; ``None`` for a model that has none."""
    head = getattr(model, "decode_head", None)
    return head[-1] if isinstance(head, nn.ModuleList) else head


def scores_pixels(model: Any) -> bool:
    """Return true for a segmentor that predicts classes of pixels; a depth estimator does not, and has no label to ignore."""
    return not isinstance(model, DepthEstimator) and hasattr(main_head(model), "ignore_index")


def reads_scores(tap: Tap) -> bool:
    """Return true for a tap of a decode head's output."""
    return re.fullmatch(r"decode_head(\.\d+)?", tap.path) is not None and tap.method == "forward" and not tap.input


class SegReader(Reader):
    """Reads the decode heads of two segmentors. Its taps refer to the last head of a cascade."""

    default_taps: ClassVar = {
        "features": "backbone[-1]",
        "scores": LOGITS,
        "embeddings": EMBEDDINGS,
        "samples": "backbone[-1]",
        "images": "backbone:input",
    }
    lacks: ClassVar = SEG.lacks
    no_specialists = "they know classes of whole samples, and a segmentor scores pixels"
    names_losses = True

    def __init__(self, student: nn.Module, teacher: nn.Module, term: str) -> None:
        super().__init__(student, teacher, term)
        models = {"student": student, "teacher": teacher}
        if isinstance(teacher, Extractor):  # its features are read as they are
            del models["teacher"]
        for side, model in models.items():
            head = main_head(model)
            if not isinstance(head, BaseDecodeHead):
                raise WiringError(
                    f"{term}: the {side}'s {type(head).__name__} returns no map of class scores; distilling needs a "
                    "segmentor whose head scores every pixel"
                )
        self.heads = {side: type(main_head(model)).__name__ for side, model in models.items()}
        self.corners = {side: bool(main_head(model).align_corners) for side, model in models.items()}
        self._indices = {side: getattr(main_head(model), "in_index", -1) for side, model in models.items()}
        self.no_classes = [(side, type(model).__name__) for side, model in models.items() if not scores_pixels(model)]
        self.reading = _MAIN_OUTPUT.get(self.heads.get("teacher", "")), self.corners.get("teacher")

    def settle(self, tap: Tap, model: Any) -> Tap:
        """Return the tap of the last head of a cascade for a default tap of the decode head."""
        if tap.text not in (LOGITS, EMBEDDINGS) or not isinstance(getattr(model, "decode_head", None), nn.ModuleList):
            return tap
        return Tap.parse(tap.text.replace("decode_head", f"decode_head.{len(model.decode_head) - 1}"))

    def tensors(self, recording: Recording, tap: Tap) -> list[Tensor]:
        """Return the tapped tensors; of a head with several outputs only the final class scores."""
        if reads_scores(tap):
            return self._scores(recording, tap)
        if tap.method == "cls_seg" and not recording.calls(tap):
            owner = recording.owner
            index = self._indices[owner]
            last = index[-1] if isinstance(index, (list, tuple)) else index
            raise WiringError(
                f"{self.term}: the {owner}'s {self.heads[owner]} does not call cls_seg(), where '{tap}' reads; set {owner}_tap="
                f"'{tap.path}:input[{last}]' (a recipe's terms are printed by 'kdgraft list', to be edited)"
            )
        return super().tensors(recording, tap)

    def _scores(self, recording: Recording, tap: Tap) -> list[Tensor]:
        """Return the final class scores among a head's outputs."""
        value, head = recording[tap], self.heads.get(recording.owner, "")
        if isinstance(value, (tuple, list)) and not tap.index and head in _MAIN_OUTPUT:
            return [value[_MAIN_OUTPUT[head]]]
        if not isinstance(value, (Tensor, tuple, list)):
            raise WiringError(
                f"{self.term}: '{tap}' of the {recording.owner} ({head}) yields a {type(value).__name__}, no map of class "
                "scores; this term needs a head that scores every pixel"
            )
        return super().tensors(recording, tap)

    def reads_scores(self, tap: Tap) -> bool:
        return reads_scores(tap)

    def align_corners(self, tap: Tap) -> bool:
        """Return true for class scores of a student whose head aligns corners."""
        return reads_scores(tap) and self.corners["student"]

    def check_classes(self, student: Tensor, teacher: Tensor, student_tap: Tap, teacher_tap: Tap) -> None:
        for side, kind in self.no_classes:
            raise WiringError(
                f"{self.term}: the {side}, a {kind}, scores no classes of pixels; distil features "
                "(FeatureImitation with tap='backbone[*]')"
            )
        if student.shape[1] != teacher.shape[1]:
            raise WiringError(
                f"{self.term}: the student's {student_tap} scores {student.shape[1]} classes, the teacher's {teacher_tap} "
                f"{teacher.shape[1]}; class scores are compared class by class: use a teacher of the same classes, or a term on "
                "features"
            )

    def scores(  # type: ignore[override]  # each host has settings of its own
        self, student: nn.Module, teacher: nn.Module, *, tap: Taps = LOGITS, grid: Grid = "teacher"
    ) -> Scores:
        """Return the reader of the pixels' class scores.

        Args:
            student: the student.
            teacher: the teacher.
            tap: the scores ``(B, C, H, W)``; by default the decode head's.
            grid: the common grid. ``"teacher"`` resizes the student's scores to the teacher's grid, on which a position counts if
                the pixel at its centre does. ``"labels"`` resizes both to the labels' grid, as the host does for its own loss.
                Both resize like the host: bilinear, with the head's own ``align_corners``.
        """
        if grid not in ("teacher", "labels"):
            raise DistillError(f"{self.term}: grid must be 'teacher' or 'labels', got {grid!r}")
        taps = parse_taps(tap)
        sides = [self.settle(tap, student) for tap in taps], [self.settle(tap, teacher) for tap in taps]
        return PixelScores(self, sides, grid)


class PixelScores(Scores):
    """Class scores ``(B, C, H, W)`` of both models on one grid; ignored pixels and padding do not count."""

    def __init__(self, reader: SegReader, taps: tuple[Sequence[Tap], Sequence[Tap]], grid: Grid) -> None:
        self.reader, self.taps, self.grid, self.reading = reader, taps, grid, reader.reading

    def wire(self, wiring: Wiring) -> list[Compared]:
        """Return the compared scores, and refuse tensors that are not maps of the same classes."""
        found = []
        for s, t, s_tap, t_tap in paired(self.reader, self.taps, wiring.student_recording, wiring.teacher_recording):
            if s.ndim != 4 or t.ndim != 4:
                raise WiringError(
                    f"{self.reader.term}: student {s_tap} {tuple(s.shape)} and teacher {t_tap} {tuple(t.shape)} must be class "
                    "scores (B, C, H, W)"
                )
            self.reader.check_classes(s, t, s_tap, t_tap)
            self.independent = s.shape[1] == 1
            resized = s.shape[-2:] != t.shape[-2:] or self.grid == "labels"
            found.append(Compared(s, t, (s_tap, t_tap), "all", "resize" if resized else "–"))
        self.width = common_width([compared.student for compared in found])
        return found

    def pairs(self, student: Recording, teacher: Recording, batch: Batch) -> list[Pairs]:
        """Return the aligned class scores of a step, one entry a tap, 0 where a pixel does not count."""
        found = []
        for s, t in in_students_order(self.reader, self.taps, student, teacher):
            size = t.shape[-2:] if self.grid == "teacher" else batch.labels.shape[-2:]
            s = resize_to(s, size, align_corners=self.reader.corners["student"])
            t = resize_to(t, size, align_corners=self.reader.corners["teacher"])
            valid = counted(batch, size)
            # A pixel that does not count must not reach the gradient, not even with an infinity (0 · inf is NaN).
            outside = ~valid[:, None]
            both = s.masked_fill(outside, 0), t.masked_fill(outside, 0)
            labels = on_grid(batch.labels, size).masked_fill(~valid, -100) if self.needs_labels else None
            found.append(Pairs(*both, weight=valid, dim=1, independent=s.shape[1] == 1, labels=labels))
        return found


def counted(batch: Batch, size: Sequence[int]) -> Tensor:
    """Return the mask ``(B, H, W)`` of a grid's positions whose centre pixel is neither ignored nor padding."""
    assert batch.valid is not None
    return on_grid(batch.valid, size)


def labels_on(batch: Batch, size: Sequence[int]) -> Tensor:
    """Return the labels ``(B, H, W)`` on a grid, -1 where a position does not count."""
    return on_grid(batch.labels, size).masked_fill(~counted(batch, size), -1)
