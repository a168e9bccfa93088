"""On-the-fly native ensemble: branches beside the student's last part, and a gate, teach the student."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..branches import Branch, first_of, renewed, steps_of
from ..errors import DistillError, WiringError, check_number, nearest
from ..isolation import own_random_stream
from ..losses import gated_scores, native_ensemble, upcast
from ..losses.one import Gate
from ..pairs import Pairs
from ..readers import Reader
from ..registry import RECIPES, TERMS
from ..taps import Recording, Tap
from .base import Taps, Wiring
from .classifiers import ClassifierTerm


@TERMS.register
@RECIPES.register("one")
class ONE(ClassifierTerm):
    """On-the-fly native ensemble (ONE): gated branches beside the student's last part teach it (Lan et al. 2018, arXiv 1806.04606).

    The student's last part, from the module ``branch`` to the class scores, is copied M − 1 times with weights of its own. A gate
    on the features before it weighs the M branches to an ensemble. Branches and ensemble learn from the labels (the student's own
    branch by the host's loss), and every branch from the ensemble; see :func:`kdgraft.losses.native_ensemble`. Copies and gate
    are trained with the student and are no part of it: a saved student is the plain model. The log has the accuracy of each
    branch and of the ensemble, as ``distill.one.accuracy_1``, which is the student's, and ``distill.one.accuracy_ensemble``.

    The weights of the loss, all 1, and T = 3 are the paper's. The authors' code adds 10⁻⁷ to the ensemble's probabilities, and
    raises the weight of the KL over the first 80 epochs.

    Args:
        branch: the first module of the student's last part, which reaches from there to the last child of the model; or the list
            of its modules in the order in which they run, where that is another. Between two modules the model may pool,
            flatten, take the first token or apply a ReLU. Build time checks that the modules give the student's class scores.
        branches: M >= 2, the student's own branch included; 3 in the paper.
        temperature: T > 0, with the factor T².
        where: see :class:`ScoreTerm`.

    Example:
        >>> parts = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(288, 5)]
        >>> distiller = Distiller(nn.Sequential(*parts), Itself(), [ONE("2")], example=images)
        >>> print(distiller.rows[-1].adapter)
        2 × (2 → 3 → 4), Gate 4→3
    """

    def __init__(
        self, branch: Taps | None = None, *, branches: int = 3, temperature: float = 3.0, **settings: Any
    ) -> None:
        super().__init__(temperature, **settings)
        check_number("ONE", "branches", branches, 2, whole=True)
        paths = [branch] if isinstance(branch, str) else [] if branch is None else branch
        if not isinstance(paths, (list, tuple)) or not all(isinstance(path, str) for path in paths):
            raise DistillError(f"ONE: branch must be the path of a module or a list of paths, got {branch!r}")
        self.whole = isinstance(branch, str)
        self.paths = [re.sub(r"\[(\w+)\]", r".\1", path) for path in paths]
        self.branches = branches
        self.parts: list[Tap] = []
        self.copies = nn.ModuleList()

    def check_settings(self, reader: type[Reader]) -> None:
        super().check_settings(reader)
        if not self.paths:
            raise DistillError("ONE: branch is missing; name the module from which the student's last part begins")

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        super().prepare(student, teacher)
        known = dict(student.named_modules())
        for path in self.paths:
            if not path or path not in known:
                raise WiringError(f"{self.name}: the student has no module {path!r}{nearest(path, known)}")
        if self.whole:
            self.paths = [self.paths[0], *_after(student, self.paths[0])]
        self.parts = [Tap.parse(f"{path}:inputs") for path in self.paths]
        self.student_taps = [*self.student_taps, *self.parts]

    def wire(self, wiring: Wiring) -> None:
        super().wire(wiring)
        known = dict(wiring.student.named_modules())
        given = self._inputs(wiring.student_recording)
        tensor, scores = first_of(given[0]), self.scores_in(wiring.student_recording)
        self.check_samples(tensor, self.parts[0], wiring)
        modules = [known[path] for path in self.paths]
        steps = steps_of(self.name, self.paths, modules, given, scores)
        for _ in range(self.branches - 1):
            self.copies.append(Branch(renewed(self.name, self.paths, modules), steps))
        channels = tensor.shape[1 if tensor.ndim == 4 else -1]
        self.gate = Gate(channels, self.branches).to(tensor.device)
        label = f"{len(self.copies)} × ({' → '.join(self.paths)}), Gate {channels}→{self.branches}"
        self.rows.append(self.row(tensor, "–", taps=(f"{self.paths[0]}:input", "–"), adapter=label, region="all"))

    def _inputs(self, recording: Recording) -> list[Mapping[str, Any]]:
        """Return the arguments of each module of the student's last part."""
        found = [recording[tap] for tap in self.parts]
        for path, given in zip(self.paths, found, strict=True):
            if not isinstance(given, Mapping):
                raise WiringError(f"{self.name}: {path} runs {len(given)} times in a pass; name modules that run once")
        return found

    def items(self, pairs: Pairs, student: Recording, teacher: Recording, batch: Batch) -> Tensor:
        assert pairs.labels is not None
        given = self._inputs(student)
        with own_random_stream():
            scores = torch.stack([upcast(own) for own in (pairs.student, *(copy(given) for copy in self.copies))])
        shares = self.gate(self.vectors(first_of(given[0]), self.parts[0], student, batch))
        ensemble = gated_scores(scores, shares)
        self.log_accuracies({**{str(place): own for place, own in enumerate(scores, 1)}, "ensemble": ensemble}, pairs)
        return native_ensemble(scores, ensemble, pairs.labels, self.temperature, reduction="none")


def _after(model: nn.Module, path: str) -> list[str]:
    """Return the paths of the modules that stand after one: its later siblings, then those of its parent, and so on."""
    found: list[str] = []
    while path:
        parent, _, name = path.rpartition(".")
        names = [child for child, _ in model.get_submodule(parent).named_children()]
        found += [f"{parent}.{later}" if parent else later for later in names[names.index(name) + 1 :]]
        path = parent
    return found
