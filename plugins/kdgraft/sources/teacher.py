"""The teacher: frozen, in eval mode, without gradient, and hidden from everything that traverses a student's modules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..batch import Batch
from ..distributed import is_sharded
from ..errors import DistillError, UnsafeCheckpoint
from ..files import check_intact
from ..recorder import Recorder
from ..taps import Recording
from .base import Source

Precision = Literal["inherit", "fp32", "bf16", "fp16"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Teacher(Source):
    """A frozen model in eval mode.

    A deep copy shares the model. It moves together with the module that owns it, unless it is ``placed``.

    Args:
        model: the teacher; it is put in eval mode and its parameters are frozen.
        checkpoint: a file with its weights; :meth:`load`, which the host calls when training starts, loads it strictly, so that a
            model built for inference never reads the file. ``None`` if the model has its weights already.
        precision: ``"inherit"`` follows the host's autocast; ``"bf16"`` and ``"fp16"`` use an autocast for the teacher alone;
            ``"fp32"`` disables the host's autocast for it.
        trusted: load the checkpoint even if it holds arbitrary pickled objects. Only for files that you made.
        safe_types: further harmless types to allow in the checkpoint, such as a host's own.
        class_order: for each of the student's classes, the number of that class in this model, where its order is another one;
            hosts that know the classes' names find it by themselves.

    Attributes:
        prepared: what a host keeps of wrapping the model for several processes; ``None`` before.

    Example:
        >>> torch.save(teacher.state_dict(), "teacher.pth")
        >>> Teacher(make_model(8), "teacher.pth", precision="bf16").load()
    """

    prepared: Any = None

    def __init__(
        self,
        model: nn.Module,
        checkpoint: str | Path | None = None,
        *,
        precision: Precision = "inherit",
        trusted: bool = False,
        safe_types: Sequence[Any] = (),
        class_order: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if class_order is not None:
            if sorted(class_order) != list(range(len(class_order))):
                raise DistillError(
                    f"class_order must have each number from 0 to {len(class_order) - 1} once, got {list(class_order)}"
                )
            self.class_order = torch.tensor(list(class_order))
        if precision not in ("inherit", "fp32", *_DTYPES):
            raise DistillError(f"teacher precision must be 'inherit', 'fp32', 'bf16' or 'fp16', got {precision!r}")
        if checkpoint is not None and not isinstance(checkpoint, (str, Path)):
            raise DistillError(f"teacher checkpoint must be the path of a file, got {checkpoint!r}")
        self.model = model.requires_grad_(False).eval()
        self.checkpoint = checkpoint
        self.precision = precision
        self.loaded = checkpoint is None
        self.meta: dict[str, Any] = {}
        self._trusted, self._safe_types = trusted, tuple(safe_types)

    def load(self) -> None:
        """Read the checkpoint, unless it was read before.

        Raises:
            DistillError: the file is missing, or its weights do not fit; the message lists the keys.
            UnsafeCheckpoint: the file holds more than tensors and known harmless types.
        """
        if self.loaded:
            return
        assert self.checkpoint is not None
        checkpoint = read_checkpoint(self.checkpoint, trusted=self._trusted, safe_types=self._safe_types)
        load_strictly(self.weighed, weights_of(checkpoint), str(self.checkpoint))
        meta = checkpoint.get("meta")
        self.meta = dict(meta) if isinstance(meta, dict) else {}
        self.loaded = True

    @property
    def weighed(self) -> nn.Module:
        """The module whose weights the checkpoint holds."""
        return self.model

    @property
    def placed(self) -> bool:
        """True if the weights must not be moved: see :func:`is_placed`."""
        return is_placed(self.model)

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Move or convert the model, as ``nn.Module._apply`` does, unless it is ``placed``."""
        super().apply(function)
        if not self.placed:
            self.model._apply(function)

    def record(self, recorder: Recorder, run: Callable[[], Any], batch: Batch, device: torch.device) -> Recording:
        self.ensure_eval()
        if is_sharded(self.model):  # a pass that stops early would leave its weights gathered
            with self.context(device.type), torch.no_grad(), recorder.record(self.model) as found:
                run()
            return found
        found = super().record(recorder, run, batch, device)
        return found.to(device) if self.placed else found

    def context(self, device_type: str) -> AbstractContextManager[Any]:
        """Return the autocast in which the teacher's forward pass runs."""
        if self.precision == "inherit":
            return nullcontext()
        dtype = _DTYPES.get(self.precision, torch.bfloat16)
        return torch.autocast(device_type, dtype=dtype, enabled=self.precision in _DTYPES)

    def ensure_eval(self) -> None:
        """Put the model back in eval mode if any of its modules is in training mode."""
        if any(module.training for module in self.model.modules()):
            self.model.eval()

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        return self


