"""Hosts, the frameworks in which students train, discovered through entry points.

A plugin registers a :class:`Host` in the entry-point group ``kdgraft.hosts``; neither the command line nor plans refer to a host
by name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Protocol

from .errors import DistillError, nearest
from .registry import Registry

logger = logging.getLogger("kdgraft")

GROUP = "kdgraft.hosts"
FOLDER = "/"
"""Stands for a folder among the suffixes of checkpoints."""
Kind = Literal["softmax", "sigmoid", "value"]
"""The kind of predictions that an ensemble averages: logits of exclusive classes, of independent ones, or numbers."""

_MM = (
    'pip install "setuptools<81" wheel ninja psutil && pip install --no-build-isolation onedl-mmcv==2.3.6 && '
    "pip install onedl-mmengine==0.10.12 {package}"
)
COMMANDS = {
    "mmdet": _MM.format(package="onedl-mmdetection==3.5.1"),
    "mmseg": _MM.format(package="onedl-mmsegmentation==1.4.2"),
    "mmengine": _MM.format(package="onedl-mmdetection==3.5.1"),
    "transformers": 'pip install "kdgraft[nlp]"',
}
"""The commands that install each framework."""


class MissingHost(DistillError, ImportError):
    """The framework that a requested plugin needs is not installed."""


def installed(framework: str) -> bool:
    """Return true if the host framework can be imported."""
    return find_spec(framework) is not None


def require(framework: str, plugin: str) -> None:
    """Raise :class:`MissingHost`, with the installation commands, unless the host framework is installed."""
    if not installed(framework):
        command = COMMANDS.get(framework, f"pip install {framework}")
        raise MissingHost(f"{plugin} needs {framework}, which is not installed; install torch first, then: {command}")


@dataclass(frozen=True)
class TrainedModel:
    """The result of a finished run, for use by other runs.

    Attributes:
        config: the config from which the host builds the plain model.
        weights: the file or folder of its weights.
        metrics: the final metrics that the host measured.
        options: the overrides of the config that the model depends on; none where ``config`` already contains them.
    """

    config: str
    weights: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TransferSet:
    """The data of a run, where they are not simply those of its config.

    Attributes:
        set: another training set: data in the host's own format, or a config whose training set is taken.
        share: the share of the training set that is drawn, with the run's seed.
        labels: false for training on the terms alone: the host's own loss is left out, and labels are not read.
    """

    set: str | None = None
    share: float = 1.0
    labels: bool = True


@dataclass(frozen=True)
class Job:
    """A run to carry out.

    Attributes:
        config: the config to train.
        options: overrides of its entries by dotted key.
        folder: the folder for all files of the run.
        seed: its random seed.
        teachers: the teachers by source name: a finished run, or a table in the host's own format.
        terms, recipe: the distillation; without teachers the model trains alone.
        start: the run whose weights initialise the model.
        resume: true if the run was begun before; it then resumes from its newest checkpoint, if there is one.
        stop: where the training ends before its schedule does, in the unit in which the host counts it.
        data: the data to train on, if these are not those of the config.
        ensemble: train nothing, and evaluate the ensemble ``teacher`` of the other teachers; its value is the kind of their
            predictions: ``"softmax"``, ``"sigmoid"`` or ``"value"``.
    """

    config: str
    options: Mapping[str, Any]
    folder: Path
    seed: int
    teachers: Mapping[str, TrainedModel | Mapping[str, Any]] = field(default_factory=dict)
    terms: tuple[Any, ...] = ()
    recipe: Any = None
    start: TrainedModel | None = None
    resume: bool = False
    stop: int | None = None
    data: TransferSet | None = None
    ensemble: Kind | None = None


class HostTrainer(Protocol):
    """Interface to the training of a host (:attr:`Host.trainer`)."""

    def train(
        self,
        config: str,
        options: Sequence[str] = (),
        work_dir: str | None = None,
        resume: str | None = None,
        amp: bool = False,
        seed: int | None = None,
        *,
        timeout: float | None = None,
        trusted: bool = False,
        partial: bool = False,
    ) -> Any:
        """Train a config: ``kdgraft train``."""

    def check(self, config: str, options: Sequence[str] = (), *, trusted: bool = False) -> Any:
        """Build everything and run one step: ``kdgraft check``."""

    def test(
        self, config: str, checkpoint: str, options: Sequence[str] = (), *, trusted: bool = False
    ) -> Mapping[str, float]:
        """Evaluate a checkpoint of the plain or distilled student and return its metrics: ``kdgraft test``."""

    def export(
        self,
        checkpoint: str | Path,
        out: str | Path,
        *,
        peer: str | None = None,
        trusted: bool = False,
        force: bool = False,
    ) -> Sequence[Path]:
        """Write the plain student of a checkpoint, or one of its peers, and return the files: ``kdgraft export``."""

    def reads(self, config: str) -> bool:
        """Return true if the host can train this config."""

    def fingerprint(self, config: str, options: Mapping[str, Any]) -> Any:
        """Return the whole config as plain data, independent of file paths; it identifies the settings of a run."""

    def carry_out(self, job: Job) -> TrainedModel:
        """Carry out one run."""

    def given(self, job: Job, checkpoint: str) -> TrainedModel:
        """Return the model of a run that is not trained: its config with these weights.

        Raises:
            DistillError: the weights cannot be read, or do not fit the config's model.
        """


@dataclass(frozen=True)
class Host:
    """Description of a host by its plugin, whose modules are imported only when they are needed.

    Attributes:
        name: the name that users write, such as ``"det"``.
        package: the plugin's package, which defines ``TERMS`` and ``RECIPES``.
        framework: the package that the plugin requires.
        trainer: location of its :class:`HostTrainer`, ``module:name``.
        suffixes: suffixes of the configs that it trains.
        checkpoints: suffixes of the checkpoints that ``kdgraft export`` passes to it; :data:`FOLDER` stands for a folder.
        benchmark: location of what ``kdgraft bench`` needs of the host, ``module:name``, if it has that.
        costs: the module behind ``kdgraft bench --costs``, if the host has one.
        data: layout of the real datasets that ``kdgraft bench`` accepts, if it does.
        terms, recipes: the package's two registries with their ``home``, so that their contents can be listed without an import;
            without them the package is imported.
        sources: the package's registry of sources beside those of the core, with its ``home``, if it has some.
        lacks: the kinds of :data:`kdgraft.readers.NEEDS` that models of this host never have, each with the reason; its reader
            refuses terms that need them.
        refuses: keys of a plan's runs that mean nothing in this host, such as ``"ensemble"`` or ``"data.labels"``, with the reason.
    """

    name: str
    package: str
    framework: str
    trainer: str
    suffixes: tuple[str, ...] = ()
    checkpoints: tuple[str, ...] = ()
    benchmark: str | None = None
    costs: str | None = None
    data: str | None = None
    terms: Registry | None = None
    recipes: Registry | None = None
    sources: Registry | None = None
    lacks: Mapping[str, str] = field(default_factory=dict)
    refuses: Mapping[str, str] = field(default_factory=dict)

    def registries(self) -> tuple[Registry, Registry]:
        """Return the registries of terms and recipes; :class:`MissingHost` says what to install."""
        require(self.framework, self.package)
        if self.terms is not None and self.recipes is not None:
            return self.terms, self.recipes
        found = self.plugin()
        return found.TERMS, found.RECIPES

    def plugin(self) -> ModuleType:
        """Import the plugin's package; :class:`MissingHost` says what to install."""
        return self._module(self.package)

    def make_trainer(self) -> HostTrainer:
        """Return the host's trainer; this imports the framework."""
        module, _, name = self.trainer.partition(":")
        found: HostTrainer = getattr(self._module(module), name)
        return found

    def measurement(self) -> ModuleType:
        """Import the module behind ``kdgraft bench --costs``, whose ``main`` measures."""
        assert self.costs is not None
        return self._module(self.costs)

    def _module(self, name: str) -> ModuleType:
        require(self.framework, self.package)
        return import_module(name)


