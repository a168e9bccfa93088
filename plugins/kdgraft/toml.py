"""TOML: the parser of the standard library, or tomli, which is the same for Python 3.10."""

from __future__ import annotations

import sys
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib as parser
else:
    import tomli as parser

TOMLDecodeError = parser.TOMLDecodeError


def loads(text: str) -> dict[str, Any]:
    """Return the content of a text in TOML; raise a :class:`TOMLDecodeError` where it is none."""
    return parser.loads(text)
