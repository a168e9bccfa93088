"""Attention under fast kernels: queries, keys and scores of the chosen layers while the model runs sdpa or flash attention.

Models of Hugging Face look up the kernel of each attention module at every call. During a recorded pass this lookup is
intercepted, so that a tap ``encoder.layer.3.attention.self.attention()`` reads the inputs of the module's kernel (an
:class:`AttentionCall`): before the softmax, before dropout, after rotary embeddings. The model keeps its own kernel, layers
without a tap cost nothing, and neither the model nor its config is changed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from kdgraft.errors import WiringError
from kdgraft.losses import upcast
from kdgraft.recorder import Listener, Recorder
from kdgraft.taps import Recording, Site, Tap

METHOD = "attention"
"""The tap ``<module>.attention()`` reads the inputs that an attention module passes to its kernel."""

STUDENT_FORWARD = "plain_forward"
"""The method that a tap of the whole student records, since the student's ``forward`` is the one that distils."""

Stack = Literal["layers", "encoder", "decoder", "cross"]


class AttentionCall(NamedTuple):
    """The inputs that an attention module passes to its kernel.

    Attributes:
        query: ``(B, H, Q, d)``.
        key, value: ``(B, H_kv, K, d)``; H_kv divides H (grouped-query attention).
        mask: boolean (true: may attend), additive, or ``None``; broadcasts to ``(B, H, Q, K)``.
        scaling: the factor of QKᵀ.
        bias: added to the scaled scores (T5's position bias), or ``None``.
        causal: each query attends only to the keys up to its own position.
        softcap: the scores become ``softcap · tanh(scores / softcap)``; ``None``: they are not capped.
        window: each query attends only to keys less than this many positions away; ``None``: to all. A mask includes the window.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    bias: Tensor | None
    causal: bool
    softcap: float | None
    window: int | None = None

    @property
    def heads(self) -> int:
        """The number of query heads."""
        return self.query.shape[1]

    def scores(self) -> Tensor:
        """Return the scores before mask and softmax, ``(B, H, Q, K)``, in at least float32."""
        query, key = (upcast(x) for x in (self.query, self.key))
        batch, heads, length, width = query.shape
        groups = key.shape[1]
        with torch.autocast(query.device.type, enabled=False):
            grouped = query.reshape(batch, groups, heads // groups * length, width)
            scores = (grouped @ key.transpose(-1, -2)).view(batch, heads, length, -1) * self.scaling
        if self.bias is not None:
            scores = scores + self.bias
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        return scores

    def mean_scores(self) -> Tensor:
        """Return the mean of :meth:`scores` over the heads, ``(B, 1, Q, K)``, without those of each head where they add up."""
        if self.softcap is not None:
            return self.scores().mean(1, keepdim=True)
        query, key = (upcast(x) for x in (self.query, self.key))
        batch, heads, length, width = query.shape
        groups = key.shape[1]
        with torch.autocast(query.device.type, enabled=False):
            # Heads that share a key add up before the product, and the others in it.
            added = query.reshape(batch, groups, heads // groups, length, width).sum(2)
            both = (x.transpose(1, 2).flatten(2) for x in (added, key))
            first, second = both
            scores = (first @ second.mT)[:, None] * (self.scaling / heads)
        return scores if self.bias is None else scores + self.bias.mean(1, keepdim=True)

    def vectors(self, which: str) -> Tensor:
        """Return ``"query"``, ``"key"`` or ``"value"`` with all heads side by side: ``(B, L, H·d)``."""
        return getattr(self, which).transpose(1, 2).flatten(2)

    def allowed(self) -> Tensor | None:
        """Return the keys that the kernel lets each query attend to, broadcastable to ``(B, H, Q, K)``; ``None``: all."""
        queries, keys = self.query.shape[-2], self.key.shape[-2]
        found = None
        if self.mask is not None and self.mask.ndim == 4:
            low = torch.finfo(self.mask.dtype).min / 2 if self.mask.is_floating_point() else 0
            found = (self.mask if self.mask.dtype == torch.bool else self.mask > low)[..., :keys]
        shape, device = (queries, keys), self.query.device
        if self.causal and found is None:  # kernels that are given a mask ignore the causal flag
            found = torch.ones(shape, dtype=torch.bool, device=device).tril(keys - queries)
        if self.window is not None:
            away = torch.arange(queries, device=device)[:, None] + (keys - queries) - torch.arange(keys, device=device)
            near = away.abs() < self.window
            found = near if found is None else found & near
        return found


@dataclass(frozen=True)
class Layer:
    """A layer of a stack: its path, and the path of its attention module."""

    path: str
    attention: str


def stacks(model: nn.Module) -> dict[str, list[Layer]]:
    """Return the stacks of layers that contain attention, each in order.

    Returns:
        ``layers`` for a model with one stack; ``encoder``, ``decoder`` and ``cross`` for a model with two.
    """
    found: dict[str, dict[str, list[Layer]]] = {}
    lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    both = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    for path, module in model.named_modules():
        if not is_attention(module):
            continue
        parts = path.split(".")
        depth = next((n for n in range(1, len(parts)) if ".".join(parts[:n]) in lists), None)
        if depth is None:
            continue
        here = ".".join(parts[depth + 1 :]) + type(module).__name__
        cross = any(word in here.lower() for word in ("cross", "encdec", "encoder_attn"))
        name = "cross" if cross else "layers" if not both else "decoder" if "decoder" in parts else "encoder"
        where = found.setdefault(name, {})
        where.setdefault(".".join(parts[:depth]), []).append(Layer(".".join(parts[: depth + 1]), path))
    return {name: _one_of(model, name, groups) for name, groups in found.items()}


def _one_of(model: nn.Module, name: str, groups: dict[str, list[Layer]]) -> list[Layer]:
    """Return the layers of a stack; where a model has several towers, the layers of its text tower."""
    if len(groups) == 1:
        return next(iter(groups.values()))
    text = [path for path in groups if any(word in path for word in ("language_model", "text_model", "decoder"))]
    if len(text) != 1:
        raise WiringError(
            f"{type(model).__name__} has several stacks of layers ({', '.join(groups)}); use FeatureImitation with taps of your own"
        )
    return groups[text[0]]


def drops_layers(model: nn.Module, taps: Sequence[Tap]) -> bool:
    """Return whether training skips a tapped layer in some steps (LayerDrop; Fan et al. 2019, arXiv 1909.11556)."""
    for tap in taps:
        parts = [*tap.path.split("."), *map(str, tap.index[:1])]
        for place in (n for n, part in enumerate(parts) if n and part.isdigit()):
            if not isinstance(model.get_submodule(".".join(parts[:place])), nn.ModuleList):
                continue
            owner = model.get_submodule(".".join(parts[: place - 1]))
            known = vars(owner) if "layerdrop" in vars(owner) else vars(getattr(owner, "config", owner))
            if any(name.endswith("layerdrop") and share for name, share in known.items()):
                return True
    return False


def is_attention(module: nn.Module) -> bool:
    """Return whether a module computes attention whose inputs can be recorded."""
    return _uses_interface(module) or _is_disentangled(module)


def _uses_interface(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _is_disentangled(module: nn.Module) -> bool:
    return all(
        hasattr(module, name) for name in ("query_proj", "key_proj", "value_proj", "disentangled_attention_bias")
    )


class AttentionRecorder(Recorder):
    """A recorder of ordinary taps and of the inputs of attention kernels."""

    differentiable = frozenset({"forward", METHOD, STUDENT_FORWARD})

    def resolve(self, model: nn.Module, tap: Tap) -> list[Site]:
        if tap.path == "" and tap.method == "forward" and hasattr(model, STUDENT_FORWARD):
            return [Site(model, "", STUDENT_FORWARD)]
        if tap.method != METHOD:
            return super().resolve(model, tap)
        try:
            module = model.get_submodule(tap.path)
        except AttributeError:
            return super().resolve(model, tap)  # its error names the nearest paths
        if not is_attention(module):
            known = [layer.attention for layers in stacks(model).values() for layer in layers]
            raise WiringError(
                f"{type(module).__name__} at '{tap.path}' of the {self.owner} is not an attention module that can be recorded"
                + (f"; these can: {', '.join(known[:6])}" if known else "")
            )
        return [Site(module, tap.path, METHOD)]

    def attach(self, source: Site, hear: Listener) -> Callable[[], None]:
        if source.method != METHOD:
            return super().attach(source, hear)
        if _uses_interface(source.module):
            return _listen(source.module, hear)
        return _attach_disentangled(source.module, hear)


_heard: dict[int, Listener] = {}
"""The listeners of the attention modules that are being recorded, by the module's id."""


