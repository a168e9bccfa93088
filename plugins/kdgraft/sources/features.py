"""A teacher of features: any frozen module, of any library, in its own normalisation, input size and patch grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batch import Batch
from ..errors import DistillError, WiringError, check_number
from ..pixels import Conversion, Normalisation
from ..recorder import Recorder
from ..taps import Recording
from .teacher import Precision, Teacher, load_strictly

Size = tuple[int, int]
Call = Callable[[nn.Module, Tensor, bool], tuple[Any, Sequence[Tensor] | None]]
"""Runs a network on images, given whether its hidden states are asked for; returns its last features, and these or ``None``."""
LAST = "last"
STATES = "hidden_states"


def _plain_call(network: nn.Module, images: Tensor, states: bool) -> tuple[Any, None]:
    return network(images), None


class Extractor(nn.Module):
    """A network of another library, as hosts and recorders see a model.

    Its taps are ``last``, ``hidden_states[i]`` where the library gives these, and the network's own names.

    Args:
        network: the network.
        patch: its stride: both sides of its input are multiples of it, and a token stands for a square of that side.
        prefix: the number of tokens before those of the patches: class and register tokens.
        size: (height, width) of its input; by default the nearest multiples of ``patch`` to the student's padded size.
        convert: converts the images that arrive into its normalisation; ``None`` if they have it.
        call: runs the network.
        channels_last: true if its maps are ``(B, H, W, C)``.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        patch: int = 1,
        prefix: int = 0,
        size: Size | None = None,
        convert: Conversion | None = None,
        call: Call | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.last, self.hidden_states = nn.Identity(), nn.Identity()
        self.patch, self.prefix, self.size, self.channels_last = patch, prefix, size, channels_last
        self.wants_states = False
        self.grid: Size = (0, 0)
        self._convert, self._call = convert, call or _plain_call

    def get_submodule(self, target: str) -> nn.Module:
        """Return a module by its path here or, if there is none, in the network, whose own names are taps as well."""
        try:
            return super().get_submodule(target)
        except AttributeError:
            return self.network.get_submodule(target)

    def input_size(self, padded: Sequence[int]) -> Size:
        """Return (height, width) of the network's input for a batch of this padded size."""
        if self.size is not None:
            return self.size
        height, width = (max(1, round(side / self.patch)) * self.patch for side in padded)
        return height, width

    def forward(self, images: Tensor, *_: Any, **__: Any) -> Any:
        """Return the network's last features of images ``(B, C, H, W)``; what hosts give their own models besides is ignored."""
        if self._convert is not None:
            images = self._convert(images)
        size = self.input_size(images.shape[-2:])
        if tuple(images.shape[-2:]) != size:
            resized = F.interpolate(images.float(), size, mode="bilinear", align_corners=False, antialias=True)
            images = resized.to(images.dtype)
        self.grid = size[0] // self.patch, size[1] // self.patch
        try:
            last, states = self._call(self.network, images, self.wants_states)
        except (DistillError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            said = str(error).partition("\n")[0]
            raise WiringError(
                f"the teacher {type(self.network).__name__} cannot run on {size[0]}×{size[1]} pixels ({type(error).__name__}: {said}); "
                "set size=… where its positions are fixed, or wrap it in a function that takes images alone, type='module'"
            ) from error
        if states is not None and self.wants_states:
            self.hidden_states(list(states))
        return self.last(last)

    def on_grid(self, features: Tensor) -> Tensor:
        """Return a tapped tensor as a map ``(B, C, H, W)``, if it is one or has a token for each patch of the last input.

        Raises:
            WiringError: the tokens are not those of the patch grid.
        """
        if self.channels_last and features.ndim == 4:
            return features.permute(0, 3, 1, 2)
        if features.ndim != 3:
            return features
        height, width = self.grid
        count = features.shape[1] - height * width
        if count not in (0, self.prefix):
            raise WiringError(
                f"the teacher {type(self.network).__name__} gives {features.shape[1]} tokens for an input of "
                f"{height * self.patch}×{width * self.patch}: not {self.prefix} + {height}×{width}; set prefix=… (class and register "
                "tokens) and patch=… (pixels by token), or tap a layer of patches"
            )
        return features[:, count:].transpose(1, 2).unflatten(2, self.grid)


class FeatureTeacher(Teacher):
    """Any frozen module as a teacher of features, in its own normalisation, input size and patch grid.

    Images arrive normalised for the student; they are converted into the module's own normalisation and resized to its input.
    Tokens of patches become maps, which cover the same image as the student's, so that terms compare the two place by place.
    It has no head of the student's kind: terms on predictions refuse it. Without a ``teacher_tap`` a term hears its ``last`` map,
    and one map teaches each of several maps of the student, such as the levels of a pyramid.

    Args:
        network: the module; called with images ``(B, C, H, W)``.
        checkpoint: a file with its weights, read when training starts; ``None`` if it has its weights.
        normalisation: the module's own: ``dict(mean=…, std=…)``, for pixels from 0 to 1, or to 255 with ``pixel_range=255``, in the
            ``order`` ``"rgb"`` or ``"bgr"``.
        images: the normalisation of the images that arrive, in the same form. ``None`` states that they have the module's own, as
            in :class:`~kdgraft.Views`, or where a host converts them.
        patch: the side in pixels of the square that one token or position stands for.
        prefix: the number of tokens before those of the patches.
        size: the side, or (height, width), of its input; by default the nearest multiples of ``patch`` to the student's input.
        load: returns the weights by name, instead of ``checkpoint``.
        call, channels_last: see :class:`~kdgraft.sources.features.Extractor`.
        precision, trusted, safe_types: see :class:`~kdgraft.Teacher`.

    Example:
        >>> patches = nn.Conv2d(3, 16, 4, stride=4)
        >>> vit = FeatureTeacher(
        ...     patches, normalisation=dict(mean=[0.5] * 3, std=[0.5] * 3), images=dict(mean=[0.0] * 3, std=[1.0] * 3), patch=4
        ... )
        >>> for row in Distiller(student, vit, [Hint("conv")], example=images).rows: print(row.teacher_tap, row.teacher_shape)
        last 2×16×2×2
    """

    model: Extractor

    def __init__(
        self,
        network: nn.Module,
        checkpoint: str | Path | None = None,
        *,
        normalisation: Mapping[str, Any] | Normalisation,
        images: Mapping[str, Any] | None,
        patch: int = 1,
        prefix: int = 0,
        size: int | Sequence[int] | None = None,
        load: Callable[[], dict[str, Tensor]] | None = None,
        call: Call | None = None,
        channels_last: bool = False,
        precision: Precision = "inherit",
        trusted: bool = False,
        safe_types: Sequence[Any] = (),
    ) -> None:
        owner = f"the teacher {type(network).__name__}"
        check_number(owner, "patch", patch, 1, whole=True)
        check_number(owner, "prefix", prefix, whole=True)
        own = normalisation
        if not isinstance(own, Normalisation):
            own = Normalisation.read(f"{owner}: normalisation", own)
        self.normalisation = own
        convert = None
        if images is not None:
            convert = Conversion(Normalisation.read(f"{owner}: images", images), own, ("images", owner))
        model = Extractor(
            network,
            patch=patch,
            prefix=prefix,
            size=_size(owner, size, patch),
            convert=convert,
            call=call,
            channels_last=channels_last,
        )
        super().__init__(model, checkpoint, precision=precision, trusted=trusted, safe_types=safe_types)
        self._load = load
        self.loaded = checkpoint is None and load is None

    @property
    def weighed(self) -> nn.Module:
        return self.model.network

    def load(self) -> None:
        if not self.loaded and self._load is not None:
            load_strictly(self.weighed, self._load(), self.told)
            self.loaded = True
        super().load()

    @property
    def told(self) -> str:
        """Where its weights come from."""
        return str(self.checkpoint or getattr(self.model.network, "name_or_path", ""))

    def rehearse(self, recorder: Recorder, run: Callable[[], Any]) -> Recording:
        return self._on_grid(recorder, lambda: super(FeatureTeacher, self).rehearse(recorder, run))

    def record(self, recorder: Recorder, run: Callable[[], Any], batch: Batch, device: torch.device) -> Recording:
        return self._on_grid(recorder, lambda: super(FeatureTeacher, self).record(recorder, run, batch, device))

    def _on_grid(self, recorder: Recorder, record: Callable[[], Recording]) -> Recording:
        self.model.wants_states = any(tap.path == STATES for tap in recorder.taps)
        found = record().mapped(self.model.on_grid)
        found.repeats = True
        return found


def _size(owner: str, size: Any, patch: int) -> Size | None:
    """Return (height, width) of a fixed input; raise a :class:`DistillError` unless it is a whole number of patches."""
    if size is None:
        return None
    sides = tuple(size) if isinstance(size, Sequence) and not isinstance(size, str) else (size, size)
    for side in sides:
        check_number(owner, "size", side, 1, whole=True)
    if len(sides) != 2 or any(side % patch for side in sides):
        raise DistillError(
            f"{owner}: size must be one side or (height, width), in multiples of patch={patch}, got {size!r}"
        )
    return sides
