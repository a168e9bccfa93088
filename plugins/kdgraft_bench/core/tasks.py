"""The trainings of ``kdgraft experiments``, as a task of a plan: ``tasks.py:task`` with options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdgraft import Distiller, DistillError, NetAug, Peers
from kdgraft.consistent import Teaching
from kdgraft.isolation import isolated_rng
from kdgraft.plain import Task
from kdgraft_bench.core import nets
from kdgraft_bench.core.batches import Accuracies, Batches
from kdgraft_bench.core.data import Pictures, part_of, pictures_of
from kdgraft_bench.core.training import ADAMW, BATCH, parts_of, training

RATES = {"mlp": 6e-3, "conv": 1e-2, "shampoo": 0.1}
"""The learning rates by the kind of net, of AdamW; and that of Shampoo."""
TESTED = 256
"""The pictures of a batch in tests."""
CROP = (0.6, 1.0)
"""The areas of crops; a digit fills more than half of its picture, so that FunMatch's smallest crop, 0.08, would not show it."""


def task(
    net: str,
    width: int,
    *,
    steps: int,
    split: str = "test",
    data: str = "",
    share: float = 1.0,
    member: int = 0,
    special: str = "",
    peers: int = 1,
    average: bool = False,
    mode: str = "",
    mixup: bool = False,
    large: bool = False,
    teacher_large: bool = False,
    optimizer: str = "adamw",
    rate: float | None = None,
    batch: int = BATCH,
    **sizes: Any,
) -> Task:
    """Return the training of one net.

    Args:
        net: ``"mlp"`` or ``"conv"``.
        width: the net's width.
        steps: the number of batches; a multiple of :data:`~kdgraft_bench.core.training.PARTS`, or less.
        split: the split of the metric ``accuracy``, ``"test"`` or ``"val"``; the metric ``val`` is always of the latter.
        data: the folder of a real set; the embedded one if empty.
        share: the share of the training pictures, that of each class, drawn with the seed.
        member: members of an ensemble have one seed; the number of a member makes it start from other weights.
        special: ``"mutual"`` for deep mutual learning with other nets of this size, ``"netaug"`` for NetAug.
        peers, average: in mutual learning, the number of other nets, and to imitate the mean of all others (DML_e).
        mode: ``"alone"`` for random crops without a teacher, or the mode of :class:`kdgraft.consistent.Teaching`; the pictures as
            they are if empty.
        mixup: mix pictures, as there.
        large, teacher_large: the net, or its teacher, sees pictures at their full resolution.
        optimizer: ``"adamw"`` or ``"shampoo"``.
        rate: the learning rate; that of :data:`RATES` if omitted.
        batch: the pictures of a batch.
        sizes: further arguments of the net.
    """
    torch.manual_seed(torch.initial_seed() + 1000 * member)
    pictures = part_of(pictures_of("train", data), share)
    seen = pictures.large if mode or large else pictures.small
    tested = pictures_of(split, data)
    shown = tested.large if large else tested.small
    return training(
        _model(special, peers, average, net, width, pictures, large, sizes),
        Batches(seen, pictures.labels, batch, parts_of(steps)[1]),
        F.cross_entropy,
        steps,
        rate or RATES[optimizer if optimizer in RATES else net],
        Accuracies({"val": pictures_of("val", data), "accuracy": tested}, large),
        _OPTIMIZERS[optimizer],
        list(zip(shown.split(TESTED), tested.labels.split(TESTED), strict=True)),
        **({"views": _views(mode, mixup, pictures, large, teacher_large)} if mode else {}),
    )


def _views(mode: Any, mixup: bool, pictures: Pictures, large: bool, teacher_large: bool) -> Callable[..., Any]:
    """Return the views of a batch of pictures at full resolution."""
    full = pictures.large.shape[-1]
    sides = [full if each else full // 2 for each in (large, teacher_large)]
    if mode == "alone":
        crops = Teaching("consistent", crop=CROP, mixup=False, size=sides[0])
        return lambda images, labels: (crops(images, labels)[0].student, labels)
    return Teaching(mode, crop=CROP, mixup=mixup, size=sides[0], teacher_size=sides[1], classes=nets.CLASSES)


def _plain(net: str, width: float, pictures: Pictures, large: bool, sizes: dict[str, Any]) -> nn.Module:
    channels, side = pictures.large.shape[1], pictures.large.shape[-1] // (1 if large else 2)
    if net == "mlp":
        return nets.mlp(round(width), pixels=channels * side**2, **sizes)
    return nets.conv(round(width), channels=channels, stem=large, **sizes)


def _model(special: str, peers: int, average: bool, net: str, width: int, *about: Any) -> nn.Module:
    if special not in ("", "mutual", "netaug") or (special != "mutual" and (peers != 1 or average)):
        raise DistillError(f"special is 'mutual', which takes peers and average, or 'netaug', got {special!r}")
    if special == "netaug":
        return NetAug(lambda factor: _plain(net, width * factor, *about), example=_example(*about))
    student = _plain(net, width, *about)
    if not special:
        return student
    with isolated_rng():  # the same weights and batches of the student as alone
        torch.manual_seed(torch.initial_seed() + 999)
        others = Peers([_plain(net, width, *about) for _ in range(peers)], average=average)
        return Distiller(student, others, recipe="dml", example=_example(*about))


def _example(pictures: Pictures, large: bool, sizes: Any) -> Tensor:
    return (pictures.large if large else pictures.small)[:2]


def _shampoo(parameters: Any, lr: float) -> torch.optim.Optimizer:
    try:
        from pytorch_optimizer import ScalableShampoo
    except ImportError:
        raise DistillError("Shampoo needs the package pytorch-optimizer: pip install pytorch-optimizer") from None
    # Its update has the norm of SGD with momentum, and its preconditioner is computed anew every ten steps.
    return ScalableShampoo(parameters, lr=lr, start_preconditioning_step=10, preconditioning_compute_steps=10)


_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": ADAMW,
    "shampoo": _shampoo,
}
