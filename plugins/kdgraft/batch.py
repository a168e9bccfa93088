"""Batches: what regions, readers and terms may know of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from .taps import Tap

T = TypeVar("T")


@dataclass(frozen=True)
class Samples:
    """Which samples a batch holds, for teachers whose outputs are kept.

    Attributes:
        ids: what tells them apart, the same in every epoch.
        inputs: what the teacher is given of the batch, so that other inputs under one id are noticed.
    """

    ids: Sequence[Any]
    inputs: dict[str, Tensor]


@dataclass
class Batch:
    """What regions and terms may know of a batch. Pixels are those of the padded network input.

    Attributes:
        padded_size: (height, width) of the network input, or ``None`` where there is no such thing.
        image_sizes: per image its (height, width) inside the padded input, top left; ``None`` when nothing is padded.
        boxes: per image ``(n, 4)`` as x1, y1, x2, y2; ``None`` when the host has none.
        labels: whatever the host calls labels: per image ``(n,)``, or one tensor; ``(B, H, W)`` classes of pixels.
        valid: ``(B, H, W)``, true for pixels that are neither ignored nor padding; ``None`` when the host has no such thing.
        tokens: ``(B, L)``, true for the tokens of sequences that are not padding; ``None`` when the host has no such thing.
        samples: which samples the batch holds; ``None`` when the host has no such thing.
        extra: anything that only one host's terms look at.
    """

    padded_size: tuple[int, int] | None = None
    image_sizes: Sequence[tuple[int, int]] | None = None
    boxes: Sequence[Tensor] | None = None
    labels: Any = None
    valid: Tensor | None = None
    tokens: Tensor | None = None
    samples: Samples | None = None
    extra: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """What ``make`` gives, made once a batch for a key; what it reads of a recording puts ``recording.model`` in the key."""
        if key not in self.extra:
            self.extra[key] = make()
        found: T = self.extra[key]
        return found

    def at(self, tap: Tap, feature: Tensor) -> Batch:
        """Return the batch as it looks where ``feature`` was tapped; for hosts whose models hold several sequences.

        Raises:
            WiringError: the host cannot tell which positions of ``feature`` are padding.
        """
        return self
