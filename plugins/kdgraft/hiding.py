"""Hiding the distiller, a child module of the student, from the ``state_dict``: a saved student is a plain student."""

from __future__ import annotations

from typing import Any

from torch import nn


def hide_from_state_dict(module: nn.Module) -> None:
    """Remove a child module from the ``state_dict`` of its parents, and from the keys that loading one requires."""

    def drop(_: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
        for key in [key for key in state if key.startswith(prefix)]:
            del state[key]
        described = getattr(state, "_metadata", None)
        if described is not None:
            for key in [key for key in described if key == prefix[:-1] or key.startswith(prefix)]:
                del described[key]

    def keep(owner: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        # Loading gives the child its own values back, so that no key is missing; names of tied weights are keys too.
        everything = *owner.named_parameters(remove_duplicate=False), *owner.named_buffers(remove_duplicate=False)
        unsaved = {
            f"{path}.{name}" if path else name
            for path, part in owner.named_modules(remove_duplicate=False)
            for name in part._non_persistent_buffers_set
        }
        state.update({prefix + name: tensor.detach() for name, tensor in everything if name not in unsaved})

    module.register_state_dict_post_hook(drop)
    module.register_load_state_dict_pre_hook(keep)


def own_children(copied: nn.Module) -> None:
    """Copy the mapping of children of a shallow module copy, so that deleting a child leaves the original intact."""
    members = vars(copied)
    members["_modules"] = dict(members["_modules"])
