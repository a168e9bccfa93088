"""Measurements of every host: benchmarks and their demos, experiments, costs, with embedded data, results, tables and pictures.

``benchmark/`` trains teachers, plain and distilled students side by side; each module of ``hosts/`` provides a host's data, small
models, metrics and pictures. ``core/`` repeats experiments of the literature, the modules of ``costs/`` time training steps, and
``report/`` writes a page about finished runs. Only the host that is measured is imported.
"""

from importlib.util import find_spec

from kdgraft.hosts import MissingHost

NEEDED = ("pandas", "matplotlib", "sklearn", "scipy", "tqdm", "PIL", "altair", "vl_convert", "jinja2")
MISSING = [name for name in NEEDED if find_spec(name) is None]
if MISSING:
    raise MissingHost(f'measuring needs {", ".join(MISSING)}, which is not installed: pip install "kdgraft[bench]"')