@cache
def hosts() -> Mapping[str, Host]:
    """Return the hosts of all installed plugins by name."""
    found: dict[str, Host] = {}
    for point in entry_points(group=GROUP):
        try:
            host = point.load()
        except (Exception, SystemExit) as error:  # the other hosts stay usable, whatever a third party's module raises
            logger.warning("host %s cannot be used: %s: %s", point.name, type(error).__name__, error)
            continue
        if isinstance(host, Host):
            found[point.name] = host
        else:
            logger.warning("host %s cannot be used: %s is no kdgraft.hosts.Host", point.name, point.value)
    return found


def host_named(name: str) -> Host:
    """Return the host of this name; a :class:`DistillError` suggests similar names if there is none."""
    if name not in hosts():
        raise DistillError(f"no host is called {name!r}{nearest(name, hosts())}")
    return hosts()[name]


def host_of(config: str) -> Host:
    """Return the host that trains a config.

    Raises:
        DistillError: no host trains it.
        MissingHost: the host that may train it is not installed.
    """
    suffix = Path(config if "::" in config else config.split(":")[0]).suffix
    return _first(suffix, "trains", config, "suffixes", lambda host: host.make_trainer().reads(config))


def host_of_checkpoint(checkpoint: str) -> Host:
    """Return the host that exports a checkpoint; raises the errors of :func:`host_of`."""
    suffix = FOLDER if Path(checkpoint).is_dir() else Path(checkpoint).suffix
    return _first(suffix, "exports", checkpoint, "checkpoints", lambda host: True)


def _first(suffix: str, verb: str, what: str, suffixes: str, takes: Callable[[Host], bool]) -> Host:
    candidates = [host for host in hosts().values() if suffix in getattr(host, suffixes)]
    here = [host for host in candidates if installed(host.framework)]
    for host in here:
        if takes(host):
            return host
    if len(here) < len(candidates):
        next(host for host in candidates if host not in here).plugin()  # raises MissingHost
    known = ", ".join(
        f"{'/'.join('a folder' if one == FOLDER else one for one in getattr(host, suffixes))} ({host.name})"
        for host in hosts().values()
        if getattr(host, suffixes)
    )
    raise DistillError(f"no host {verb} {what}; there are {known}")
