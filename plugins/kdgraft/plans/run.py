"""Carrying out a plan: finished runs are not repeated, interrupted ones are resumed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import DistillError
from ..files import digest, digest_of_file, digest_of_weights, read_record, written_whole
from ..hosts import Host, Job, TrainedModel, TransferSet, host_named, host_of
from .plan import Choice, Plan, PlannedRun

RECORD = "finished.json"
"""The file beside a run's results that records its settings and the trained model, or which run was chosen."""
BEGUN = "begun.json"

Key = tuple[str, int]
"""A run and its seed."""


@dataclass(frozen=True)
class _State:
    """A run's place on the disk before the plan is carried out.

    Attributes:
        folder: its folder.
        settings: the digest of everything that its result depends on.
        done: its result, if it is finished.
        begun: true if it was begun.
    """

    folder: Path
    settings: str
    done: TrainedModel | None
    begun: bool


def carry_out(plan: Plan, *, dry_run: bool = False, tell: Callable[[str], None] = print) -> dict[Key, TrainedModel]:
    """Carry out every unfinished run of a plan in order; an interrupted run is resumed.

    All configs and folders are looked at before the first run.

    Args:
        plan: the plan.
        dry_run: report what would be done, and do nothing.
        tell: function that is called with a line for each run.

    Returns:
        The finished runs by name and seed, and the chosen ones by the name of the choice; in a dry run those that were finished
        before.

    Raises:
        DistillError: a config is missing, or a run's folder holds a run with other settings.
    """
    hosts = {run.name: _host(run) for run in plan.runs if isinstance(run, PlannedRun)}
    states = _states(plan, hosts)
    found: dict[Key, TrainedModel] = {}
    for run, seed in plan:
        state = states[run.name, seed]
        where = f", {hosts[run.name].name}" if isinstance(run, PlannedRun) else ""
        line = f"{run.name} (seed {seed}{where})"
        if state.done is not None:
            found[run.name, seed] = state.done
            tell(f"{line}: finished, in {state.folder}{_told(state.done)}")
            continue
        tell(f"{line}: {_intent(run, state)}, in {state.folder}")
        if dry_run:
            continue
        state.folder.mkdir(parents=True, exist_ok=True)
        needed = {name: found[name, seed] for name in run.needs}
        for name in run.needs:
            _check_weights(states[name, seed])
        if isinstance(run, Choice):
            made, tells = _choose(run, needed, state)
        else:
            made, tells = _train(run, seed, needed, hosts[run.name], state), "done"
        found[run.name, seed] = made
        tell(f"{line}: {tells}{_told(made)}")
    return found


def _train(run: PlannedRun, seed: int, needed: Mapping[str, TrainedModel], host: Host, state: _State) -> TrainedModel:
    _write(state.folder / BEGUN, {"settings": state.settings})
    teachers = {
        source: needed[teacher] if isinstance(teacher, str) else teacher for source, teacher in run.teachers.items()
    }
    job = Job(
        run.config,
        run.filled(needed),
        state.folder,
        seed,
        teachers,
        run.terms,
        run.recipe,
        needed[run.start] if run.start else None,
        state.begun,
        run.stop,
        run.data,
        run.ensemble,
    )
    trainer = host.make_trainer()
    made = trainer.carry_out(job) if run.checkpoint is None else trainer.given(job, run.checkpoint)
    _write(state.folder / RECORD, {"settings": state.settings, **_recorded(made)})
    return made


def _choose(run: Choice, needed: Mapping[str, TrainedModel], state: _State) -> tuple[TrainedModel, str]:
    """Choose a run, and record it: the choice stays, whatever becomes of the others."""
    metrics = {name: model.metrics for name, model in needed.items()}
    name = run.pick(metrics)
    values = {candidate: metrics[candidate][run.metric] for candidate in run.needs}
    record = {"settings": state.settings, "chosen": name, "by": run.by, "values": values, **_recorded(needed[name])}
    _write(state.folder / RECORD, record)
    return needed[name], f"{name} is chosen"


def _intent(run: PlannedRun | Choice, state: _State) -> str:
    """Say what is to be done."""
    if isinstance(run, Choice):
        midway = f", midway between {' and '.join(run.midway)}" if run.midway else ""
        return f"chooses by {run.by}{midway} among {', '.join(run.candidates)}"
    if run.checkpoint is not None:
        return f"takes {run.checkpoint}"
    doing = "goes on" if state.begun else "evaluates an ensemble" if run.ensemble else "trains"
    return doing + (f" after {', '.join(run.needs)}" if run.needs else "")


