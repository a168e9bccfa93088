"""``kdgraft bench``: what distilling brings and what it costs, for several students and methods over seeds."""

from ..spec import Benchmark, read_benchmark
from .compare import compare
from .run import benchmark

__all__ = ["Benchmark", "benchmark", "compare", "read_benchmark"]
