"""A teacher whose outputs are in a store: it is built, so that terms can be wired to it, and never runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.structures import BaseDataElement
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kdgraft.batch import Batch
from kdgraft.engine import Engine
from kdgraft.errors import DistillError, WiringError
from kdgraft.recorder import Recorder
from kdgraft.sources import FeatureTeacher, KnownRecording, Teacher
from kdgraft.store import Index, Store
from kdgraft.taps import Recording, Tap
from kdgraft.trees import put_together

from .replaying import VIEW
from .views import image_sizes

Size = tuple[int, int]
KIND = "views"
PRINTS, SIZES, ERRORS = "prints", "sizes", "errors"
"""The columns of a part beside the keys: a print of each view, the padded size of its batch, the error of each tap's numbers."""
CELLS = 4
FIXED, IMAGE = "fixed", "image"
"""Axes of a stored tensor: of the same length in every batch, or of the images; others are ``["height" | "width", stride]``."""


def key_of(sample: BaseDataElement) -> NDArray[np.uint8]:
    """Return the key ``(16,)`` of an image in a view: a hash of the pass, the image's number in the data set and its file's name.

    Raises:
        DistillError: the sample does not tell its view.
    """
    found = sample.metainfo.get(VIEW)
    if found is None:
        raise DistillError(
            "the teacher's outputs are stored by views that can be replayed; add custom_hooks = [dict(type='ReplayViews')], "
            "as kdgraft train does by itself"
        )
    told = f"{found[0]}/{found[1]}/{Path(str(sample.metainfo.get('img_path', ''))).name}"
    return np.frombuffer(hashlib.blake2b(told.encode(), digest_size=16).digest(), np.uint8)


def prints_of(view: Tensor, sizes: Sequence[Size]) -> Tensor:
    """Return a print of each image ``(B, 16 · C)``: the mean of its channels in 4 × 4 cells, by which a view is recognised."""
    found = [
        F.adaptive_avg_pool2d(image[None, :, :height, :width].float(), CELLS).flatten()
        for image, (height, width) in zip(view, sizes, strict=True)
    ]
    return torch.stack(found).cpu()


