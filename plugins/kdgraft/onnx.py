"""Export of a trained model to ONNX, checked with onnxruntime at other sizes than those it was traced with."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import DistillError
from .files import written_whole
from .hosts import installed

TOLERANCE = 1e-4
"""The largest difference to PyTorch's outputs, relative to the largest of these if that is above 1."""
LARGEST = 2**31 - 2**24
"""The bytes of weights that one file of ONNX can hold."""
Inputs = Mapping[str, Tensor]
Axes = Mapping[str, Sequence[int]]
"""The axes of each input that may vary."""


@dataclass(frozen=True)
class Freedom:
    """The axes of inputs that may vary in an exported model.

    Attributes:
        told: the axes in words; empty if none may.
        axes: the axes of the inputs.
        others: inputs of other sizes along these axes, with which the file is checked.
    """

    told: str
    axes: Axes
    others: Sequence[Inputs]


@dataclass(frozen=True)
class Exported:
    """A written file of ONNX.

    Attributes:
        path: the file.
        inputs, outputs: their names.
        varies: the axes that may vary, in words; empty if none may.
        difference: the largest absolute difference between its outputs and those of PyTorch.
        left_out: what has to be done outside of it, in words; empty if nothing has.
    """

    path: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    varies: str
    difference: float
    left_out: str = ""

    def __str__(self) -> str:
        lines = [
            f"wrote {self.path}: {', '.join(self.inputs)} -> {', '.join(self.outputs)}",
            f"{self.varies} may vary" if self.varies else "all sizes are fixed",
            f"onnxruntime's outputs differ from PyTorch's by at most {self.difference:.1e}",
        ]
        return "; ".join(lines) + (f"\nleft out: {self.left_out}" if self.left_out else "")


def export_onnx(
    model: nn.Module,
    inputs: Inputs,
    path: str | Path,
    *,
    freedoms: Sequence[Freedom] = (),
    name_of: Callable[[Sequence[Any]], str] = lambda where: ".".join(map(str, where)) or "output",
    about: Mapping[str, str] | None = None,
    left_out: str = "",
    force: bool = False,
) -> Exported:
    """Write a model as a file of ONNX whose outputs in onnxruntime equal PyTorch's.

    The first freedom with which the model can be exported *and* gives the right outputs at other sizes is taken; a model that computes
    with the sizes it was traced at has the next one, and at last none.

    Args:
        model: the model, on the CPU in float32; it is put into eval mode. Its output is a tensor, or tensors in tuples, lists and
            dictionaries.
        inputs: the arguments of its forward by name.
        path: the file.
        freedoms: what may vary, the freest first.
        name_of: the name of an output by its place: the indices and keys that lead to it.
        about: further properties to store in the file.
        left_out: what the file does not do, stored and reported.
        force: overwrite an existing file.

    Raises:
        DistillError: a package is missing, the file exists, the weights exceed 2 GiB, the forward fails, or no export is right.
    """
    path = Path(path)
    _check(model, path, force)
    model.eval()
    about = {**(about or {}), "left out": left_out}
    path.parent.mkdir(parents=True, exist_ok=True)
    reasons = []
    with written_whole(path) as part, _silent():
        for freedom in (*freedoms, Freedom("", {}, ())):
            try:
                outputs = _write(model, inputs, part, freedom.axes, name_of, about)
                difference = max(_difference(model, part, each) for each in (inputs, *freedom.others))
                break
            except Exception as error:  # whatever the exporter or onnxruntime raises: the next freedom may work
                reasons.append(_root(error))
        else:
            raise DistillError(f"{type(model).__name__} cannot be exported: {reasons[-1]}")
    return Exported(path, tuple(inputs), outputs, freedom.told, difference, left_out)


def _check(model: nn.Module, path: Path, force: bool) -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if not installed(name)]
    if missing:
        raise DistillError(f'{", ".join(missing)} is not installed; pip install "kdgraft[onnx]"')
    if path.suffix != ".onnx" or path.is_dir():
        raise DistillError(f"cannot write ONNX to {path}; name a file such as student.onnx")
    if path.exists() and not force:
        raise DistillError(f"{path} would be overwritten; name another file, or say --force")
    size = sum(one.numel() * one.element_size() for one in model.state_dict().values())
    if size > LARGEST:
        raise DistillError(
            f"the weights have {size / 2**30:.1f} GiB, and one file of ONNX holds 2; export it with the host's own tools"
        )


def _write(
    model: nn.Module,
    inputs: Inputs,
    path: Path,
    axes: Axes,
    name_of: Callable[[Sequence[Any]], str],
    about: Mapping[str, str],
) -> tuple[str, ...]:
    """Write the file, and return the names of its outputs."""
    with torch.no_grad():
        names = tuple(_leaves(model(**inputs), name_of))
    free = {name: dict.fromkeys(axes.get(name, ()), torch.export.Dim.AUTO) for name in inputs}
    with torch.no_grad():
        program = torch.onnx.export(
            model,
            (),
            kwargs=dict(inputs),
            dynamo=True,
            dynamic_shapes=free,
            input_names=[*inputs],
            output_names=[*names],
            verbose=False,
        )
    assert program is not None
    program.model.metadata_props.update({key: value for key, value in about.items() if value})
    program.save(path)
    return names


def _leaves(output: Any, name_of: Callable[[Sequence[Any]], str]) -> dict[str, Tensor]:
    """Return the tensors of an output by name."""
    found, _ = pytree.tree_flatten_with_path(output)
    return {
        name_of([getattr(key, "key", getattr(key, "idx", key)) for key in where]): value
        for where, value in found
        if isinstance(value, Tensor)
    }


def _difference(model: nn.Module, path: Path, inputs: Inputs) -> float:
    """Return the largest difference between both programs' outputs.

    Raises:
        DistillError: it is above the tolerance.
    """
    import onnxruntime

    told = onnxruntime.SessionOptions()
    told.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), told, providers=["CPUExecutionProvider"])
    known = {one.name for one in session.get_inputs()}  # one that nothing depends on is not there
    found = session.run(None, {name: value.numpy() for name, value in inputs.items() if name in known})
    with torch.no_grad():
        wanted = [value.numpy() for value in _leaves(model(**inputs), repr).values()]
    sizes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items())
    worst = 0.0
    for mine, theirs in zip(found, wanted, strict=True):
        worst = max(worst, _apart(mine, theirs, sizes))
    return worst


def _apart(found: NDArray[Any], wanted: NDArray[Any], sizes: str) -> float:
    if found.shape != wanted.shape or not np.array_equal(np.isfinite(found), np.isfinite(wanted)):
        raise DistillError(f"its outputs are others than PyTorch's for {sizes}")
    there = np.isfinite(wanted)
    apart = float(np.abs(found[there].astype(np.float64) - wanted[there]).max(initial=0.0))
    if apart > TOLERANCE * max(float(np.abs(wanted[there]).max(initial=0.0)), 1.0):
        raise DistillError(f"its outputs differ from PyTorch's by {apart:.1e} for {sizes}")
    return apart


def _root(error: BaseException) -> str:
    """Return the first cause of an error in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextmanager
def _silent() -> Iterator[None]:
    """Hide what the exporter tells of its own work."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export", "torch.fx")]
    before = [one.level for one in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for one in loggers:
            one.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for one, level in zip(loggers, before, strict=True):
                one.setLevel(level)