def _listen(module: nn.Module, hear: Listener) -> Callable[[], None]:
    if not _heard:
        _patch()
    _heard[id(module)] = hear

    def undo() -> None:
        del _heard[id(module)]
        if not _heard:
            _unpatch()

    return undo


_original: list[Any] = []


def _patch() -> None:
    look_up = AttentionInterface.get_interface
    _original.append(look_up)

    def get_interface(self: AttentionInterface, implementation: str, default: Callable[..., Any]) -> Any:
        kernel = look_up(self, implementation, default)

        def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **settings: Any) -> Any:
            hear = _heard.get(id(module))
            if hear is None:
                return kernel(module, query, key, value, mask, **settings)
            call = _read(module, query, key, value, mask, settings)
            output: list[Any] = []

            def run(*_: Any) -> AttentionCall:
                output.append(kernel(module, query, key, value, mask, **settings))
                return call

            hear(run, (), {})
            return output[0]

        return attend

    AttentionInterface.get_interface = get_interface  # type: ignore[method-assign, assignment]


def _unpatch() -> None:
    AttentionInterface.get_interface = _original.pop()  # type: ignore[method-assign, assignment]


def _read(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, settings: dict[str, Any]
) -> AttentionCall:
    scaling = settings.get("scaling")
    causal = settings.get("is_causal")
    causal = getattr(module, "is_causal", False) if causal is None else causal
    return AttentionCall(
        query,
        key,
        value,
        mask if isinstance(mask, Tensor) else None,
        query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        settings.get("position_bias"),
        bool(causal),
        settings.get("softcap"),
        settings.get("sliding_window"),
    )


