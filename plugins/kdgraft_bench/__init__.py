"""Measurements: demos and costs of every host on one runner, with embedded data, results, tables and pictures.

``comparison.py`` trains teachers, plain and distilled students; each module of ``demos/`` provides a host's data, models, metrics
and pictures. The modules of ``costs/`` time training steps, and ``report/`` writes a page about finished runs. Only the host that is measured is imported.
"""

from importlib.util import find_spec

from kdgraft.hosts import MissingHost

NEEDED = ("pandas", "matplotlib", "sklearn", "scipy", "tqdm", "PIL", "altair", "vl_convert", "jinja2")
MISSING = [name for name in NEEDED if find_spec(name) is None]
if MISSING:
    raise MissingHost(f'measuring needs {", ".join(MISSING)}, which is not installed: pip install "kdgraft[bench]"')
