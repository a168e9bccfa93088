"""Further passes of a term's models on other inputs within its step, for terms that search for inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .isolation import own_random_stream
from .recorder import Recorder
from .sources import Source
from .taps import Recording

RunOn = Callable[[nn.Module, Tensor], Any]
"""Runs a model of the host on other inputs alone, without labels; see :meth:`kdgraft.Reader.run`."""


class Passes:
    """Runs a term's source and its listener on other inputs. The engine gives it to terms that ask for it, for one step.

    The models run in the modes in which they are: the source in eval mode, the listener in training mode, where normalisation uses
    the statistics of these inputs and adds them to its running statistics. Random numbers that they draw change nothing outside.

    Args:
        run: runs a model of the host on inputs.
        source: the source, whose model does not train.
        listener: the model that learns.
        recorders: the recorders of (source, listener).
        device: the device of the step.
    """

    def __init__(
        self,
        run: RunOn,
        source: Source,
        listener: nn.Module,
        recorders: tuple[Recorder, Recorder],
        device: torch.device,
    ) -> None:
        self._run, self._source, self._listener = run, source, listener
        self._recorders, self._device = recorders, device

    def of_source(self, inputs: Tensor) -> Recording:
        """Return the source's recording on other inputs; by the inputs it can be differentiated where they require a gradient."""
        model = self._source.model
        with own_random_stream(), self._source.context(self._device.type), self._recorders[0].record(model) as found:
            self._run(model, inputs)
        return self._source.marked(found).heard_as("teacher")

    def of_listener(self, inputs: Tensor) -> Recording:
        """Return the listener's recording on other inputs, through which it learns."""
        with own_random_stream(), self._recorders[1].record(self._listener) as found:
            self._run(self._listener, inputs)
        return found.heard_as("student")
