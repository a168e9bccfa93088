"""The terms that a user's term becomes between several models: one for each direction between peers, or for each member."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .errors import DistillError, WiringError
from .sources import STUDENT, Ensemble, Peers, Source
from .terms import Term


def directed(terms: Sequence[Term], sources: Mapping[str, Source]) -> tuple[list[Term], dict[str, Source]]:
    """Return the terms that the user's terms become, and further sources that they hear.

    A term on a :class:`~kdgraft.Peer` gets a twin, in which the peer imitates the student. A term on :class:`~kdgraft.Peers`
    becomes one for each student, or for each ordered pair of students. A term on an :class:`~kdgraft.Ensemble` that does not
    compare predictions becomes one for each member, so that the sum of their losses is the mean over the members. A term without a
    loss, which is ``alone``, has a twin on every peer.

    Args:
        terms: the user's terms.
        sources: the sources by name, with the parts of each.

    Raises:
        WiringError: a term on the average of peers does not compare predictions.
        DistillError: a term's name is that of one that another term becomes.
    """
    found: list[Term] = []
    means: dict[str, Source] = {}
    for term in terms:
        source = sources.get(term.source)
        if term.alone:
            peers = [name for name, one in sources.items() if one.trains]
            found += [term, *(_named(term, name, STUDENT, 1.0, f"_of_{name}") for name in peers)]
        elif isinstance(source, Peers):
            found += _averaged(term, source, means) if source.average else _pairwise(term, source)
        elif isinstance(source, Ensemble) and not term.hears_ensembles:
            source.check_features(term.name)
            found += [
                _named(term, STUDENT, member, weight, f"_from_{member}")
                for member, weight in zip(source.members, source.weights, strict=True)
            ]
        elif source is not None and source.trains:
            found += [term, _named(term, term.source, STUDENT, 1.0, f"_of_{term.source}")]
        else:
            found.append(term)
    names = [term.name for term in found]
    for term in found:
        if names.count(term.name) > 1:
            raise DistillError(
                f"{term.name} is one of the terms that {term.origin or term.name} becomes between several models; give the other "
                "term of this name another one, name=…"
            )
    return found, means


def _pairwise(term: Term, peers: Peers) -> list[Term]:
    """Return a term for each ordered pair of students, of an equal part of the weight for each that one of them imitates."""
    students, part = (STUDENT, *peers.members), 1 / len(peers.members)
    return [
        _named(term, one, other, part, ("" if one == STUDENT else f"_of_{one}") + f"_from_{other}")
        for one in students
        for other in students
        if one != other
    ]


def _averaged(term: Term, peers: Peers, means: dict[str, Source]) -> list[Term]:
    """Return a term for each student, in which it imitates the mean of the others."""
    if not term.hears_ensembles:
        raise WiringError(
            f"{term.name} does not compare predictions, whose average the students of {peers.name!r} imitate; leave average out"
        )
    if term.told_apart:
        raise WiringError(
            f"{term.name}: the average of all others includes the student, so that all models must be tapped alike; give tap=…"
        )
    found = []
    for student, mean in peers.means(STUDENT).items():
        name = f"{peers.name}_heard_by_{student}"
        mean.name = name
        means.setdefault(name, mean)
        found.append(_named(term, student, name, 1.0, "" if student == STUDENT else f"_of_{student}"))
    return found


def _named(term: Term, listener: str, source: str, part: float, suffix: str) -> Term:
    made = term.between(listener, source)
    made.name, made.part, made.weight = term.name + suffix, part, term.weight * part
    return made