def _attach_disentangled(module: Any, hear: Listener) -> Callable[[], None]:
    """Record DeBERTa, which looks up no kernel: two methods of the module return QKᵀ's inputs and a relative position bias."""
    before = vars(module).get("forward")
    forward = module.forward

    def shadow(*args: Any, **kwargs: Any) -> Any:
        output: list[Any] = []

        def run(*_: Any) -> AttentionCall:
            with (
                _overheard(module, "transpose_for_scores") as split,
                _overheard(module, "disentangled_attention_bias") as biases,
            ):
                output.append(forward(*args, **kwargs))
            heads = module.num_attention_heads
            query, key, value = (x.view(-1, heads, *x.shape[-2:]) for x in split[:3])
            factor = 1 + sum(kind in module.pos_att_type for kind in ("c2p", "p2c"))
            bias = biases[0].view(-1, heads, *biases[0].shape[-2:]) if biases else None
            mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
            mask = mask.bool() if isinstance(mask, Tensor) else None
            return AttentionCall(query, key, value, mask, 1 / math.sqrt(query.shape[-1] * factor), bias, False, None)

        hear(run, (), {})
        return output[0]

    object.__setattr__(module, "forward", shadow)

    def undo() -> None:
        if before is None:
            object.__delattr__(module, "forward")
        else:
            object.__setattr__(module, "forward", before)

    return undo


@contextmanager
def _overheard(module: nn.Module, method: str) -> Iterator[list[Any]]:
    """Collect the return values of a method while the body runs."""
    original, found = getattr(module, method), []

    def listening(*args: Any, **kwargs: Any) -> Any:
        found.append(original(*args, **kwargs))
        return found[-1]

    object.__setattr__(module, method, listening)
    try:
        yield found
    finally:
        object.__delattr__(module, method)


def attention_call(recording: Recording, tap: Tap) -> AttentionCall:
    """Return the single attention call that a tap recorded.

    Raises:
        WiringError: the module ran more than once, because layers share it.
    """
    call = recording[tap]
    if not isinstance(call, AttentionCall):
        raise WiringError(
            f"tap '{tap}' of the {recording.owner}: layers share this attention, and its scores are not those of one layer; use HiddenStates"
        )
    return call


def layer_pairs(spec: Any, students: int, teachers: int, who: str) -> list[tuple[int, int]]:
    """Return the pairs of a student's layer and the teacher's layer that it learns from, both counted from 0.

    Args:
        spec: ``"uniform"`` (every N/M-th layer, TinyBERT), ``"last"`` (the teacher's last layers, in order), ``"skip"`` (as
            uniform, without the final layer: PKD-Skip), ``"final"`` (the last layer alone, MiniLM), or pairs
            ``[(student, teacher), …]``, negative from the end.
        students, teachers: the numbers of layers.
        who: the name of the term, for messages.

    Raises:
        WiringError: a layer does not exist, or the rule does not fit these depths.
    """
    if isinstance(spec, str):
        return _pairs_by_rule(spec, students, teachers, who)
    if not isinstance(spec, Sequence) or not all(isinstance(p, Sequence) and len(p) == 2 for p in spec) or not spec:
        raise WiringError(f"{who}: layers must be the name of a rule or pairs [(student, teacher), …], got {spec!r}")
    found = []
    for pair in spec:
        for index, count, owner in zip(pair, (students, teachers), ("student", "teacher"), strict=True):
            if isinstance(index, bool) or not isinstance(index, int) or not -count <= index < count:
                raise WiringError(f"{who}: the {owner} has layers 0 to {count - 1}, got {index!r} in {tuple(pair)}")
        found.append((pair[0] % students, pair[1] % teachers))
    return found


def _pairs_by_rule(rule: str, students: int, teachers: int, who: str) -> list[tuple[int, int]]:
    if rule not in ("uniform", "last", "skip", "final"):
        raise WiringError(f"{who}: layers must be 'uniform', 'last', 'skip', 'final' or pairs of numbers, got {rule!r}")
    if rule == "final":
        return [(students - 1, teachers - 1)]
    if students > teachers:
        raise WiringError(
            f"{who}: layers={rule!r} needs a teacher at least as deep as the student, got {teachers} and {students} "
            "layers; give pairs, layers=[(student, teacher), …], or layers='final'"
        )
    if rule == "last":
        return [(i, i + teachers - students) for i in range(students)]
    if rule == "skip" and students < 2:
        raise WiringError(f"{who}: layers='skip' leaves out the final layer, and the student has no other")
    pairs = [(i, math.ceil((i + 1) * teachers / students) - 1) for i in range(students)]
    return pairs[:-1] if rule == "skip" else pairs
