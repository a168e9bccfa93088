"""Expansion of a plan's entries into runs: chains, generations, stages, one run for each of several values, and choices.

All functions are pure. An entry becomes several runs, ``name-label``; a later entry that refers to ``name`` means the last run of a
chain, of generations or of stages, or the chosen run. An entry that refers to an undecided ``each`` is itself made once for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from typing import Any

from ..errors import DistillError, nearest
from .plan import Choice, PlannedRun

Changes = Mapping[str, Any]
"""Options that differ between the runs of one entry; ``config`` among them is the run's config."""


@dataclass(frozen=True)
class Entry:
    """One entry of a plan: a run, and what is made of it.

    Attributes:
        run: the run as written; its references are names of entries, of their runs, or ``name-*`` within an ensemble.
        each: by label the changes of the runs that are made in parallel.
        chain: by label the changes of the runs that teach one another in turn.
        stages: the runs that start from one another in turn.
        choose: the choice among the runs of ``each``.
    """

    run: PlannedRun
    each: Mapping[str, Changes] = field(default_factory=dict)
    chain: Mapping[str, Changes] = field(default_factory=dict)
    stages: tuple[PlannedRun, ...] = ()
    choose: Choice | None = None

    @property
    def references(self) -> list[str]:
        """The names that the entry's runs refer to."""
        return list(dict.fromkeys(name for run in (self.run, *self.stages) for name in references(run)))

    def made(self, name: str, changes: Changes) -> list[PlannedRun]:
        """Return the runs of this entry under a name: one, or a sequence."""
        if self.stages:
            return in_stages([changed(stage, name, changes) for stage in self.stages])
        if self.chain:
            return in_turn(changed(self.run, name, changes), self.chain)
        return [changed(self.run, name, changes)]


@dataclass(frozen=True)
class _Made:
    """The runs of an entry, and what its name means: one run, or by label one of each."""

    runs: tuple[str, ...]
    meaning: str | Mapping[str, str]


def references(run: PlannedRun) -> list[str]:
    """Return the names that a run refers to as teachers, members of ensembles, its start, or in its options."""
    found = []
    for source, teacher in run.teachers.items():
        if isinstance(teacher, str):
            found.append(teacher)
        elif "members" in teacher:
            found += [name for name in teacher["members"] if name not in {*run.teachers} - {source}]
    return list(dict.fromkeys([*found, *([run.start] if run.start else []), *run.mentioned]))


def changed(run: PlannedRun, name: str, changes: Changes) -> PlannedRun:
    """Return a run under another name, with other options and perhaps another config."""
    options = {key: value for key, value in changes.items() if key != "config"}
    return replace(run, name=name, config=changes.get("config", run.config), options={**run.options, **options})


def in_turn(run: PlannedRun, chain: Mapping[str, Changes]) -> list[PlannedRun]:
    """Return runs of which each teaches the next; the first is taught by the run's own teacher, and trains alone without one."""
    found: list[PlannedRun] = []
    for label, changes in chain.items():
        link = changed(run, f"{run.name}-{label}", changes)
        if found:
            link = replace(link, teachers={"teacher": found[-1].name})
        elif not link.teachers:
            link = replace(link, terms=(), recipe=None)
        found.append(link)
    return found