class ViewStore:
    """The outputs of a teacher's taps by image and view.

    Args:
        folder: a complete store.
        name: the name of the teacher in messages.

    Raises:
        DistillError: there is none, it is of another kind, or a part is missing.
    """

    def __init__(self, folder: str | Path, name: str) -> None:
        self.files, self.name = Store(folder), name
        self.about = self.files.about
        if self.about.get("kind") != KIND:
            raise DistillError(f"{name}: the store in {folder} is of another kind; fill one with kdgraft cache CONFIG")
        self.index = Index(self.files, checked=False)

    def look_up(self, view: Tensor, samples: Sequence[BaseDataElement], taps: Sequence[Tap]) -> KnownRecording:
        """Return the recording of a batch.

        Args:
            view: the teacher's batch ``(B, C, H, W)``.
            samples: the data samples, with their views.
            taps: the taps.

        Raises:
            DistillError: an image is not there in this view, its pixels are others, a tap is not there, or a part is damaged.
        """
        places = self.index.places(np.stack([key_of(sample) for sample in samples]))
        for place, sample in zip(places, samples, strict=True):
            if place < 0:
                raise DistillError(self._absent(sample))
        found = [self.index.of(int(place))[:2] for place in places]
        self._compare(view, samples, found)
        padded = (view.shape[-2], view.shape[-1])
        values = {}
        for tap in taps:
            told = self._told(tap)
            leaves = [self._leaf(str(tap), leaf, one, found, padded) for leaf, one in enumerate(told["leaves"])]
            if told["structure"] is not None:
                values[tap] = put_together(told["structure"], [leaf.to(view.device) for leaf in leaves])
        return KnownRecording(values)

    def _told(self, tap: Tap) -> Mapping[str, Any]:
        told: Mapping[str, Any] | None = self.about["taps"].get(str(tap))
        if told is None:
            raise DistillError(
                f"{self.name}: the store in {self.files.folder} has {', '.join(self.about['taps'])} of the teacher, not {tap}; fill it "
                "with the terms that you train with"
            )
        return told

    def _absent(self, sample: BaseDataElement) -> str:
        view, index = sample.metainfo[VIEW]
        who = f"image {sample.metainfo.get('img_path', index)} in view {view}"
        if view >= self.about["views"]:
            return (
                f"{self.name}: the store in {self.files.folder} has {self.about['views']} views of each image, and this is number "
                f"{view + 1}; set ReplayViews' views={self.about['views']}, or fill it with more (--epochs)"
            )
        return f"{self.name}: the store in {self.files.folder} has no outputs for {who}: it was filled from another data set"

    def _compare(self, view: Tensor, samples: Sequence[BaseDataElement], found: Sequence[tuple[int, int]]) -> None:
        """Refuse views of other pixels than those that the teacher saw."""
        stored = np.concatenate([self.files.rows(part, PRINTS, row, row + 1) for part, row in found])
        ours = prints_of(view, image_sizes(samples)).numpy()
        for sample, mine, theirs in zip(samples, ours, stored, strict=True):
            if mine.shape != theirs.shape or np.abs(mine - theirs).max() > 1e-3 * max(np.abs(theirs).max(), 1e-3):
                raise DistillError(
                    f"{self.name}: image {sample.metainfo.get('img_path', '')} in view {sample.metainfo[VIEW][0]} has other pixels "
                    f"than the teacher saw: the pipeline is another one, or the seed of ReplayViews, than those that filled the "
                    f"store in {self.files.folder}; fill it again"
                )

    def _leaf(
        self, tap: str, number: int, told: Mapping[str, Any], found: Sequence[tuple[int, int]], padded: Size
    ) -> Tensor:
        """Return one tensor of a tap for a batch."""
        axes = told["axes"]
        parts = []
        for part, row in found:
            value = self.files.whole(part, f"{row}/{tap}/{number}")
            if value.dtype == np.int8:
                value = value * self.files.whole(part, f"{row}/{tap}/{number}/unit")
            if value.dtype == np.float16:
                value = value.astype(np.float32)
            stored = tuple(int(side) for side in self.files.rows(part, SIZES, row, row + 1)[0])
            parts.append(torch.from_numpy(np.ascontiguousarray(self._fitted(value, axes, stored, padded))))
        return torch.stack(parts, axes.index(IMAGE))

    def _fitted(self, value: NDArray[Any], axes: Sequence[Any], stored: tuple[int, ...], padded: Size) -> NDArray[Any]:
        """Cut or extend the padding of maps, as the batch in which an image was stored may have been padded to another size."""
        if stored == padded:
            return value
        if not self.about["fits"]:
            raise DistillError(
                f"{self.name}: an image was stored in a batch padded to {stored[0]}×{stored[1]} and is now in one of "
                f"{padded[0]}×{padded[1]}, on which this teacher gives other outputs; train with the seed and the batch size of the "
                "store, or bring all images to one size in the pipeline"
            )
        wanted = dict(zip(("height", "width"), padded, strict=True))
        for axis, kind in enumerate(axis for axis in axes if axis != IMAGE):
            if kind != FIXED:
                side = -(-wanted[kind[0]] // kind[1])
                more = [(0, max(side - value.shape[axis], 0) if other == axis else 0) for other in range(value.ndim)]
                value = np.pad(value.take(range(min(side, value.shape[axis])), axis), more)
        return value


class Stored(Teacher):
    """A teacher whose outputs are in a store; neither its weights nor its forward pass are needed.

    Args:
        teacher: the teacher, as it is built from its config, without weights.
        folder: the folder that ``kdgraft cache`` filled.
        identity: what the store's header must say of the teacher; see :func:`kdgraft_mm.sources.identity_of`.
    """

    outputs: ViewStore

    def __init__(self, teacher: Teacher, folder: str, identity: Mapping[str, Any]) -> None:
        vars(self).update(vars(teacher))
        self.folder, self._identity, self.loaded = folder, dict(identity), False

    def load(self) -> None:
        """Open the store, and let go of the model's weights.

        Raises:
            DistillError: there is no complete store, or it is another teacher's.
        """
        if self.loaded:
            return
        outputs = ViewStore(self.folder, self.name)
        told = outputs.about["teacher"]
        differ = sorted(key for key, value in self._identity.items() if told.get(key) != value)
        if differ:
            raise DistillError(
                f"{self.name}: the store in {self.folder} holds the outputs of another teacher ({', '.join(differ)} differs); fill it "
                "again, or name that teacher's config"
            )
        self.outputs, self.meta = outputs, {"classes": told["classes"]}
        _let_go(self.model)
        self.loaded = True

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Move or convert what readers use of the model, which are buffers; its weights stay where they are."""
        if self.class_order is not None:
            self.class_order = function(self.class_order)
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if not buffer.is_meta:
                    module._buffers[name] = function(buffer)

    def record(self, recorder: Recorder, run: Callable[[], Any], batch: Batch, device: torch.device) -> Recording:
        """Look up the outputs; ``run`` returns the teacher's batch and its samples."""
        view, samples = run()
        found = self.outputs.look_up(view, samples, recorder.taps)
        found.model, found.repeats = self.name, isinstance(self, FeatureTeacher)
        return found


class StoredFeatures(Stored, FeatureTeacher):
    """The same for a teacher of features."""


def _let_go(model: nn.Module) -> None:
    """Put parameters, and the statistics of normalisation, on the meta device."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)
        if isinstance(module, _BatchNorm):
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to("meta")


def check_stored(engine: Engine) -> None:
    """Raise a :class:`WiringError` for terms that need a teacher to run whose outputs come from a store."""
    for name, source in engine.sources.items():
        if isinstance(source, Stored):
            check_storable(engine, name, "its outputs come from a store")


def check_storable(engine: Engine, source: str, why: str) -> None:
    """Raise a :class:`WiringError` for terms that need a source which runs.

    Args:
        engine: a wired engine.
        source: the name of the source.
        why: the reason that it does not run, for the message.
    """
    for term in engine.all_terms:
        if source not in engine.members(term.source):
            continue
        runs = term.runs_teacher or term.examines or term.runs_again or term.takes_gradients
        if runs or any(tap.leaf or tap.parameters for tap in term.teacher_taps):
            raise WiringError(
                f"{term.name}: a {type(term).__name__} runs a part of {source!r} in each step, or reads its weights, and {why}; leave out "
                "the store, or take another term"
            )
        if engine.replays(term):
            raise WiringError(
                f"{term.name}: {source!r} would run on the student's proposals, which no store knows, and {why}; leave out the store, or "
                "tap its backbone, neck or RPN"
            )
