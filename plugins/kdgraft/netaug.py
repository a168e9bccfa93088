"""NetAug: a tiny convolutional net that trains inside wider nets, which share its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from .distiller import DistillOutput
from .distributed import SharedRandom
from .errors import DistillError, WiringError, check_number, is_number
from .isolation import eval_mode, isolated_rng, own_random_stream
from .schedules import Step, build_schedule
from .views import Views, arguments

Make = Callable[..., nn.Module]

AUGMENTED = "augmented"
"""The name of the wider net's output among the peers of a :class:`~kdgraft.DistillOutput`."""
_KEPT = 64
"""The number of nets of drawn widths whose structure is kept; they hold no weights."""


class NetAug(nn.Module):
    r"""A tiny net, trained together with a random wider net of which it is a part (Cai et al. 2022, arXiv 2110.08890).

    A tiny net underfits, so that regularisation such as dropout harms it. NetAug adds supervision instead: in each step a wider net
    is drawn, whose first channels are the tiny net's own, and the step minimises (eq. 2)
    :math:`L(w_t) + \alpha L([w_t, w_i])` with :math:`\alpha` the ``weight``. The weights of all widths are parts of one set:
    a net of fewer channels has the first ones of the widest net.

    Train ``parameters()`` with :func:`kdgraft.fit.fit`, or add the loss of ``peers["augmented"]`` times its share by hand, and save
    :attr:`student`. In eval mode a call runs the tiny net alone. Both passes are kept until the backward pass.

    The tiny net is an ordinary module with its own parameters and running statistics, which only its own passes update. The authors
    share these statistics too, and must therefore estimate them anew for the tiny net; here that is an option at the end, with
    :func:`kdgraft.batchnorm.reestimate_batchnorm`. Nor are channels sorted by importance, as in the authors' code. The wider nets use the statistics of the batch and keep none.

    It has no teacher. To combine it with one, add the loss on :meth:`augmented` to that of a :class:`~kdgraft.Distiller` around
    :attr:`student`.

    Args:
        make: builds the net with the multiplier of its numbers of channels: ``make(width)``, or ``make(*widths)`` with one multiplier
            for each of ``stages``. The number of classes must not depend on it. Modules must be created as usual, without values
            that are read while the net is built, as wider nets are built on torch's meta device.
        widths: the multipliers in rising order; the first one gives the tiny net. A list for each stage where these differ: the
            authors draw widths of 1, 1.8, 2.6 and, within blocks, expansion ratios of 1, 1.6, 2.2, 2.8 times those of the tiny net.
        weight: the weight of the wider net's loss, >= 0; at 0 only the tiny net trains, exactly as it would alone.
        schedule: schedule of this weight, such as ``Stop(75, by="epoch")``, which ends with the tiny net alone.
        stages: number of multipliers that are drawn in each step, and given to ``make``; not needed with a list for each.
        example: a small input for the dry run: a tensor, or a tuple or dict of arguments.

    Attributes:
        student: the tiny net, which is as plain as ``make`` built it.
        epoch: the number of completed epochs, for schedules by epoch; :func:`kdgraft.fit.fit` sets it.

    Raises:
        WiringError: a wider net does not contain the tiny one.

    Example:
        >>> def make(width):
        ...     channels = int(8 * width)
        ...     layers = nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        ...     return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, 5))
        >>> net = NetAug(make, widths=(1, 1.5, 2), example=images)
        >>> out = net(images)
        >>> own, wider = (nn.functional.cross_entropy(y, labels) for y in (out.student, out.peers["augmented"]))
        >>> (out.total(own) + out.peer_shares["augmented"] * wider).backward()
        >>> torch.save(net.student.state_dict(), "tiny.pth")
    """

    def __init__(
        self,
        make: Make,
        widths: Sequence[float] | Sequence[Sequence[float]] = (1, 1.6, 2.2, 2.8),
        *,
        weight: float = 1.0,
        schedule: Any = None,
        stages: int | None = None,
        example: Any,
    ) -> None:
        super().__init__()
        check_number("NetAug", "weight", weight)
        self.weight, self.schedule = float(weight), build_schedule(schedule)
        check_number("NetAug", "weight times the schedule's largest factor", weight * self.schedule.largest)
        self.widths = _widths_by_stage(widths, stages)
        self.epoch = self.iteration = 0
        self._drawn: tuple[float, ...] | None = None
        self._completes = True
        self.student = make(*self._all(0))
        with isolated_rng():
            self._random = SharedRandom()
            widest = make(*self._all(-1))
        if not isinstance(self.student, nn.Module):
            raise WiringError(f"NetAug: make must return a module, got {type(self.student).__name__}")
        self._template = lru_cache(_KEPT)(partial(_structure, make))
        self._check_shapes()
        self.extra = nn.ParameterDict()
        self.extra_buffers = nn.Module()
        self._add_blocks(widest)
        args, kwargs = arguments(example)
        self._check_parts(args, kwargs)

    def forward(self, *args: Any, targets: Any = None, **kwargs: Any) -> DistillOutput:
        """Run the tiny net and, in training, a random wider one.

        Args:
            args, kwargs: arguments of the net.
            targets: not used; :func:`kdgraft.fit.fit` hands them to every module with a ``student``.
        """
        if any(isinstance(given, Views) for given in args):
            raise DistillError("NetAug has no teacher with a view of its own; give it the student's input alone")
        output = self.student(*args, **kwargs)
        if not self.training:
            return DistillOutput(output, {})
        weight = self.weight * self.schedule(Step(self.iteration, self.epoch))
        self.iteration += self._completes
        if weight == 0:  # DDP wants all parameters in the graph; an empty sum, unlike `0 *`, is 0 for any values
            idle = [p.flatten()[:0].sum() for p in self.extra.values()]
            return DistillOutput(output, {"distill.netaug.loss": torch.stack(idle).sum()})
        wider = self.augmented(*args, **kwargs)
        return DistillOutput(output, {}, {AUGMENTED: wider}, peer_shares={AUGMENTED: weight})

    def augmented(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of a wider net of random widths, the same ones on all processes.

        Its dropout has a random stream of its own, so that the tiny net draws the numbers that it would draw alone.
        """
        if self._drawn is None:
            shares = torch.rand(len(self.widths), generator=self._random.of_all_ranks()).tolist()
            self._drawn = tuple(own[int(share * len(own))] for own, share in zip(self.widths, shares, strict=True))
        drawn = self._drawn
        self._drawn = None if self._completes else drawn
        with own_random_stream(self.iteration):
            return self.at_widths(drawn, *args, **kwargs)

    def at_widths(self, multipliers: Sequence[float], *args: Any, **kwargs: Any) -> Any:
        """Return the output of the net of these widths.

        Args:
            multipliers: one for each stage, out of its :attr:`widths`.
            args, kwargs: arguments of the net.
        """
        return self._run(tuple(multipliers), dict(self.extra.items()), args, kwargs)

    @contextmanager
    def part(self, share: float, *, last: bool) -> Iterator[None]:
        """Treat the call in the body as one part of the step's batch, for the accumulation of gradients.

        All parts run the same wider net, and count as one iteration.

        Args:
            share: the part's share of the batch, by which the caller multiplies the losses; not used here.
            last: true for the last part.
        """
        self._completes = last
        try:
            yield
        finally:
            self._completes = True

    def get_extra_state(self) -> dict[str, Any]:
        """Return the number of iterations and the random state of the widths, which ``state_dict`` includes."""
        return {"iteration": self.iteration, "random": self._random.state()}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`get_extra_state`."""
        self.iteration = int(state["iteration"])
        self._random.load(state["random"])

    def _run(
        self,
        multipliers: tuple[float, ...],
        extra: Mapping[str, Tensor],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        template = self._template(*multipliers).train(self.training)
        shapes = _tensors(template)
        added = {**extra, **dict(self.extra_buffers.named_buffers())}
        found = {}
        for name, own in _tensors(self.student).items():
            part = _whole(name, own, added)[tuple(slice(size) for size in shapes[name].shape)]
            # What a pass writes to a buffer, such as running statistics, is not kept.
            found[name] = part if isinstance(own, nn.Parameter) else part.clone()
        return functional_call(template, found, tuple(args), dict(kwargs))

    def _all(self, place: int) -> tuple[float, ...]:
        """Return the widths at one place of each stage's list, or its last one."""
        return tuple(own[min(place, len(own) - 1)] for own in self.widths)

    def _single(self) -> list[tuple[float, ...]]:
        """Return the widths of the widest net, and those of the nets with one wide stage."""
        tiny, widest = self._all(0), self._all(-1)
        alone = [(*tiny[:place], widest[place], *tiny[place + 1 :]) for place in range(len(tiny))]
        return list(dict.fromkeys([widest, *alone]))

    def _check_shapes(self) -> None:
        """Raise a :class:`WiringError` unless the tensors of narrower nets are parts of those of the widest."""
        tiny, widest = _tensors(self.student), _tensors(self._template(*self._all(-1)))
        if all(tensor.shape == tiny[name].shape for name, tensor in widest.items() if name in tiny):
            raise WiringError(
                f"NetAug: {_call(self._all(0))} and {_call(self._all(-1))} have the same shapes; multiply numbers of channels by the width"
            )
        several = [self._all(place) for place in range(1, max(map(len, self.widths)))]
        for multipliers in [*several, *self._single()]:
            _check_part(tiny, _tensors(self._template(*multipliers)), self._all(0), multipliers)
            _check_part(_tensors(self._template(*multipliers)), widest, multipliers, self._all(-1))

    def _add_blocks(self, widest: nn.Module) -> None:
        """Register the tensors that the widest net has beyond the tiny one."""
        owned = _tensors(widest)
        for name, own in _tensors(self.student).items():
            for axis in _wider_axes(own, owned[name]):
                places = [slice(size) if i < axis else slice(None) for i, size in enumerate(own.shape)]
                places[axis] = slice(own.shape[axis], None)
                block = owned[name].detach()[tuple(places)].clone().to(own.device)
                if isinstance(own, nn.Parameter):
                    self.extra[_key(name, axis)] = nn.Parameter(block, own.requires_grad)
                else:
                    self.extra_buffers.register_buffer(_key(name, axis), block)

    @torch.no_grad()
    def _check_parts(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raise a :class:`WiringError` unless wider nets whose added weights are all 0 compute what the tiny net computes."""
        nothing = {name: torch.zeros_like(block) for name, block in self.extra.items()}
        with isolated_rng(), eval_mode(self):
            expected = _outputs(self.student(*args, **kwargs))
            for multipliers in self._single():
                try:
                    found = _outputs(self._run(multipliers, nothing, args, kwargs))
                except (RuntimeError, NotImplementedError) as error:
                    raise WiringError(
                        f"NetAug: {_call(multipliers)} does not run on the example: {_first_line(error)}; all tensors that are no "
                        "parameters must be buffers, and the channels of connected layers must agree"
                    ) from None
                _check_same(expected, found, self._all(0), multipliers)


def _widths_by_stage(widths: Any, stages: int | None) -> tuple[tuple[float, ...], ...]:
    """Return the multipliers of each stage; raise a :class:`DistillError` unless each stage has two or more that rise."""
    if stages is not None:
        check_number("NetAug", "stages", stages, 1, whole=True)
    several = isinstance(widths, (list, tuple)) and bool(widths) and all(isinstance(w, (list, tuple)) for w in widths)
    if several and stages not in (None, len(widths)):
        raise DistillError(f"NetAug: {len(widths)} lists of widths are for as many stages, got stages={stages}")
    found = list(widths) if several else [widths] * (stages or 1)
    for own in found:
        numbers = isinstance(own, (list, tuple)) and len(own) > 1 and all(is_number(w) for w in own)
        if not numbers or own[0] <= 0 or any(a >= b for a, b in pairwise(own)):
            raise DistillError(
                f"NetAug: widths must be two or more rising multipliers, the tiny net's first, got {own!r}"
            )
    return tuple(map(tuple, found))


def _structure(make: Make, *multipliers: float) -> nn.Module:
    """Build a net without weights."""
    try:
        with isolated_rng(), torch.device("meta"):
            return make(*multipliers)
    except (RuntimeError, NotImplementedError) as error:
        raise WiringError(
            f"NetAug: {_call(multipliers)} cannot be built on torch's meta device: {_first_line(error)}; make must only create "
            "modules, without reading values, moving them or loading weights"
        ) from None


def _tensors(net: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a net by name."""
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


def _key(name: str, axis: int) -> str:
    """Return the name of a block; those of registered tensors have no dots."""
    return f"{name.replace('.', '/')}:{axis}"


def _wider_axes(narrow: Tensor, wide: Tensor) -> list[int]:
    return [axis for axis, (a, b) in enumerate(zip(narrow.shape, wide.shape, strict=True)) if a != b]


def _whole(name: str, own: Tensor, added: Mapping[str, Tensor]) -> Tensor:
    """Return a tensor of the widest net: the tiny net's in the first corner, the added blocks around it."""
    found = own
    for axis in reversed(range(own.ndim)):
        if (key := _key(name, axis)) in added:
            found = torch.cat([found, added[key]], axis)
    return found


def _check_part(
    narrow: Mapping[str, Tensor], wide: Mapping[str, Tensor], less: tuple[float, ...], more: tuple[float, ...]
) -> None:
    sides = f"{_call(less)} and {_call(more)}"
    if narrow.keys() != wide.keys():
        odd = sorted(narrow.keys() ^ wide.keys())[0]
        raise WiringError(f"NetAug: only one of {sides} has {odd!r}; the width must change numbers of channels alone")
    for name, tensor in narrow.items():
        a, b = tuple(tensor.shape), tuple(wide[name].shape)
        if len(a) != len(b) or any(x > y for x, y in zip(a, b, strict=True)):
            raise WiringError(
                f"NetAug: {name!r} is {a} in {_call(less)} and {b} in {_call(more)}, of which it is no part; round numbers of "
                "channels so that a wider net never has fewer"
            )


def _outputs(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _check_same(
    expected: Sequence[Tensor], found: Sequence[Tensor], less: tuple[float, ...], more: tuple[float, ...]
) -> None:
    shapes = [[tuple(tensor.shape) for tensor in side] for side in (expected, found)]
    if shapes[0] != shapes[1]:
        raise WiringError(
            f"NetAug: the outputs are {shapes[0]} of {_call(less)} and {shapes[1]} of {_call(more)}; keep the classes out of "
            "what the width multiplies"
        )
    for ours, theirs in zip(expected, found, strict=True):
        scale = float(ours.float().abs().max()) if ours.numel() else 0.0
        if not torch.allclose(ours.float(), theirs.float(), rtol=1e-2, atol=1e-3 * scale):
            raise WiringError(
                f"NetAug: with all added weights at 0, {_call(more)} does not compute what {_call(less)} computes, so that the "
                "tiny net is no part of it; widen no concatenated maps, no convolutions of a fixed number of groups, and no "
                "norms over several channels"
            )


def _call(multipliers: Sequence[float]) -> str:
    return f"make({', '.join(f'{m:g}' for m in multipliers)})"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".")
