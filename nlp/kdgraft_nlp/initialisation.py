"""A student that starts from some of its teacher's layers, as DistilBERT and PKD do (arXiv 1910.01108, 1908.09355)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kdgraft.errors import DistillError

from .attention import Layer, layer_pairs, stacks
from .tasks import base_of

Layers = Sequence[int] | Mapping[str, Sequence[int]]
"""Numbers of the teacher's layers, from 0 or negative from the end; by stack where encoder and decoder differ."""


def init_from_teacher(student: Any, teacher: Any, layers: Layers) -> Any:
    """Copies weights of a teacher into a student: embeddings, the named layers in order, and the head where it is alike.

    Args:
        student: a model of Hugging Face; it is changed in place, or left as it was where an error is raised.
        teacher: one of the same kind, as wide and with the same vocabulary.
        layers: which of the teacher's layers become the student's, one for each of them: ``[1, 3, 5]``. A model with an encoder
            and a decoder takes them for both, or ``{"encoder": [1, 3], "decoder": [0, 5]}``.

    Returns:
        The student.

    Raises:
        DistillError: other numbers of layers, other kinds of layers, or weights of other shapes.

    Example::

        student = init_from_teacher(BertForSequenceClassification(config), teacher, layers=[1, 3, 5])
    """
    mine, theirs = base_of(student), base_of(teacher)
    if any(p.is_meta for p in theirs.parameters()):
        raise DistillError("init_from copies weights, and some of the teacher's are on no device; leave out device_map")
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
                f"init_from: '{key}' has the shape {tuple(own[key].shape)} in the student and {tuple(given[other].shape)} in "
                "the teacher; the two must be equally wide and have one vocabulary"
            )
    with torch.no_grad():
        for key, other in pairs.items():
            if own[key].shape == given[other].shape:
                own[key].copy_(given[other])
        _copy_head(mine, theirs, own)
    return student


def _of_layers(student: Any, ours: Any, source: Any, layers: Layers) -> Iterator[tuple[str, str]]:
    """The names of weights in the student's layers, each with the teacher's that it starts from."""
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
                f"init_from names {len(numbers)} of the teacher's layers, and the student has {len(stack)} ({name}); name one for each"
            )
        for own, other in layer_pairs(list(enumerate(numbers)), len(stack), len(theirs[name]), "init_from"):
            yield from _of_layer(ours, source, stack[own], theirs[name][other], theirs[name][0])


def _of_layer(ours: Any, source: Any, layer: Layer, other: Layer, first: Layer) -> Iterator[tuple[str, str]]:
    """The same of one layer; what only a stack's first layer has (T5's position bias) comes from there."""
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
        raise DistillError(
            f"init_from: only one of the student's and the teacher's {type(own).__name__} has {lost[0]!r}"
        )
    for key in sorted(keys):
        yield f"{layer.path}.{key}", f"{(other if key in chosen else first).path}.{key}"


def _copy_head(student: Any, teacher: Any, base: Mapping[str, Tensor]) -> None:
    """Copies what both have outside their base models, in the same shape; not what the student ties to its embeddings."""
    if student.base_model is student:
        return
    tied = {value.data_ptr() for value in base.values()}
    given = teacher.state_dict()
    for key, value in student.state_dict().items():
        if value.data_ptr() not in tied and key in given and given[key].shape == value.shape:
            value.copy_(given[key])
