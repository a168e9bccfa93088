"""A config of plans: the plain student of ``kdgraft demo det`` on its digit scenes, in ``runs/demo/det/data``."""

from importlib import import_module

globals().update(import_module("kdgraft_bench.demos.det").plan_config("runs/demo/det/data"))
