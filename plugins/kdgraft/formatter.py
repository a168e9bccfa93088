"""yapf, which mmengine imports to format configs, with the cache of its grammar in order.

Where an environment is newer than that cache, in the user's cache folder, yapf writes it anew, and gives the file its name before its
last bytes are written. A process that is killed there leaves it cut off, and one that starts beside it reads it so; the import of
mmengine then ends in an ``EOFError``, for as long as the file is there.
"""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from .errors import DistillError

TRIES = 10
"""Processes that start side by side may each find a file that another one is writing."""


def import_yapf() -> None:
    """Import yapf where it is installed; a cache of its grammar that it cannot read is removed, and yapf writes it anew.

    Raises:
        DistillError: a damaged cache cannot be removed, or yapf cannot be imported for another reason.
    """
    if find_spec("yapf") is None:
        return
    for _ in range(TRIES):
        try:
            import_module("yapf.yapflib.yapf_api")
            return
        except Exception as error:  # whatever unpickling a damaged file raises
            caught = error
            damaged = _cache()
            if not damaged:
                break
            for file in damaged:
                with suppress(OSError):
                    file.unlink()
    said = f"{type(caught).__name__}: {caught}".rstrip(": ")
    remedy = (
        f"delete the damaged cache {damaged[0].parent}"
        if damaged
        else "install it again: pip install --force-reinstall yapf"
    )
    raise DistillError(f"yapf, which mmengine imports, cannot be imported ({said}); {remedy}") from caught


def _cache() -> list[Path]:
    """The files of yapf's cache."""
    folder = import_module("platformdirs").user_cache_path("YAPF", "Google", version("yapf"))
    return sorted(folder.glob("*.pickle"))
