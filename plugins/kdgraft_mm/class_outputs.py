"""Class outputs among tapped tensors, recognised by their number of channels, and labels that follow a model's classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from kdgraft.errors import WiringError
from kdgraft.sources import Source
from kdgraft.taps import Tap
from kdgraft.terms import TapTerm, Term
from kdgraft.wiring import Wiring

Reads = Callable[[Any, Tap, Tensor], bool]
"""(model, tap, tensor) -> true where the channels of the tapped tensor stand for classes."""


def pairs_classes(term: Term, wiring: Wiring, reads: Reads) -> bool:
    """Return true for a term on features or weights of class outputs that does not know the order of their classes."""
    models = ((wiring.student, term.student_taps), (wiring.teacher, term.teacher_taps))
    if any(tap.parameters and _owns_classes(model, tap) for model, taps in models for tap in taps):
        return True
    if term.compares_classes or not isinstance(term, TapTerm):
        return False
    pairs = term.pairs(wiring.student_recording, wiring.teacher_recording)
    return any(reads(wiring.student, s_tap, s) or reads(wiring.teacher, t_tap, t) for s, t, s_tap, t_tap in pairs)


def _owns_classes(model: Any, tap: Tap) -> bool:
    """Return true where a tapped module lies in a module with a number of classes, or contains one."""
    inside = model.get_submodule(tap.path).modules()
    return head_of(model, tap) is not None or any(isinstance(getattr(m, "num_classes", None), int) for m in inside)


def scores_classes(model: Any, tap: Tap, tensor: Tensor) -> bool:
    """Return true where a tapped tensor has as many channels as the class outputs of the head around its tap.

    Args:
        model: the tapped model.
        tap: a tap of ``model``; only a return value of a module or a method counts as an output.
        tensor: the tapped tensor, ``(B, C, H, W)`` or ``(…, C)``.
    """
    head = head_of(model, tap)
    if tap.side != "output" or head is None or getattr(head, "class_agnostic", False):
        return False
    return tensor.shape[1 if tensor.ndim == 4 else -1] in _class_channels(head)


def head_of(model: Any, tap: Tap) -> Any:
    """Return the innermost module around a tap, other than the model, that has a number of classes; ``None`` if none has."""
    parts = tap.path.split(".") if tap.path else []
    for end in range(len(parts), 0, -1):
        module = model.get_submodule(".".join(parts[:end]))
        if isinstance(module, nn.ModuleList):  # the stages of a cascade have the same classes
            module = next(iter(module), None)
        classes = getattr(module, "num_classes", None)
        if isinstance(classes, int) and classes > 0:
            return module
    return None


def _class_channels(head: Any) -> set[int]:
    """Return the possible numbers of channels of a head's class outputs: for one prior, and for all priors of a position."""
    classes: int = head.num_classes
    if getattr(head, "out_channels", None) == 1:
        return {1}  # one score separates two classes
    if getattr(head, "custom_cls_channels", False):
        widths = {head.loss_cls.get_cls_channels(classes)}
    elif hasattr(head, "num_attrib"):
        widths = {head.num_attrib}  # YOLOv3's box, objectness and classes
    elif hasattr(head, "cls_out_channels"):
        widths = {head.cls_out_channels}
    else:
        widths = {classes, classes + 1}  # the background may have a score as well
    if not getattr(head, "reg_class_agnostic", True):
        widths.add(getattr(head.bbox_coder, "encode_size", 4) * classes)
    priors = getattr(head, "num_base_priors", 1)
    return {width * count for width in widths for count in (1, *(priors if isinstance(priors, list) else [priors]))}


def check_examined(terms: Sequence[Term], teacher: Source) -> None:
    """Raise a :class:`WiringError` for terms that run a teacher on its own loss where the labels do not follow its classes."""
    names = [term.name for term in terms if term.examines]
    if names and teacher.class_order is not None:
        raise WiringError(
            f"{', '.join(names)}: first learns on the teacher's own loss, and its classes stand in another order than the labels; "
            "set objective='features'"
        )


def own_loss(model: Any, inputs: Tensor, samples: Any) -> Tensor:
    """Return the sum of a model's own losses on a batch, as the host adds them up."""
    total: Tensor = model.parse_losses(model.loss(inputs, samples))[0]
    return total
