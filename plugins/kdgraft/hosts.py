"""Host frameworks: which are here, and what to install for one that is not."""

from __future__ import annotations

from importlib.util import find_spec

from .errors import DistillError

_MM = (
    'pip install "setuptools<81" wheel ninja psutil && pip install --no-build-isolation onedl-mmcv==2.3.6 && '
    "pip install onedl-mmengine==0.10.12 {package}"
)
COMMANDS = {
    "mmdet": _MM.format(package="onedl-mmdetection==3.5.1"),
    "mmseg": _MM.format(package="onedl-mmsegmentation==1.4.2"),
    "mmengine": _MM.format(package="onedl-mmdetection==3.5.1"),
    "transformers": 'pip install "kdgraft[nlp]"',
}


class MissingHost(DistillError, ImportError):
    """A plugin was asked for whose host framework is not installed."""


def installed(host: str) -> bool:
    """Whether the host framework can be imported."""
    return find_spec(host) is not None


def require(host: str, plugin: str) -> None:
    """Raises :class:`MissingHost` with the commands to install it when the host framework is missing."""
    if not installed(host):
        raise MissingHost(f"{plugin} needs {host}, which is not installed; install torch first, then: {COMMANDS[host]}")