def _host(run: PlannedRun) -> Host:
    host = host_named(run.host) if run.host else host_of(run.config)
    for key in run.special:
        if key in host.refuses:
            raise DistillError(f"{run.name}: {key} means nothing in the host {host.name}: {host.refuses[key]}")
    if run.checkpoint is not None and not hasattr(host.make_trainer(), "given"):
        raise DistillError(f"{run.name}: the host {host.name} takes no checkpoint that others trained; leave it out")
    return host


# --- settings and records


def _states(plan: Plan, hosts: Mapping[str, Host]) -> dict[Key, _State]:
    """Look at the configs and folders of all runs."""
    found: dict[Key, _State] = {}
    for run, seed in plan:
        folder, needed = plan.folder(run.name, seed), {name: found[name, seed].settings for name in run.needs}
        if isinstance(run, Choice):
            settings = digest({"by": run.by, **{kind: [needed[n] for n in getattr(run, kind)] for kind in _COMPARED}})
        else:
            settings = digest(_settings(run, seed, needed, hosts[run.name]))
        done = _finished(folder, settings)
        found[run.name, seed] = _State(folder, settings, done, done is None and _begun(folder, settings))
    return found


_COMPARED = ("candidates", "midway")


def _settings(run: PlannedRun, seed: int, needed: Mapping[str, str], host: Host) -> dict[str, Any]:
    """Return everything that the result of a run depends on, with digests in place of runs."""
    found = {
        "host": host.name,
        "config": host.make_trainer().fingerprint(run.config, run.options),
        "seed": seed,
        "distillation": [run.terms, run.recipe],
        "teachers": {source: needed[t] if isinstance(t, str) else t for source, t in run.teachers.items()},
        "start": needed[run.start] if run.start else None,
    }
    mentioned = {name: needed[name] for name in run.mentioned}
    more = {
        "mentioned": mentioned or None,
        "stop": run.stop,
        "data": run.data and _content(run.data),
        "ensemble": run.ensemble,
        "checkpoint": run.checkpoint and digest_of_weights(run.checkpoint),
    }
    return found | {key: value for key, value in more.items() if value is not None}


def _content(data: TransferSet) -> dict[str, Any]:
    """Return a transfer set with the content of its file in place of the file; a folder is known by its name."""
    if data.set is None or "::" in data.set:
        return asdict(data)
    path, _, name = data.set.partition(":")
    if not Path(path).exists():
        raise DistillError(f"data.set not found: {path}")
    return {**asdict(data), "set": [digest_of_file(path), name] if Path(path).is_file() else data.set}


def _finished(folder: Path, settings: str) -> TrainedModel | None:
    """Return the trained model of the run in a folder; ``None`` if the run is not finished."""
    record = read_record(folder / RECORD)
    if not record:
        return None
    _same(folder, record, settings)
    try:
        model = TrainedModel(**record["model"])
    except (KeyError, TypeError):
        raise DistillError(f"{folder / RECORD} is damaged; remove it, and the run goes on where it was") from None
    if not Path(model.weights).exists():
        raise DistillError(
            f"{folder} is finished, but its weights {model.weights} are gone; remove the folder to train anew"
        )
    return model


def _recorded(model: TrainedModel) -> dict[str, Any]:
    """Return what is kept of a finished run: its model, and a digest of the weights."""
    return {"model": asdict(model), "weights": digest_of_weights(model.weights)}


def _check_weights(state: _State) -> None:
    """Raise a :class:`DistillError` if the weights of a run that was finished before, from which another run learns, have changed."""
    told = read_record(state.folder / RECORD).get("weights") if state.done is not None else None
    if told is not None and state.done is not None and digest_of_weights(state.done.weights) != told:
        raise DistillError(
            f"{state.folder} is finished, but its weights {state.done.weights} are damaged or others; remove the folder to train anew"
        )


def _begun(folder: Path, settings: str) -> bool:
    """Return true if a run with these settings was begun in the folder."""
    record = read_record(folder / BEGUN)
    if not record:
        return False
    _same(folder, record, settings)
    return True


def _same(folder: Path, record: Mapping[str, Any], settings: str) -> None:
    if record.get("settings") != settings:
        raise DistillError(
            f"{folder} holds a run with other settings (config, terms, teacher or seed); remove it, or give the plan another out"
        )


def _write(file: Path, record: Mapping[str, Any]) -> None:
    with written_whole(file) as part:
        part.write_text(json.dumps(record, indent=1), encoding="utf-8")


def _told(model: TrainedModel) -> str:
    return "".join(f"  {name} {value:.4g}" for name, value in model.metrics.items())
