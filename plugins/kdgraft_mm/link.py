"""What a grafted student holds beside its engine."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kdgraft.errors import DistillError

from .resolution import Resolution
from .sources import SourceView
from .state import HubLink


class Link:
    """What a graft holds beside its engine."""

    def __init__(
        self,
        hub: HubLink,
        views: dict[str, SourceView],
        problem: DistillError | None,
        inherit: tuple[str, ...],
        pairing: set[str],
        recipe: Any,
    ) -> None:
        self.hub, self.views, self._problem, self.inherit, self.pairing = hub, views, problem, inherit, pairing
        self.recipe = recipe
        self.ready = False
        self.figures: dict[str, Tensor] = {}
        """Of the terms in the last step, until they are logged."""

    def take_figures(self) -> dict[str, Tensor]:
        """The figures of the last step, once."""
        taken, self.figures = self.figures, {}
        return taken

    def raise_problem(self) -> None:
        """Raises what kept the distiller from being built."""
        if self._problem is not None:
            raise self._problem

    @property
    def resolution(self) -> Resolution | None:
        """That of the sources with a resolution of their own: the pipeline delivers theirs."""
        return next((view.resolution for view in self.views.values() if view.resolution is not None), None)
