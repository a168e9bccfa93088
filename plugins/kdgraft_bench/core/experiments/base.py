"""An experiment: runs, figures of them, and the published claims that these are held against."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..claims import Claim
from ..runs import Runs


@dataclass(frozen=True, eq=False)
class Experiment:
    """An experiment of the literature at a small scale.

    Attributes:
        name: its name on the command line.
        title: its title in tables.
        source: paper and table or section.
        published: the figures of the paper.
        plan: adds the runs that it needs, and returns label -> run; the labels are those of tables and claims.
        claims: what the paper says of these figures.
        shown: the labels in the table of experiments; all if empty.
        real: it can be made on a real set.
    """

    name: str
    title: str
    source: str
    published: str
    plan: Callable[[Runs], Mapping[str, str]]
    claims: tuple[Claim, ...]
    shown: tuple[str, ...] = ()
    real: bool = True
