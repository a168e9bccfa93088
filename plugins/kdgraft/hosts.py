"""Hosts: the frameworks that students train in, found by entry point.

A plugin names its host in the entry-point group ``kdgraft.hosts``, a :class:`Host`; the command line and plans know no host by
name.
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
from typing import Any, Protocol

from .errors import DistillError, nearest
from .registry import Registry

logger = logging.getLogger("kdgraft")

GROUP = "kdgraft.hosts"

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
"""How each framework is installed."""


class MissingHost(DistillError, ImportError):
    """A plugin was asked for whose host framework is not installed."""


def installed(framework: str) -> bool:
    """Whether the host framework can be imported."""
    return find_spec(framework) is not None


def require(framework: str, plugin: str) -> None:
    """Raises :class:`MissingHost` with the commands to install it when the host framework is missing."""
    if not installed(framework):
        command = COMMANDS.get(framework, f"pip install {framework}")
        raise MissingHost(f"{plugin} needs {framework}, which is not installed; install torch first, then: {command}")


@dataclass(frozen=True)
class TrainedModel:
    """A finished run, as another run can use it.

    Attributes:
        config: builds the plain model in its host.
        weights: a file or folder with its weights.
        metrics: what the host measured in the end.
    """

    config: str
    weights: str
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One run to be made.

    Attributes:
        config: what is trained.
        options: overrides of its entries, by dotted key.
        folder: where everything of the run goes.
        seed: its random seed.
        teachers: who teaches, by source name: a finished run, or a table as the host takes it.
        terms, recipe: the distillation; without teachers the model trains alone.
        start: the run whose weights it starts from.
        resume: whether it was begun before, and goes on from its newest checkpoint if it has one.
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


class HostTrainer(Protocol):
    """How a host trains (:attr:`Host.trainer`)."""

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
        """Trains a config: ``kdgraft train``."""

    def check(self, config: str, options: Sequence[str] = (), *, trusted: bool = False) -> Any:
        """Builds everything and runs one step: ``kdgraft check``."""

    def test(
        self, config: str, checkpoint: str, options: Sequence[str] = (), *, trusted: bool = False
    ) -> Mapping[str, float]:
        """Evaluates a checkpoint of the plain or distilled student; its metrics: ``kdgraft test``."""

    def export(
        self,
        checkpoint: str | Path,
        out: str | Path,
        *,
        peer: str | None = None,
        trusted: bool = False,
        force: bool = False,
    ) -> Sequence[Path]:
        """Writes the plain student of a checkpoint, or a peer that trained beside it: ``kdgraft export``."""

    def reads(self, config: str) -> bool:
        """Whether the host trains a config like this."""

    def fingerprint(self, config: str, options: Mapping[str, Any]) -> Any:
        """Plain data that a training of this config depends on: the whole config, wherever its files lie."""

    def carry_out(self, job: Job) -> TrainedModel:
        """Makes one run."""


@dataclass(frozen=True)
class Host:
    """What a plugin tells of its host; nothing of it is imported before it is asked for.

    Attributes:
        name: as users write it: ``"det"``.
        package: the plugin's package, which has ``TERMS`` and ``RECIPES``.
        framework: the package that it needs.
        trainer: where its :class:`HostTrainer` is, ``module:name``.
        suffixes: of the configs that it trains.
        checkpoints: suffixes of the checkpoints that ``kdgraft export`` hands to it.
        demo, bench: the modules behind ``kdgraft demo`` and ``kdgraft bench``, where there are some.
        data: the layout of a real dataset that the demo takes, where it takes one.
        terms, recipes: the package's two registries, with their ``home``, so that what is in them can be listed without
            importing it; a host without them is imported.
    """

    name: str
    package: str
    framework: str
    trainer: str
    suffixes: tuple[str, ...] = ()
    checkpoints: tuple[str, ...] = ()
    demo: str | None = None
    bench: str | None = None
    data: str | None = None
    terms: Registry | None = None
    recipes: Registry | None = None

    def registries(self) -> tuple[Registry, Registry]:
        """Its terms and its recipes; :class:`MissingHost` says what to install."""
        require(self.framework, self.package)
        if self.terms is not None and self.recipes is not None:
            return self.terms, self.recipes
        found = self.plugin()
        return found.TERMS, found.RECIPES

    def plugin(self) -> ModuleType:
        """The plugin's package; :class:`MissingHost` says what to install."""
        return self._module(self.package)

    def make_trainer(self) -> HostTrainer:
        """How it trains; imports the framework."""
        module, _, name = self.trainer.partition(":")
        found: HostTrainer = getattr(self._module(module), name)
        return found

    def demonstration(self) -> ModuleType:
        """The module behind ``kdgraft demo``; its ``main`` runs it."""
        assert self.demo is not None
        return self._module(self.demo)

    def measurement(self) -> ModuleType:
        """The module behind ``kdgraft bench``; its ``main`` runs it."""
        assert self.bench is not None
        return self._module(self.bench)

    def _module(self, name: str) -> ModuleType:
        require(self.framework, self.package)
        return import_module(name)


@cache
def hosts() -> Mapping[str, Host]:
    """The hosts of all installed plugins by name."""
    found: dict[str, Host] = {}
    for point in entry_points(group=GROUP):
        try:
            host = point.load()
        except Exception as error:  # whatever a third party's module raises, the others stay usable
            logger.warning("host %s cannot be used: %s: %s", point.name, type(error).__name__, error)
            continue
        if isinstance(host, Host):
            found[point.name] = host
        else:
            logger.warning("host %s cannot be used: %s is no kdgraft.hosts.Host", point.name, point.value)
    return found


def host_named(name: str) -> Host:
    """The host of this name; a :class:`DistillError` names the nearest ones when there is none."""
    if name not in hosts():
        raise DistillError(f"no host is called {name!r}{nearest(name, hosts())}")
    return hosts()[name]


def host_of(config: str) -> Host:
    """The host that trains a config.

    Raises:
        DistillError: none does.
        MissingHost: the one that would is not installed.
    """
    suffix = Path(config if "::" in config else config.split(":")[0]).suffix
    return _first(suffix, "trains", config, "suffixes", lambda host: host.make_trainer().reads(config))


def host_of_checkpoint(checkpoint: str) -> Host:
    """The host that exports a checkpoint; raises as :func:`host_of` does."""
    return _first(Path(checkpoint).suffix, "exports", checkpoint, "checkpoints", lambda host: True)


def _first(suffix: str, verb: str, what: str, suffixes: str, takes: Callable[[Host], bool]) -> Host:
    candidates = [host for host in hosts().values() if suffix in getattr(host, suffixes)]
    here = [host for host in candidates if installed(host.framework)]
    for host in here:
        if takes(host):
            return host
    if len(here) < len(candidates):
        next(host for host in candidates if host not in here).plugin()  # says what to install
    known = ", ".join(
        f"{'/'.join(getattr(host, suffixes))} ({host.name})" for host in hosts().values() if getattr(host, suffixes)
    )
    raise DistillError(f"no host {verb} {what}; there are {known}")