def in_stages(stages: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Return runs of which each starts from the weights of the one before; the first starts where the entry says."""
    found: list[PlannedRun] = []
    for number, stage in enumerate(stages, 1):
        start = found[-1].name if found else stage.start
        found.append(replace(stage, name=f"{stage.name}-{number}", start=start))
    return found


def expand(entries: Mapping[str, Entry]) -> tuple[PlannedRun | Choice, ...]:
    """Return the runs and choices of all entries, each after those that it needs.

    Raises:
        DistillError: an entry refers to nothing, entries wait for each other, or two runs have one name.
    """
    waits = {
        name: [_entry_of(name, reference, entries) for reference in entry.references] for name, entry in entries.items()
    }
    try:
        order = list(TopologicalSorter(waits).static_order())
    except CycleError as error:
        raise DistillError(f"these runs wait for each other: {' → '.join(error.args[1])}") from None
    found: dict[str, PlannedRun | Choice] = {}
    made: dict[str, _Made] = {}
    for name in order:
        runs, made[name] = _expanded(name, entries[name], made)
        for run in runs:
            if run.name in found or (run.name in entries and run.name != name):
                raise DistillError(f"two runs are called {run.name}; give one of them another name")
            found[run.name] = run
    for run in found.values():
        _check_weights(run, found)
    return tuple(found.values())


def _check_weights(run: PlannedRun | Choice, found: Mapping[str, PlannedRun | Choice]) -> None:
    """Refuse an ensemble where the weights of one model are needed."""
    for need in run.candidates if isinstance(run, Choice) else run.needs:
        other = found[need]
        if isinstance(other, PlannedRun) and other.ensemble:
            raise DistillError(
                f"{run.name}: {need} is an ensemble, which has no weights of its own; list its members: teacher = ['…', '…']"
            )


def _entry_of(owner: str, reference: str, entries: Iterable[str]) -> str:
    """Return the entry that a reference is to: by its name, ``name-*``, or the name of one of its runs."""
    fitting = [name for name in entries if reference == name or reference.startswith(f"{name}-")]
    if not fitting:
        raise DistillError(f"{owner} needs {reference!r}, which is not a run{nearest(reference, entries)}")
    return max(fitting, key=len)


def _expanded(name: str, entry: Entry, made: Mapping[str, _Made]) -> tuple[list[PlannedRun | Choice], _Made]:
    """Return the runs and the choice of one entry, given those that it refers to."""
    single, fans = _meanings(name, entry.references, made)
    variants = {label: (f"{name}-{label}", changes) for label, changes in entry.each.items()}
    if fans:
        if variants:
            raise DistillError(f"{name}: each, and a teacher with each, make too many runs; choose one of the teachers")
        variants = {label: (f"{name}-{label}", {}) for label in next(iter(fans.values()))}
    runs: list[PlannedRun | Choice] = []
    last: dict[str, str] = {}
    for label, (variant, changes) in (variants or {"": (name, {})}).items():
        meaning = single | {reference: each[label] for reference, each in fans.items()}
        sequence = [_referring(run, meaning, made) for run in entry.made(variant, changes)]
        runs += sequence
        last[label] = sequence[-1].name
    names = tuple(run.name for run in runs)
    if entry.choose is None:
        return runs, _Made(names, last if variants else last[""])
    if not variants:
        turns = "; runs of which each follows the one before are no choice" if len(runs) > 1 else ""
        raise DistillError(
            f"{name}: choose needs several runs: each = {{ option = [value, …] }}, or a teacher that has it{turns}"
        )
    middle, several = _meanings(name, entry.choose.midway, made)
    if len(middle) < len({*entry.choose.midway}):
        raise DistillError(
            f"{name}: midway needs single runs, and {', '.join(several) or 'name-*'} is several; name one"
        )
    midway = tuple(middle[reference] for reference in entry.choose.midway)
    return [*runs, replace(entry.choose, candidates=tuple(last.values()), midway=midway)], _Made(names, name)


def _meanings(
    owner: str, references: Iterable[str], made: Mapping[str, _Made]
) -> tuple[dict[str, str], dict[str, Mapping[str, str]]]:
    """Return by reference the run that is meant, and apart the references that mean one run for each label."""
    single: dict[str, str] = {}
    fans: dict[str, Mapping[str, str]] = {}
    for reference in references:
        found = made[_entry_of(owner, reference, made)]
        if reference in made:
            if isinstance(found.meaning, str):
                single[reference] = found.meaning
            else:
                fans[reference] = found.meaning
        elif reference in found.runs:
            single[reference] = reference
        elif not reference.endswith("-*"):
            raise DistillError(f"{owner} needs {reference!r}, which is not a run{nearest(reference, found.runs)}")
    if len({tuple(fan) for fan in fans.values()}) > 1:
        raise DistillError(f"{owner} needs {' and '.join(fans)}, which are several runs each; choose one of either")
    return single, fans


def _referring(run: PlannedRun, meaning: Mapping[str, str], made: Mapping[str, _Made]) -> PlannedRun:
    """Return a run whose references are names of runs; members of an ensemble that are runs become teachers of their own.

    A name that ``meaning`` does not have is one of the sequence's own, such as the generation before.
    """
    teachers: dict[str, Any] = {}
    for source, teacher in run.teachers.items():
        if isinstance(teacher, str):
            teachers[source] = meaning.get(teacher, teacher)
        elif "members" in teacher:
            members = _members(run, source, meaning, made)
            teachers |= {member: one for member, one in members.items() if member != one}
            teachers[source] = {**teacher, "members": list(members)}
        else:
            teachers[source] = teacher
    start = run.start and meaning.get(run.start, run.start)
    return replace(run, teachers=teachers, start=start, options=run.renamed(meaning))


def _members(run: PlannedRun, source: str, meaning: Mapping[str, str], made: Mapping[str, _Made]) -> dict[str, str]:
    """Return the runs that are members of an ensemble by their new source names; members that are sources stay as they are."""
    others, found = {*run.teachers} - {source}, dict[str, str]()
    for member in run.teachers[source]["members"]:
        if member in others:
            found[member] = member
            continue
        every = member.endswith("-*")
        for one in made[_entry_of(run.name, member, made)].runs if every else [meaning[member]]:
            name = f"{source}_{len(found)}"
            if name in others:
                raise DistillError(f"{run.name}: {name} is the name of a member of {source}; give that teacher another")
            found[name] = one
    if len({*found.values()}) < max(len(found), 2):
        told = ", ".join(found.values())
        raise DistillError(f"{run.name}: an ensemble needs two or more different runs, got {told}")
    return found
