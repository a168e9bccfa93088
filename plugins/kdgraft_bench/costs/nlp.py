"""``make bench-nlp``: the costs of distilling the Trainer's models, and the memory that chunked losses save.

A BERT (of base size on a GPU, smaller on a CPU) teaches one of half its depth and width. The weights are random, as costs do not
depend on them. All variants have the same student weights, teacher and batch, and are timed in turn in one process. ``eager maps``
is the usual way to imitate attention: ``attn_implementation="eager"``, ``output_attentions=True`` and a squared error of the maps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from kdgraft import TERMS
from kdgraft_nlp.reader import HFReader
from kdgraft_nlp.recipes import distilbert, minilmv2, pkd, tinybert
from kdgraft_nlp.student import graft

from ..timing import check_device, interleave
from .language import TOKENS, VOCABULARIES, language_model, step
from .methods import methods
from .sharded import sharded_rows
from .steps import Rows, compared, machine, publish, teacher_forward, training_step

SIZES = {"cpu": (8, 128), "cuda": (64, 128)}
"""Sequences and tokens of the batch."""
TEACHERS = {"cpu": (384, 8), "cuda": (768, 12)}
"""Width and layers of the teacher."""
MAPS = dict(type="AttentionMaps", layers="uniform", heads="averaged", of="distributions")
STATES = "bert.encoder[last_hidden_state]"
WITHOUT = ["SoftTargets", *(name for name in TERMS if {"maps", "images", "numbers"} & set(TERMS.needs(name)))]


def _one(term: dict[str, Any]) -> list[Any]:
    return [dict(term)]


VARIANTS: dict[str, Callable[[], list[Any]]] = {
    "SoftTargets": lambda: [dict(type="SoftTargets")],
    "HiddenStates": lambda: [dict(type="HiddenStates")],
    "AttentionMaps": lambda: [MAPS],
    "AttentionMaps, last layer": lambda: [{**MAPS, "layers": "final"}],
    "minilmv2": minilmv2,
    "tinybert": lambda: tinybert(heads="averaged"),
    "distilbert": distilbert,
    "pkd": pkd,
    **{
        name: partial(_one, term)
        for name, term in methods(
            HFReader, STATES, {"WeightMatching": dict(modules="bert.encoder.layer.0")}, WITHOUT
        ).items()
    },
}
"""Variants to time. Terms on maps are left out, as BERT has none."""


def main(pairs: int = 30, device: str = "cpu", out: str = "runs/costs/nlp") -> Rows:
    """Measure, print the tables and write them to ``out``.

    Args:
        pairs: the number of interleaved rounds.
        device: ``"cpu"``, or ``"cuda"`` (bf16 autocast, a larger batch).
        out: the folder for ``bench_cpu.md`` or ``bench_cuda.md``.
    """
    check_device(device)
    (batch, length), (width, layers) = SIZES[device], TEACHERS[device]
    rows = compared(interleave(steps(device, width, layers), pairs, device=device), ["eager maps"])
    models = f"BERT {layers} × {width} teaches {layers // 2} × {width // 2}"
    title = f"{machine(device)}, {models}, {batch} sequences of {length} tokens, {pairs} interleaved rounds, medians with 95 % intervals"
    rounds = max(pairs // 6, 3)
    chunks = [row for vocabulary in VOCABULARIES for row in language_model(vocabulary, rounds, device)]
    held = f"{machine(device)}, a whole training step of a causal model on {TOKENS} tokens, {rounds} interleaved rounds"
    shared = (
        f"{machine(device)}, DistillTrainer with chunked GeneralizedJSD, {VOCABULARIES[0]} entries, medians over steps"
    )
    return publish({title: rows, held: chunks, shared: sharded_rows(device, VOCABULARIES[0])}, device, out)


def steps(device: str, base: int, depth: int) -> dict[str, Callable[[], Any]]:
    """Return the steps to time.

    Args:
        device: the device.
        base: the width of the teacher.
        depth: the number of its layers.
    """
    torch.manual_seed(0)

    def bert(width: int, layers: int, attention: str = "sdpa") -> Any:
        sizes: dict[str, Any] = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64 or 2)
        built: Any = BertForSequenceClassification(BertConfig(**sizes, intermediate_size=4 * width))
        built.set_attn_implementation(attention)
        return built.to(device)

    teacher = bert(base, depth).eval().requires_grad_(False)
    plain = bert(base // 2, depth // 2)
    state = copy.deepcopy(plain.state_dict())

    def student(attention: str = "sdpa") -> Any:
        built = bert(base // 2, depth // 2, attention)
        built.load_state_dict(state)
        return built

    count, length = SIZES[device]
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "input_ids": torch.randint(1000, 30_000, (count, length), generator=generator).to(device),
        "attention_mask": torch.ones(count, length, dtype=torch.long, device=device),
        "labels": torch.zeros(count, dtype=torch.long, device=device),
    }
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}

    found: dict[str, Callable[[], Any]] = {
        "plain": step(plain, inputs, device),
        "teacher forward": teacher_forward(lambda: teacher(**given), device),
        "eager maps": _eager(student("eager"), teacher, inputs, device),
    }
    for name, terms in VARIANTS.items():
        found[name] = step(graft(student(), teacher, terms()), inputs, device)
    return found


def _eager(student: Any, teacher: Any, inputs: dict[str, Tensor], device: str) -> Callable[[], None]:
    slow = copy.deepcopy(teacher)
    slow.set_attn_implementation("eager")
    student.train()
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}

    def loss() -> Tensor:
        with torch.no_grad():
            theirs = slow(**given, output_attentions=True).attentions
        output = student(**inputs, output_attentions=True)
        ratio = len(theirs) // len(output.attentions)
        found: Tensor = output.loss
        for i, own in enumerate(output.attentions):
            found = found + (own.float().mean(1) - theirs[(i + 1) * ratio - 1].float().mean(1)).square().mean()
        return found

    return training_step(loss, student.parameters(), device)
