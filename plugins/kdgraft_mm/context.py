"""The state of a grafted student beside its engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kdgraft.errors import DistillError

from .resolution import Resolution
from .sources import SourceView
from .state import HubLink


@dataclass(eq=False)
class GraftContext:
    """The state of a grafted student beside its engine.

    Attributes:
        hub: the link to the message hub of the student's Runner.
        views: each source's view of the student's batch, by the name of the source.
        problem: the error that kept the distiller from being built.
        inherit: paths of the modules whose weights the student takes over from the teacher.
        pairing: names of the terms that are tapped at class outputs and do not know the order of the classes.
        recipe: the recipe, as the config gives it.
        ready: true once the teacher is loaded and the class names are compared.
        figures: the terms' figures in the last step, until they are logged.
        mixup: true where training batches are mixed.
    """

    hub: HubLink
    views: dict[str, SourceView]
    problem: DistillError | None
    inherit: tuple[str, ...]
    pairing: set[str]
    recipe: Any
    ready: bool = False
    figures: dict[str, Tensor] = field(default_factory=dict)
    mixup: bool = False

    def take_figures(self) -> dict[str, Tensor]:
        """Return the figures of the last step and forget them."""
        taken, self.figures = self.figures, {}
        return taken

    def raise_problem(self) -> None:
        """Raise the error that kept the distiller from being built, if there is one."""
        if self.problem is not None:
            raise self.problem

    @property
    def resolution(self) -> Resolution | None:
        """The resolution of the sources that have their own, which is the one that the pipeline delivers."""
        return next((view.resolution for view in self.views.values() if view.resolution is not None), None)
