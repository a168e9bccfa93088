"""A saved student is a plain student: the distiller is a child of it and leaves no trace in its ``state_dict``."""

from __future__ import annotations

from typing import Any

from torch import nn


def hide_from_state_dict(module: nn.Module) -> None:
    """Makes a child module leave no trace in its parents' ``state_dict`` and ask for nothing when one is loaded."""

    def drop(_: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
        for key in [key for key in state if key.startswith(prefix)]:
            del state[key]
        described = getattr(state, "_metadata", None)
        if described is not None:
            for key in [key for key in described if key == prefix[:-1] or key.startswith(prefix)]:
                del described[key]

    def keep(owner: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        # Loading hands every child its own values, so that none is missing.
        tensors = {**dict(owner.named_parameters()), **dict(owner.named_buffers())}
        state.update({prefix + name: tensor.detach() for name, tensor in tensors.items()})

    module.register_state_dict_post_hook(drop)
    module.register_load_state_dict_pre_hook(keep)


def own_children(copied: nn.Module) -> None:
    """Gives a shallow copy of a module its own mapping of children, so that one can be deleted without the original losing it."""
    members = vars(copied)
    members["_modules"] = dict(members["_modules"])
