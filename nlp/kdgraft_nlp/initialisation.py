"""Initialisation of a student from some layers of its teacher, as in DistilBERT and PKD (arXiv 1910.01108, 1908.09355)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kdgraft.errors import DistillError

from .adapters import base_of
from .attention import Layer, layer_pairs, stacks

Layers = Sequence[int] | Mapping[str, Sequence[int]]
"""Indices of the teacher's layers, from 0 or negative from the end; by stack where encoder and decoder differ."""


def init_from_teacher(student: Any, teacher: Any, layers: Layers) -> Any:
    """Copy weights of a teacher into a student: embeddings, the chosen layers in order, and the head where its shapes agree.

    Args:
        student: a model of Hugging Face, changed in place; it stays unchanged where an error is raised.
        teacher: a model of the same kind, with the same width and vocabulary.
        layers: the teacher's layer for each of the student's layers: ``[1, 3, 5]``. A model with an encoder and a decoder uses
            them for both, or takes ``{"encoder": [1, 3], "decoder": [0, 5]}``.

    Returns:
        The student.

    Raises:
        DistillError: the numbers of layers, the kinds of layers or the shapes of weights differ.

    Example::

        student = init_from_teacher(BertForSequenceClassification(config), teacher, layers=[1, 3, 5])
    """
    mine, theirs = base_of(student), base_of(teacher)
    if any(p.is_meta for p in theirs.parameters()):
        raise DistillError(
            "init_from copies weights, and some of the teacher's are on the meta device; leave out device_map"
        )
    ours, source = mine.base_model, theirs.base_model
    own, given = ours.state_dict(), source.state_dict()
    pairs = dict(_of_layers(mine, ours, source, layers))
    inside = tuple(f"{layer.path}." for stack in stacks(ours).values() for layer in stack)
    pairs |= {key: key for key in own if not key.startswith(inside) and key in given}
    head = mine.get_output_embeddings()
    apart = {id(p) for p in head.parameters()} if head is not None else set()
    apart -= {id(p) for p in mine.get_input_embeddings().parameters()}
    free = {key for key, value in ours.named_parameters(remove_duplicate=False) if id(value) in apart}
    for key, other in pairs.items():
        if own[key].shape != given[other].shape and key not in free:
            raise DistillError(
                f"init_from: '{key}' is {tuple(own[key].shape)} in the student and {tuple(given[other].shape)} in the teacher; use equal sizes"
            )
    with torch.no_grad():
        for key, other in pairs.items():
            if own[key].shape == given[other].shape:
                own[key].copy_(given[other])
        _copy_head(mine, theirs, own)
    return student


def _of_layers(student: Any, ours: Any, source: Any, layers: Layers) -> Iterator[tuple[str, str]]:
    """Yield the names of the weights in the student's layers, each with the name of the teacher's weight to copy."""
    mine, theirs = ({n: found for n, found in stacks(model).items() if n != "cross"} for model in (ours, source))
    if not mine or mine.keys() != theirs.keys():
        said = [" and ".join(found) or "no layers with attention" for found in (mine, theirs)]
        raise DistillError(f"init_from: the student has {said[0]}, and the teacher {said[1]}")
    if isinstance(layers, Mapping) and layers.keys() != mine.keys():
        raise DistillError(f"init_from: {type(student).__name__} has {' and '.join(mine)}, got {', '.join(layers)}")
    for name, stack in mine.items():
        numbers = layers[name] if isinstance(layers, Mapping) else layers
        if not isinstance(numbers, Sequence) or isinstance(numbers, str):
            raise DistillError(f"init_from is a list of the teacher's layers, such as [1, 3, 5]; got {numbers!r}")
        if len(numbers) != len(stack):
            raise DistillError(
                f"init_from names {len(numbers)} layers of the teacher, and the student has {len(stack)} ({name}); name one for each"
            )
        for own, other in layer_pairs(list(enumerate(numbers)), len(stack), len(theirs[name]), "init_from"):
            yield from _of_layer(ours, source, stack[own], theirs[name][other], theirs[name][0])


def _of_layer(ours: Any, source: Any, layer: Layer, other: Layer, first: Layer) -> Iterator[tuple[str, str]]:
    """Yield the same for one layer; weights that only the first layer of a stack has (T5's position bias) come from that layer."""
    own, given, begin = (
        model.get_submodule(one.path) for model, one in ((ours, layer), (source, other), (source, first))
    )
    if type(own).__name__ != type(given).__name__:
        raise DistillError(
            f"init_from: the student's layers are {type(own).__name__}, and the teacher's {type(given).__name__}"
        )
    keys, chosen, firsts = (set(module.state_dict()) for module in (own, given, begin))
    lost = sorted((keys - chosen - firsts) | ((chosen - keys) if other != first else set()))
    if lost:
        raise DistillError(f"init_from: only one of student's and teacher's {type(own).__name__} has {lost[0]!r}")
    for key in sorted(keys):
        yield f"{layer.path}.{key}", f"{(other if key in chosen else first).path}.{key}"


def _copy_head(student: Any, teacher: Any, base: Mapping[str, Tensor]) -> None:
    """Copy the weights outside the base models that agree in name and shape, except those tied to the student's embeddings."""
    if student.base_model is student:
        return
    tied = {value.data_ptr() for value in base.values()}
    given = teacher.state_dict()
    for key, value in student.state_dict().items():
        if value.data_ptr() not in tied and key in given and given[key].shape == value.shape:
            value.copy_(given[key])
