"""The batch as regions, readers and terms see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from .taps import Tap

T = TypeVar("T")


@dataclass(frozen=True)
class Samples:
    """Identities of the samples in a batch, for teachers whose outputs are cached and for terms that remember samples.

    Attributes:
        ids: one identifier per sample, the same in every epoch.
        inputs: the teacher's inputs, by which the cache detects that an id now stands for other inputs.
    """

    ids: Sequence[Any]
    inputs: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Batch:
    """Facts about a batch for regions and terms. Coordinates are pixels of the padded network input.

    A field is ``None`` where the host does not provide it.

    Attributes:
        padded_size: (height, width) of the network input.
        image_sizes: (height, width) of each image, which lies at the top left of the padded input; ``None`` without padding.
        boxes: ground truth of each image, ``(n, 4)`` as x1, y1, x2, y2.
        labels: the host's labels: ``(n,)`` per image, or one tensor, such as the classes of pixels ``(B, H, W)`` or numbers to
            regress ``(B, D)``.
        valid: ``(B, H, W)``, true for pixels that are neither ignored nor padding.
        tokens: ``(B, L)``, true for tokens that are not padding.
        texts: ``(B, L)``: the number of each token's text in the batch, for rows that hold several texts.
        samples: the identities of the samples.
        extra: values that only the terms of one host read.

    Example:
        >>> batch = Batch(padded_size=(8, 8), boxes=[torch.tensor([[0.0, 0.0, 4.0, 2.0]])])
        >>> batch.once(("areas",), lambda: [(box[:, 2:] - box[:, :2]).prod(1) for box in batch.boxes])
        [tensor([8.])]
    """

    padded_size: tuple[int, int] | None = None
    image_sizes: Sequence[tuple[int, int]] | None = None
    boxes: Sequence[Tensor] | None = None
    labels: Any = None
    valid: Tensor | None = None
    tokens: Tensor | None = None
    texts: Tensor | None = None
    samples: Samples | None = None
    extra: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """Return ``make()``, computed once per batch and key; include ``recording.model`` in the key if it reads a recording."""
        if key not in self.extra:
            self.extra[key] = make()
        found: T = self.extra[key]
        return found

    def at(self, tap: Tap, feature: Tensor, *, owner: str | None = None) -> Batch:
        """Return the batch of the sequence that ``feature`` belongs to, for models that process several sequences.

        Args:
            tap: the tap.
            feature: the tapped tensor.
            owner: ``"student"`` or ``"teacher"``, whose own sequence is meant; ``None`` if position i must be the same for both.

        Raises:
            WiringError: the host cannot tell which positions of ``feature`` are padding.
        """
        return self
