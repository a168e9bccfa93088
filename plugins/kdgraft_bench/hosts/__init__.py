"""What the benchmark asks of a host beside carrying out runs: data, small models, predictions on the test set, steps to time."""

from __future__ import annotations

from importlib import import_module

from kdgraft.errors import DistillError
from kdgraft.hosts import host_named

from .base import BenchHost, Dataset, Opened, Step, Tested


def bench_host(name: str) -> BenchHost:
    """Return what the benchmark needs of a host; imports its framework.

    Raises:
        DistillError: the host has none.
    """
    host = host_named(name)
    if host.benchmark is None:
        raise DistillError(f"the host {name} has no part for kdgraft bench; give its Host benchmark = 'module:name'")
    host.plugin()  # says what to install where the framework is missing
    module, _, attribute = host.benchmark.partition(":")
    found: BenchHost = getattr(import_module(module), attribute)()
    return found


__all__ = ["BenchHost", "Dataset", "Opened", "Step", "Tested", "bench_host"]
