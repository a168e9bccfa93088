"""Strict loading of models from folders that ``save_pretrained`` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kdgraft.errors import DistillError

from .checks import check_folder, flat


def load_whole(loads: Any, folder: str | Path) -> Any:
    """Load a teacher with all of its weights.

    Args:
        loads: transformers' class that loads models of its kind.
        folder: the folder, or a name of the hub.

    Raises:
        DistillError: there is no model, or its weights do not fit; the message lists their keys.
    """
    check_folder("teacher", folder)
    try:
        model, found = loads.from_pretrained(folder, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise DistillError(f"cannot load the teacher {folder}: {flat(error)}") from None
    problems = [
        f"{len(found[kind])} {kind.removesuffix('_keys')}: {', '.join(str(key) for key in sorted(found[kind], key=str)[:4])}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if found.get(kind)
    ]
    if problems:
        raise DistillError(
            f"checkpoint {folder} does not fit the teacher {type(model).__name__}; {'; '.join(problems)}"
        )
    return model
