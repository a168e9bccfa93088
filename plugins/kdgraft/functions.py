"""Functions that a user names by their file, ``file.py:function``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from .errors import DistillError, nearest


def file_of(named: str) -> Path:
    """Return the file of ``file.py:function``.

    Raises:
        DistillError: there is no such file.
    """
    file = Path(named.rpartition(":")[0])
    if not file.is_file():
        raise DistillError(f"config not found: {file}")
    return file


def function_of(named: str) -> Callable[..., Any]:
    """Execute the file of ``file.py:function``, and return its function.

    Raises:
        DistillError: there is no such file, or no such function in it.
    """
    path, name = file_of(named), named.rpartition(":")[2]
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    function: Callable[..., Any] | None = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise DistillError(f"{path} has no function {name!r}{nearest(name, known)}")
    return function


def called(named: str, options: Mapping[str, Any]) -> Any:
    """Call the function that ``file.py:function`` names.

    Raises:
        DistillError: there is no such function, or it does not take these options.
    """
    function = function_of(named)
    try:
        inspect.signature(function).bind(**options)
    except TypeError as error:
        raise DistillError(f"{named} cannot be called with options {dict(options)}: {error}") from None
    return function(**options)
