"""Reading of recipe files, YAML or TOML, with overrides."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from kdgraft.errors import DistillError

from .checks import flat


class _Loader(yaml.SafeLoader):
    """A loader with the floats of YAML 1.2; PyYAML's own reads ``2e-3`` as a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load(path: str | Path, options: Sequence[str] = ()) -> dict[str, Any]:
    """Read a recipe file, YAML or TOML, and override its entries by options ``a.b=value``.

    Raises:
        DistillError: the file does not exist or cannot be read, or an option is malformed.
    """
    path = Path(path)
    if not path.is_file():
        raise DistillError(f"recipe file not found: {path}")
    try:
        config = _toml(path) if path.suffix == ".toml" else _yaml(path.read_text(encoding="utf-8"))
    except DistillError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DistillError(f"cannot read {path}: {flat(error)}") from None
    if not isinstance(config, dict):
        raise DistillError(f"{path} holds no settings; start it with an entry such as 'task: classification'")
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise DistillError(f"write options like training.learning_rate=0.001, got {option!r}")
        *parents, last = key.split(".")
        place = config
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise DistillError(f"cannot set {key}: {parent} is {place!r}")
        try:
            place[last] = _yaml(value)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise DistillError(f"cannot read the option {option!r}: {flat(error)}") from None
    return config


def _yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


def _toml(path: Path) -> dict[str, Any]:
    if sys.version_info < (3, 11):
        raise DistillError("reading TOML needs Python 3.11; write the recipe in YAML")
    import tomllib

    return tomllib.loads(path.read_text(encoding="utf-8"))
