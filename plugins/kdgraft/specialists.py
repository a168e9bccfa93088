"""Specialists: models that tell apart the classes that a generalist confuses (Hinton et al. 2015, arXiv 1503.02531, section 5).

    >>> groups = confusable_classes(generalist_probabilities, count=2, size=3)      # doctest: +SKIP
    >>> model = specialist_of(generalist, groups[0])                                # doctest: +SKIP
    >>> data = SpecialistData(training_set, labels, groups[0])                      # doctest: +SKIP
    >>> fit(model, DataLoader(data, 32, shuffle=True), F.cross_entropy, epochs=1)   # doctest: +SKIP
    >>> correct_dustbin(model, data.oversampling)                                   # doctest: +SKIP

A :class:`kdgraft.Specialists` source teaches a student what generalist and specialists say together.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from .errors import DistillError, check_number, nearest
from .losses.reduction import upcast

_PASSES = 100
"""The largest number of passes of k-means over the classes; it ends earlier once no class changes its cluster."""
_STEPS = 5000
"""The largest number of steps of :func:`combine_specialists`; it ends earlier at :data:`_CLOSE`."""
_CLOSE = 1e-12
"""The change of a probability in a step below which it is final."""


def confusable_classes(predictions: Tensor | Iterable[Tensor], count: int, size: int | None = None) -> list[list[int]]:
    r"""Return groups of classes that a generalist often predicts together, one for each specialist.

    The columns of the covariance matrix of the predictions are clustered by the on-line version of k-means (section 5.2): a column
    moves the nearest centre, the n-th one that it has had, by 1/n of the way, :math:`c \leftarrow c + (x - c) / n`, in passes over
    all classes until none changes its cluster. The first centre is the longest column, and each further one that which is farthest
    from those before, so that equal predictions give equal groups.

    Args:
        predictions: probabilities of the generalist on the training set or a part of it, ``(N, C)``, or several such batches.
        count: number of specialists.
        size: number of classes of each: those nearest to its centre. Groups may then share classes, as they do in the paper. ``None``
            for the clusters, which share none.

    Returns:
        The classes of each group in rising order.

    Raises:
        DistillError: these are no probabilities, or there are no such groups.
    """
    covariance = _covariance([predictions] if isinstance(predictions, Tensor) else predictions)
    classes = len(covariance)
    check_number("confusable_classes", "count", count, 1, whole=True)
    if size is not None:
        check_number("confusable_classes", "size", size, 2, whole=True)
        if size >= classes:
            raise DistillError(f"confusable_classes: size must be below the number of classes, {classes}, got {size}")
    distances = torch.cdist(covariance, _centres(covariance, count))
    if size is None:
        nearest_centre = distances.argmin(1)
        groups = [torch.nonzero(nearest_centre == k).flatten().tolist() for k in range(count)]
    else:
        groups = [sorted(distances[:, k].argsort(stable=True)[:size].tolist()) for k in range(count)]
    if [] in groups or len({*map(tuple, groups)}) < count:
        raise DistillError(
            f"confusable_classes: the predictions have fewer than {count} groups of classes; give a lower count"
        )
    return groups


def _covariance(batches: Iterable[Tensor]) -> Tensor:
    total, number, products = None, 0, None
    for batch in batches:
        rows = batch.detach().double()
        if rows.ndim != 2 or (rows < 0).any() or ((rows.sum(1) - 1).abs() > 1e-2).any():
            raise DistillError(
                f"confusable_classes: predictions must be probabilities (N, C), such as logits.softmax(1); got {tuple(rows.shape)}"
            )
        total = rows.sum(0) + (0 if total is None else total)
        products = rows.T @ rows + (0 if products is None else products)
        number += len(rows)
    if total is None or products is None or number < 2:
        raise DistillError("confusable_classes: predictions of two samples or more are needed")
    mean = total / number
    return products / number - torch.outer(mean, mean)


def _centres(points: Tensor, count: int) -> Tensor:
    """Return the centres ``(count, D)`` of points ``(N, D)`` by the on-line k-means."""
    chosen = [int(points.norm(dim=1).argmax())]
    for _ in range(count - 1):
        apart = torch.cdist(points, points[chosen]).amin(1)
        if apart.max() <= 1e-12:
            raise DistillError(
                f"confusable_classes: the predictions have fewer than {count} groups of classes; give a lower count"
            )
        chosen.append(int(apart.argmax()))
    centres, seen = points[chosen].clone(), torch.ones(count)
    before: list[int] = []
    for _ in range(_PASSES):
        clusters = []
        for point in points:
            k = int((centres - point).norm(dim=1).argmin())
            seen[k] += 1
            centres[k] += (point - centres[k]) / float(seen[k])
            clusters.append(k)
        if clusters == before:
            break
        before = clusters
    return centres


def specialist_of(generalist: nn.Module, classes: Sequence[int], head: str | None = None) -> nn.Module:
    r"""Return a specialist that starts as a copy of a generalist, with the scores of its classes and, last, of all others.

    The final linear layer keeps the rows of the classes. The row of the dustbin class, which stands for the D others, is the mean of
    their rows, and its bias the mean of their biases plus log D: where the others score alike, that is the log of the sum of their
    exponentials, and the specialist starts with the generalist's probabilities. A model of Hugging Face gets the new number in its
    config, too.

    Args:
        generalist: a classifier whose scores come from a linear layer. It is not changed.
        classes: the numbers of the specialist's classes.
        head: the path of that layer; the last linear layer of the model by default.

    Returns:
        A copy of which all parameters train.

    Raises:
        DistillError: there is no such layer, or it does not have these classes.
    """
    found = copy.deepcopy(generalist).requires_grad_(True)
    path, layer = _head(found, head)
    total = layer.out_features
    own = check_classes("specialist_of", classes, total)
    others = [c for c in range(total) if c not in own]
    made = nn.utils.skip_init(
        nn.Linear, layer.in_features, len(own) + 1, device=layer.weight.device, dtype=layer.weight.dtype
    )
    with torch.no_grad():
        bias = layer.weight.new_zeros(total) if layer.bias is None else layer.bias
        made.weight.copy_(torch.cat([layer.weight[own], layer.weight[others].mean(0, keepdim=True)]))
        made.bias.copy_(torch.cat([bias[own], bias[others].mean()[None] + math.log(len(others))]))
    made.train(layer.training)
    if not path:
        return made
    for told in (getattr(found, "config", None), found):
        if hasattr(told, "num_labels"):  # of Hugging Face
            told.num_labels = len(own) + 1  # type: ignore[union-attr, assignment]
    parent, _, name = path.rpartition(".")
    setattr(found.get_submodule(parent), name, made)
    return found


def correct_dustbin(specialist: nn.Module, oversampling: float, head: str | None = None) -> None:
    """Add the log of the ratio by which its classes were oversampled to the dustbin's logit of a trained specialist, in place.

    In training the dustbin has a share of the samples that is too small by this ratio, against each other class (section 5.3).

    Args:
        specialist: a model of :func:`specialist_of`.
        oversampling: the ratio, :attr:`SpecialistData.oversampling`.
        head: see :func:`specialist_of`.
    """
    check_number("correct_dustbin", "oversampling", oversampling, above=True)
    _, layer = _head(specialist, head)
    if layer.bias is None:
        raise DistillError(
            "correct_dustbin: the final linear layer has no bias; build the specialist with specialist_of"
        )
    with torch.no_grad():
        layer.bias[-1] += math.log(oversampling)


def _head(model: nn.Module, path: str | None) -> tuple[str, nn.Linear]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if path is None and layers:
        return list(layers.items())[-1]
    if path is None or path not in layers:
        told = f"no linear layer {path!r}" if path is not None else "no linear layer"
        raise DistillError(
            f"the {type(model).__name__} has {told}{nearest(path or '', layers)}; a specialist needs one"
        )
    return path, layers[path]


def check_classes(owner: str, classes: Any, total: int | None = None) -> list[int]:
    """Return the classes of a specialist as a list; raise a :class:`DistillError` unless they are some of all classes."""
    own: list[Any] = (
        classes.tolist() if isinstance(classes, Tensor) else list(classes) if isinstance(classes, Iterable) else []
    )
    numbers = all(isinstance(c, int) and not isinstance(c, bool) and c >= 0 for c in own)
    if not own or not numbers or len({*own}) < len(own):
        raise DistillError(
            f"{owner}: the classes of a specialist are a list of different numbers >= 0, got {classes!r}"
        )
    if total is not None and (max(own) >= total or len(own) == total):
        raise DistillError(f"{owner}: the classes of a specialist are some of 0 … {total - 1}, got {own}")
    return own


class SpecialistData(Dataset[Any]):
    r"""The training set of a specialist: each sample of its classes once, and samples of other classes drawn at random.

    With the default share it is half special and half random, as in the paper. The random ones are drawn anew from torch's random
    state each time that they are read. Targets are the places of the classes in ``classes``, and the number of classes for the
    dustbin. Give it to a ``DataLoader`` with ``shuffle=True``.

    Args:
        dataset: yields ``(input, target)`` by index.
        labels: the class of each sample, so that the inputs need not be read to find it.
        classes: the numbers of the specialist's classes.
        share: the share of the special samples, in (0, 1).

    Attributes:
        oversampling: the ratio by which special samples are more frequent, against the others, than in the whole set; for
            :func:`correct_dustbin`.

    Example:
        >>> from kdgraft.specialists import SpecialistData
        >>> whole = [(image, int(c)) for image, c in zip(torch.rand(8, 3), [0, 1, 2, 3, 2, 3, 2, 3])]
        >>> data = SpecialistData(whole, [c for _, c in whole], classes=[0, 1])
        >>> [target for _, target in (data[i] for i in range(len(data)))], data.oversampling
        ([0, 1, 2, 2], 3.0)
    """

    def __init__(
        self, dataset: Any, labels: Sequence[int] | Tensor, classes: Sequence[int], share: float = 0.5
    ) -> None:
        check_number("SpecialistData", "share", share, above=True)
        if share >= 1:
            raise DistillError(f"SpecialistData: share must be below 1, as the dustbin needs samples, got {share!r}")
        own = check_classes("SpecialistData", classes)
        known = [int(label) for label in labels]
        if len(known) != len(dataset):
            raise DistillError(f"SpecialistData: {len(dataset)} samples need as many labels, got {len(known)}")
        self.dataset, self._places = dataset, {c: place for place, c in enumerate(own)}
        self._targets = [self._places.get(label, len(own)) for label in known]
        self._special = [i for i, target in enumerate(self._targets) if target < len(own)]
        self._others = [i for i, target in enumerate(self._targets) if target == len(own)]
        if not self._special or not self._others:
            side = "of its classes" if self._others else "of other classes"
            raise DistillError(
                f"SpecialistData: there is no sample {side} {own}; give it classes that some samples have"
            )
        self._drawn = max(round(len(self._special) * (1 - share) / share), 1)
        self.oversampling = len(self._others) / self._drawn

    def __len__(self) -> int:
        return len(self._special) + self._drawn

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if index < len(self._special):
            sample = self._special[index]
        else:
            sample = self._others[int(torch.randint(len(self._others), ()))]
        return self.dataset[sample][0], self._targets[sample]


def combine_specialists(
    generalist: Tensor, specialists: Sequence[Tensor], classes: Sequence[Sequence[int]], dim: int = -1
) -> Tensor:
    r"""Return the distribution over all classes that is closest to what a generalist and its specialists say (section 5.4, eq. 5).

    .. math:: q = \arg\min_q KL(p_g \| q) + \sum_{m \in A} KL(p_m \| q)

    with :math:`A` the specialists that have the generalist's most probable class, and q summed over the members of the dustbin
    in its KL with :math:`p_m`. The paper descends on the logits of q. The sum is convex in q, and this is the likelihood of
    counts of which some are known for groups of classes alone, so that expectation maximisation has the same, only minimum as its
    limit, without a step size: a dustbin's probability is shared among its members in proportion to q, and q becomes the mean of all
    :math:`1 + |A|` distributions. With one specialist the first step arrives.

    Args:
        generalist: logits ``(…, C, …)``.
        specialists: logits of each specialist, of the same shape but for its own classes and, last, the dustbin, along ``dim``.
        classes: the classes of each.
        dim: the axis of the classes.

    Returns:
        Log-probabilities of the generalist's shape, in float32 or higher.
    """
    moved = upcast(generalist).movedim(dim, -1)
    p = moved.double().softmax(-1).flatten(0, -2)
    said = [logits.movedim(dim, -1).double().softmax(-1).flatten(0, -2) for logits in specialists]
    outside = p.new_ones(len(said), p.shape[-1])
    for row, own in zip(outside, classes, strict=True):
        row[list(own)] = 0
    active = 1 - outside[:, p.argmax(-1)].T  # (N, M)
    known = p
    for m, (logits, own) in enumerate(zip(said, classes, strict=True)):
        known = known.index_add(1, torch.tensor(own, device=p.device), logits[:, :-1] * active[:, m : m + 1])
    dustbin = torch.stack([logits[:, -1] for logits in said], 1) * active
    voices = 1 + active.sum(1, keepdim=True)
    tiny, q = torch.finfo(p.dtype).tiny, p
    for _ in range(_STEPS):
        shares = dustbin / (q @ outside.T).clamp_min(tiny)
        before, q = q, (known + q * (shares @ outside)) / voices
        if (q - before).abs().max() <= _CLOSE:
            break
    return q.clamp_min(tiny).log().to(moved.dtype).view_as(moved).movedim(-1, dim)
