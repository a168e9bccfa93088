"""The methods of the core as variants to time: one row for each registered term that a host can use."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from kdgraft import TERMS, Reader
from kdgraft.terms import ClassifierTerm, TapTerm

SETTINGS: dict[str, dict[str, Any]] = {
    "FactorTransfer": dict(pretrain=1),  # the warm-up step; the steps that are timed teach
    "MasKD": dict(pretrain=1),
    "FreeKD": dict(pretrain=1),
}
"""Settings of terms in all hosts."""


def methods(
    reader: type[Reader], tap: str, settings: Mapping[str, Mapping[str, Any]], without: Collection[str] = ()
) -> dict[str, dict[str, Any]]:
    """Return the entry of each term of the core that a host can use, by the term's name; of those that hear a teacher.

    Args:
        reader: the host's reader.
        tap: the tap of terms that have no default tap in this host.
        settings: further settings by term.
        without: terms that this pair of models cannot use.
    """
    found = {}
    for name in TERMS:
        kind: Any = TERMS.get(name)
        if not kind.__module__.startswith("kdgraft.") or set(kind.needs) & set(reader.lacks) or name in without:
            continue
        if kind.alone or issubclass(kind, ClassifierTerm):  # they hear none
            continue
        place = dict(tap=tap) if issubclass(kind, TapTerm) and kind.reads not in reader.default_taps else {}
        found[name] = {"type": name, **place, **SETTINGS.get(name, {}), **settings.get(name, {})}
    return found
