"""Hosts: the frameworks that students train in, found by entry point.

A plugin names its host in the entry-point group ``kdgraft.hosts``, a :class:`Host`; the command line and plans know no host by
name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from .errors import DistillError, nearest

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
    ) -> Any:
        """Trains a config: ``kdgraft train``."""

    def check(self, config: str, options: Sequence[str] = ()) -> Any:
        """Builds everything and runs one step: ``kdgraft check``."""

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
        suffixes: of the files that ``kdgraft train`` hands to it.
        demo, bench: the modules behind ``kdgraft demo`` and ``kdgraft bench``, where there are some.
    """

    name: str
    package: str
    framework: str
    trainer: str
    suffixes: tuple[str, ...] = ()
    demo: str | None = None
    bench: str | None = None

    def module(self, name: str | None = None) -> ModuleType:
        """The plugin's package, or one of the modules above; :class:`MissingHost` says what to install."""
        require(self.framework, self.package)
        return import_module(name or self.package)

    def make_trainer(self) -> HostTrainer:
        """How it trains; imports the framework."""
        module, _, name = self.trainer.partition(":")
        found: HostTrainer = getattr(self.module(module), name)
        return found


@cache
def hosts() -> Mapping[str, Host]:
    """The hosts of all installed plugins by name."""
    found = {point.name: point.load() for point in sorted(entry_points(group=GROUP), key=lambda point: point.name)}
    for name, host in found.items():
        if not isinstance(host, Host):
            raise DistillError(f"entry point {name!r} of {GROUP} is a {type(host).__name__}, not a Host")
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
    suffix = Path(config.split(":")[0] if "::" not in config else config).suffix
    missing: list[str] = []
    for host in hosts().values():
        if suffix not in host.suffixes:
            continue
        if not installed(host.framework):
            missing.append(host.name)
        elif host.make_trainer().reads(config):
            return host
    if missing:
        hosts()[missing[0]].module()
    known = ", ".join(f"{'/'.join(host.suffixes)} ({host.name})" for host in hosts().values() if host.suffixes)
    raise DistillError(f"no host trains {config}; configs are {known}")
