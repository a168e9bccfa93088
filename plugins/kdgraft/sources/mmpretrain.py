"""Import of MMPretrain, whose models are image classifiers and backbones for detectors and segmentors."""

from __future__ import annotations

import sys
from contextlib import suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from ..errors import DistillError
from ..formatter import import_yapf

INSTALL = "pip install onedl-mmpretrain torchvision"


def import_mmpretrain(where: str) -> Any:
    """Import MMPretrain with its models, which registers them as ``mmpretrain.ResNet`` and so on.

    Args:
        where: the entry of the user's that asks for it, for messages.

    Raises:
        DistillError: it is not installed, or cannot be imported.
    """
    if find_spec("mmpretrain") is None:
        raise DistillError(f"{where}: mmpretrain is not installed: {INSTALL}")
    import_yapf()
    try:
        leave_out_multimodal()
        import_module("mmpretrain.models")
        return import_module("mmpretrain")
    except Exception as error:  # it needs torchvision, and a build for another torch fails in its own ways
        said = str(error).partition("\n")[0]
        raise DistillError(
            f"{where}: mmpretrain cannot be imported ({type(error).__name__}: {said}); it needs torchvision, in the build for your torch"
        ) from error


def leave_out_multimodal() -> None:
    """Have MMPretrain leave out its multimodal models beside transformers 5, as it does without transformers.

    They are written for transformers 4, and their import fails beside a later one with an error that MMDetection, which imports
    MMPretrain wherever it is installed, takes for one of its own. Call this before either is imported.
    """
    if find_spec("mmpretrain") is not None and "mmpretrain.models" not in sys.modules and _major("transformers") > 4:
        with suppress(Exception):  # those who import its models are told what else is wrong with it
            switch: Any = import_module("mmpretrain.utils.dependency")
            switch.WITH_MULTIMODAL = False


def _major(package: str) -> int:
    """Return the major version of an installed package; 0 if it is not installed."""
    try:
        return int(version(package).partition(".")[0])
    except PackageNotFoundError:
        return 0
