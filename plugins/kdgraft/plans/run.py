"""Carrying out a plan: finished runs are not repeated, interrupted ones are resumed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import DistillError
from ..files import digest, written_whole
from ..hosts import Host, Job, TrainedModel, host_named, host_of
from .plan import Plan, PlannedRun

RECORD = "finished.json"
"""The file beside a run's results that records its settings and the trained model."""
BEGUN = "begun.json"


def carry_out(
    plan: Plan, *, dry_run: bool = False, tell: Callable[[str], None] = print
) -> dict[tuple[str, int], TrainedModel]:
    """Carry out every unfinished run of a plan in order; an interrupted run is resumed.

    Args:
        plan: the plan.
        dry_run: report what would be done, and do nothing.
        tell: function that is called with a line for each run.

    Returns:
        The finished runs by name and seed; in a dry run those that were finished before.

    Raises:
        DistillError: a run's folder holds a run with other settings.
    """
    settled = {run.name: _host(run) for run in plan.runs}
    digests: dict[tuple[str, int], str] = {}
    found: dict[tuple[str, int], TrainedModel] = {}
    for run, seed in plan:
        folder, host = plan.folder(run.name, seed), settled[run.name]
        own = digest(
            {
                "host": host.name,
                "config": host.make_trainer().fingerprint(run.config, run.options),
                "seed": seed,
                "distillation": [run.terms, run.recipe],
                "teachers": {
                    source: digests[teacher, seed] if isinstance(teacher, str) else teacher
                    for source, teacher in run.teachers.items()
                },
                "start": digests[run.start, seed] if run.start else None,
            }
        )
        digests[run.name, seed] = own
        done = _finished(folder, own)
        line = f"{run.name} (seed {seed}, {host.name})"
        if done is not None:
            found[run.name, seed] = done
            tell(f"{line}: finished, in {folder}{_told(done)}")
            continue
        begun = _begun(folder, own)
        needs = f" after {', '.join(run.needs)}" if run.needs else ""
        tell(f"{line}: {'goes on' if begun else 'trains'}{needs}, in {folder}")
        if dry_run:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / BEGUN, {"settings": own})
        teachers = {
            source: found[teacher, seed] if isinstance(teacher, str) else teacher
            for source, teacher in run.teachers.items()
        }
        start = found[run.start, seed] if run.start else None
        job = Job(run.config, run.options, folder, seed, teachers, run.terms, run.recipe, start, begun)
        made = host.make_trainer().carry_out(job)
        _write(folder / RECORD, {"settings": own, "model": asdict(made)})
        found[run.name, seed] = made
        tell(f"{line}: done{_told(made)}")
    return found


def _host(run: PlannedRun) -> Host:
    return host_named(run.host) if run.host else host_of(run.config)


def _finished(folder: Path, settings: str) -> TrainedModel | None:
    """Return the trained model of the run in a folder; ``None`` if the run is not finished."""
    record = _read(folder / RECORD)
    if record is None:
        return None
    _same(folder, record, settings)
    model = TrainedModel(**record["model"])
    if not Path(model.weights).exists():
        raise DistillError(
            f"{folder} is finished, but its weights {model.weights} are gone; remove the folder to train anew"
        )
    return model


def _begun(folder: Path, settings: str) -> bool:
    """Return true if a run with these settings was begun in the folder."""
    record = _read(folder / BEGUN)
    if record is None:
        return False
    _same(folder, record, settings)
    return True


def _same(folder: Path, record: Mapping[str, Any], settings: str) -> None:
    if record.get("settings") != settings:
        raise DistillError(
            f"{folder} holds a run with other settings (config, terms, teacher or seed); remove it, or give the plan another out"
        )


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write(file: Path, record: Mapping[str, Any]) -> None:
    with written_whole(file) as part:
        part.write_text(json.dumps(record, indent=1), encoding="utf-8")


def _told(model: TrainedModel) -> str:
    return "".join(f"  {name} {value:.4g}" for name, value in model.metrics.items())
