"""What a store has of a teacher's outputs on images: their columns, and the header that describes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from kdgraft.batch import Batch
from kdgraft.errors import DistillError
from kdgraft.sources import FeatureTeacher
from kdgraft.store import KEYS, LENGTHS, fingerprint, narrowed, rounded
from kdgraft.taps import Recording, Tap
from kdgraft.trees import taken_apart

from .resolution import samples_padded_to
from .sources import teacher_classes
from .stored import ERRORS, FIXED, IMAGE, KIND, PRINTS, SIZES, check_storable, key_of, prints_of
from .views import image_sizes

Values = Literal["float32", "float16", "int8"]
Batched = tuple[Tensor, Any]
"""Inputs ``(B, C, H, W)`` as the student's data preprocessor returns them, and data samples."""
Columns = dict[str, NDArray[Any]]
MORE = 256
"""By how many pixels an input is extended to see which axes of an output follow it."""


class Writer:
    """Records one teacher of a grafted student on batches, for a store.

    Args:
        model: the grafted student, whose teachers are loaded.
        name: the name of the source.
        values: the type of the numbers.
        autocast: returns the context of a step's forward passes.

    Raises:
        WiringError: a term needs more than the source's own pass gives.
    """

    def __init__(
        self, model: Any, name: str, values: Values, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self._model, self._name, self._values, self._autocast = model, name, values, autocast
        self._engine = model.distiller
        self._source = self._engine.sources[name]
        check_storable(self._engine, name, "a store has nothing but what its own pass gives")
        self._taps: list[Tap] = list(dict.fromkeys(self._engine.taps(name)))
        self._told: dict[str, Any] = {}

    def about(self, batch: Batched, identity: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """Return what the header says of the teacher and its outputs, from a first batch, and the bytes of an image in float32.

        Args:
            batch: the batch, of which the first image is run by itself, twice in a batch, and with more padding on each side.
            identity: see :func:`kdgraft_mm.sources.identity_of`.
        """
        size = self._describe(*self._seen(batch))
        leaves = [leaf for told in self._told.values() for leaf in told["leaves"]]
        classes = teacher_classes(self._source)
        told = {
            "kind": KIND,
            "teacher": {
                **identity,
                "weights": fingerprint(self._source.model),
                "classes": None if classes is None else [str(name) for name in classes],
            },
            "taps": self._told,
            "fits": not isinstance(self._source, FeatureTeacher) and all("irregular" not in leaf for leaf in leaves),
            "values": self._values,
        }
        return told, size

    def rows(self, batch: Batched) -> list[Columns]:
        """Return the entries of each image of a batch, by name, after :meth:`about`."""
        view, samples = self._seen(batch)
        recording = self._record(view, samples)
        padded = np.array(view.shape[-2:], np.int32)
        found: list[Columns] = [
            {KEYS: key_of(sample), PRINTS: one.numpy(), SIZES: padded}
            for sample, one in zip(samples, prints_of(view, image_sizes(samples)), strict=True)
        ]
        errors = np.zeros((len(found), len(self._taps)), np.float32)
        for column, tap in enumerate(self._taps):
            for number, (leaf, kinds) in enumerate(zip(*self._leaves(recording, tap), strict=True)):
                exact = leaf.detach().cpu().movedim(kinds["axes"].index(IMAGE), 0)
                for row, value in enumerate(exact):
                    parts, error = _numbers(value, self._values)
                    errors[row, column] = max(errors[row, column], error)
                    found[row] |= {f"/{tap}/{number}{end}": part for end, part in parts.items()}
        for entry, error_of_taps in zip(found, errors, strict=True):
            entry[ERRORS] = error_of_taps
        return found

    def _leaves(self, recording: Recording, tap: Tap) -> tuple[list[Tensor], list[Any]]:
        """Return the tensors of a tap, and what the header says of each."""
        leaves = taken_apart(recording[tap])[1] if recording.calls(tap) else []
        told = self._told[str(tap)]["leaves"]
        if len(leaves) != len(told):
            raise DistillError(
                f"'{tap}' gives {len(leaves)} tensors here and {len(told)} before, which cannot be stored"
            )
        return leaves, told

    def _seen(self, batch: Batched) -> Batched:
        """Return the source's batch, as it is in training, and its samples."""
        context = self._model.distill_context
        reduced = batch if context.resolution is None else self._model._reduced(*batch, context.resolution)
        found: Batched = context.views[self._name](batch, reduced)
        return found

    def _record(self, view: Tensor, samples: Any) -> Recording:
        def run(_: Any) -> Any:
            return self._model._raw_outputs(self._source.model, view, samples)

        with self._autocast(), torch.no_grad():
            return self._engine.record(self._name, run, Batch(), view.device)  # type: ignore[no-any-return]

    def _describe(self, view: Tensor, samples: Any) -> int:
        """Find the structure of each tap's value and the axes of its tensors; return the bytes of an image."""
        view, samples = view[:1], list(samples[:1])

        def on(images: Tensor, copies: int = 1) -> Recording:
            return self._record(images, samples_padded_to(samples * copies, (images.shape[-2], images.shape[-1])))

        alone, twice = on(view), on(view.repeat(2, 1, 1, 1), 2)
        taller, wider = on(F.pad(view, (0, 0, 0, MORE))), on(F.pad(view, (0, MORE)))
        size = 0
        for tap in self._taps:
            structure, leaves = taken_apart(alone[tap]) if alone.calls(tap) else (None, [])
            others = [taken_apart(found[tap])[1] if found.calls(tap) else [] for found in (twice, taller, wider)]
            told = [
                _axes(str(tap), [tuple(leaf.shape) for leaf in four], (view.shape[-2], view.shape[-1]))
                for four in zip(leaves, *others, strict=True)
            ]
            self._told[str(tap)] = {"structure": structure, "leaves": told}
            size += sum(leaf.numel() * 4 for leaf in leaves)
        return size


def _axes(tap: str, shapes: Sequence[tuple[int, ...]], padded: tuple[int, int]) -> dict[str, Any]:
    """Return which axis of a tensor is that of images, and which follow the height or the width of the input.

    Args:
        tap: the tap, for messages.
        shapes: the tensor's shape for one image, for two, for a taller and for a wider input.
        padded: the size of the first input.
    """
    alone, twice, taller, wider = shapes
    images = [axis for axis, (one, two) in enumerate(zip(alone, twice, strict=False)) if two == 2 * one]
    if len({len(shape) for shape in shapes}) > 1 or len(images) != 1 or alone[images[0]] != 1:
        raise DistillError(
            f"'{tap}' gives {alone} for one image and {twice} for two, which has no axis of images and cannot be stored; leave out the "
            "term, or let the teacher run"
        )
    axes: list[Any] = [IMAGE if axis == images[0] else FIXED for axis in range(len(alone))]
    regular = True
    for kind, other, side in (("height", taller, padded[0]), ("width", wider, padded[1])):
        for axis, (before, after) in enumerate(zip(alone, other, strict=True)):
            if before == after:
                continue
            stride = MORE // max(after - before, 1)
            if axes[axis] != FIXED or stride * (after - before) != MORE or -(-side // stride) != before:
                regular = False
            else:
                axes[axis] = [kind, stride]
    return {"axes": axes} if regular else {"axes": axes, "irregular": True}


def _numbers(value: Tensor, values: Values) -> tuple[dict[str, NDArray[Any]], float]:
    """Return the entries for one tensor, and the relative error of its numbers."""
    if not value.is_floating_point():
        return {"": value.numpy()}, 0.0
    exact = value.float().numpy()
    if values == "int8":
        whole, unit = rounded(exact)
        return {"": whole, "/unit": unit}, _error(exact, whole * unit)
    kept = narrowed(exact, values)
    return {"": kept}, 0.0 if values == "float32" else _error(exact, kept.astype(np.float32))


def _error(exact: NDArray[np.float32], kept: NDArray[np.float32]) -> float:
    size = float(np.linalg.norm(exact))
    return float(np.linalg.norm(exact - kept)) / size if size > 0 else 0.0


def columns_of(rows: Sequence[Columns]) -> Columns:
    """Return the columns of a part, from the entries of each image."""
    found = {name: np.stack([row[name] for row in rows]) for name in (KEYS, PRINTS, SIZES, ERRORS)}
    found[LENGTHS] = np.zeros(len(rows), np.int64)
    for place, row in enumerate(rows):
        found |= {f"{place}{name}": value for name, value in row.items() if name.startswith("/")}
    return found