def is_placed(model: nn.Module) -> bool:
    """Return whether weights must not be moved or converted: a ``device_map`` placed them, they are quantised, or on the meta device."""
    told = getattr(model, "hf_device_map", None) or getattr(model, "is_quantized", False)
    return bool(told) or any(parameter.is_meta for parameter in model.parameters())


def read_checkpoint(
    path: str | Path, *, trusted: bool = False, safe_types: Sequence[Any] = (), map_location: Any = "cpu"
) -> dict[str, Any]:
    """Read a checkpoint with ``weights_only=True``, unless it is ``trusted``; a file of safetensors holds nothing but tensors.

    Raises:
        DistillError: the file is missing, damaged or not a checkpoint.
        UnsafeCheckpoint: it holds other types than tensors, plain containers and ``safe_types``.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        remote = "; download it first and give the file's path" if "://" in str(path) else ""
        raise DistillError(f"checkpoint not found: {path}{remote}")
    check_intact(file)
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    try:
        with torch.serialization.safe_globals(list(safe_types)):
            checkpoint = torch.load(file, map_location=map_location, weights_only=not trusted)
    except Exception as error:
        text = str(error)
        if "Unsupported operand" in text:
            raise DistillError(f"cannot read checkpoint {path}: it was not written by torch.save") from None
        if "weights_only" in text or "Unsupported" in text or "Weights only" in text:
            raise unsafe(f"checkpoint {path}", text) from None
        raise DistillError(
            f"cannot read checkpoint {path}: {text.splitlines()[0] if text else type(error).__name__}"
        ) from None
    if not isinstance(checkpoint, dict):
        raise DistillError(f"checkpoint {path} holds a {type(checkpoint).__name__}, not a dict of weights")
    return checkpoint


def _read_safetensors(file: Path) -> dict[str, Any]:
    try:
        return dict(load_file(file))
    except (SafetensorError, OSError) as error:
        raise DistillError(f"cannot read checkpoint {file}: {error}") from None


def unsafe(checkpoint: str, said: str) -> UnsafeCheckpoint:
    """Build the error for a checkpoint that torch refuses to load with ``weights_only=True``, from torch's long message."""
    reason = next((line.strip() for line in said.splitlines() if "GLOBAL" in line or "nsupported" in line), "")
    return UnsafeCheckpoint(
        f"{checkpoint} holds objects that loading would execute ({reason[:160]}); if you made it yourself, pass --trusted, or "
        "trusted=True beside a teacher's checkpoint"
    )


def weights_of(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Return the weights of a checkpoint, from ``state_dict``, ``model`` or its top level, without DDP's ``module.`` prefix."""
    state = next((checkpoint[k] for k in ("state_dict", "model") if isinstance(checkpoint.get(k), dict)), checkpoint)
    if state and all(key.startswith("module.") for key in state):
        state = {key[len("module.") :]: value for key, value in state.items()}
    return state


def load_strictly(model: nn.Module, state: dict[str, Tensor], source: str, owner: str = "teacher") -> None:
    """Load all keys or none; key names of older versions are accepted if the model's own modules convert them.

    Raises:
        DistillError: keys are missing, unexpected or of another shape; the message lists them, and the model is unchanged.
    """
    own = model.state_dict()
    problems = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": [
            f"{key} {tuple(state[key].shape)} for {tuple(value.shape)}"
            for key, value in own.items()
            if key in state and hasattr(state[key], "shape") and state[key].shape != value.shape
        ],
    }
    found = [
        f"{len(keys)} {kind}: {', '.join(keys[:4])}{', …' if len(keys) > 4 else ''}"
        for kind, keys in problems.items()
        if keys
    ]
    before = {key: value.clone() for key, value in own.items()} if found else own
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        model.load_state_dict(before)
        said = "; ".join(found) or str(error).replace("\n", " ")
        raise DistillError(f"checkpoint {source} does not fit the {owner} {type(model).__name__}; {said}") from None
