"""Plans that ship, and what they measure: ``python -m kdgraft_bench.plans takd det``.

The plans train on the data of the demos, ``runs/demo/<host>/data``, which are written first. ``kdgraft plan`` carries them out too.
"""

from .measure import SCHEMES, measure

__all__ = ["SCHEMES", "measure"]
