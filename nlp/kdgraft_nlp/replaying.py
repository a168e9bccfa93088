"""Random numbers of the training data, which a resumed epoch draws as the first run did: the order of samples, masks, crops."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_pt_utils import safe_globals

from kdgraft.training import random_state, set_random_state

if TYPE_CHECKING:
    _Host = Trainer
else:
    _Host = object

KEY = "data"
"""The entry that :class:`Replaying` adds to the file of random states in a checkpoint; the plain Trainer reads past it."""

AHEAD = 1000
"""The number of states of batches that are kept at most, for loops of one's own, which do not say what they train on."""


def _now() -> Mapping[str, Any]:
    """Return the random state that data is drawn with: the CPU's."""
    return random_state(cuda=False)


class Draws:
    """The batch sampler of a training loader, with a record of the random states before each draw of an epoch.

    Samplers such as that of ``train_sampling_strategy="group_by_length"`` draw the order of an epoch from the global random state,
    and so do masking collators and random transforms for each batch. The Trainer restores that state after it has drawn both,
    so that a resumed epoch has other samples than the first run. The record is enough to draw them again.

    Args:
        inner: the batch sampler.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.passed = False
        """True once a resumed epoch has drawn all that the first run had drawn."""
        self._order: Mapping[str, Any] | None = None
        self._ahead: deque[tuple[int, Mapping[str, Any]]] = deque(maxlen=AHEAD)
        self._taken = 0
        self._again: Mapping[str, Any] | None = None
        self._replays = False

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Iterator[Any]:
        again, self._again = self._again, None
        self._replays = again is not None
        if again is not None:
            set_random_state(again["order"])
        self._order, self._taken = _now(), 0 if again is None else again["taken"]
        self._ahead.clear()
        first = self._taken
        for index, batch in enumerate(self.inner):
            if again is not None and self._replays and index >= first:
                self._draw_again(index - first, again)
            if index >= first:
                self._ahead.append((index, _now()))
            yield batch

    def _draw_again(self, place: int, again: Mapping[str, Any]) -> None:
        """Go to the state before a batch, which is the ``place``-th that the stopped run had not trained on yet."""
        if place < len(again["ahead"]):
            set_random_state(again["ahead"][place])
        else:
            set_random_state(again["then"])
            self.passed, self._replays = True, False

    def take(self, count: int) -> None:
        """Count batches that are trained on."""
        self._taken += count
        while self._ahead and self._ahead[0][0] < self._taken:
            self._ahead.popleft()

    def record(self) -> Mapping[str, Any] | None:
        """Return what a resumed epoch needs: the states before its order, before the batches that are drawn ahead, and now."""
        if self._order is None:
            return None
        ahead = [state for _, state in self._ahead]
        return {"order": self._order, "ahead": ahead, "taken": self._taken, "then": _now()}

    def replay(self, record: Mapping[str, Any]) -> None:
        """Draw the next epoch as a stopped run did, from what :meth:`record` returned there."""
        self._again, self.passed = record, False

    def go_on(self) -> None:
        """Draw from the present state, whatever the stopped run had drawn: the first batches are there."""
        self._replays = False


class Replaying(_Host):
    """The mixin before a Trainer class with which a run that is resumed within an epoch sees the data of one that never stopped.

    Runs that are not resumed draw as with the Trainer alone. Left as they are: sets without a length, and what workers of a loader
    draw (``dataloader_num_workers``), whose random states are their own.
    """

    _to_replay: str | None = None
    """The checkpoint whose epoch is to be drawn again."""

    def train(self, *args: Any, **settings: Any) -> Any:
        """Train as the host does."""
        self._to_replay = None
        return super().train(*args, **settings)

    def get_train_dataloader(self) -> DataLoader:
        """Return the host's loader, whose draws are recorded."""
        loader = super().get_train_dataloader()
        base: Any = getattr(loader, "base_dataloader", loader)
        sampler = getattr(base, "batch_sampler", None)
        if sampler is not None and not isinstance(sampler, Draws) and not hasattr(base, "state_dict"):
            vars(base)["batch_sampler"] = Draws(sampler)  # a DataLoader refuses to have it set
        return loader

    def _draws(self) -> Draws | None:
        found = getattr(self.callback_handler.train_dataloader, "batch_sampler", None)
        return found if isinstance(found, Draws) else None

    def get_batch_samples(self, *args: Any, **settings: Any) -> Any:
        """Fetch the micro-batches of a step; the first ones after resuming within an epoch as the stopped run did."""
        draws, (folder, self._to_replay) = self._draws(), (self._to_replay, None)
        if draws is not None and folder is not None and not self.args.ignore_data_skip:
            record = self._random_states(folder).get(KEY)
            if record:
                draws.replay(record)
        found = super().get_batch_samples(*args, **settings)
        if draws is not None:
            draws.take(len(found[0]))
        return found

    def _random_file(self, folder: str) -> Path:
        process = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
        return Path(folder) / f"rng_state{process}.pth"

    def _random_states(self, folder: str) -> dict[str, Any]:
        file = self._random_file(folder)
        if not file.is_file():
            return {}
        with safe_globals():
            return dict(torch.load(file, weights_only=True))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        draws = self._draws()
        record = None if draws is None else draws.record()
        if record is not None:
            torch.save({**self._random_states(output_dir), KEY: record}, self._random_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        draws = self._draws()
        # Where an epoch begins the host comes here before its first batch: nothing is to be drawn again.
        self._to_replay = None
        ahead = _now() if draws is not None and draws.passed else None
        super()._load_rng_state(checkpoint)
        if ahead is not None:
            set_random_state(ahead)
        elif draws is not None:
            draws.go_on()
