"""Teachers that do not run here: their outputs come from a store or from a server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from kdgraft.sources import Cached
from kdgraft.terms import Term


class Absent(Cached):
    """Base of teachers whose model is a stand-in without weights, to which terms can be wired.

    It stands for one teacher and is the only source.
    """

    def stand_for(self, student: nn.Module) -> None:
        """Prepare for a student, before :meth:`load`; nothing by default."""

    def check_terms(self, terms: Sequence[Term]) -> None:
        """Refuse terms that compare what is not known of the teacher, when they are wired; nothing by default.

        Raises:
            WiringError: one does.
        """

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuse the tokenizer of a student that is not the teacher's; ``None`` where the student's is unknown.

        Raises:
            DistillError: it is another one.
        """
