"""``make bench-nlp``: the costs of distilling the Trainer's models, and the memory that chunked losses save.

A BERT (of base size on a GPU, smaller on a CPU) teaches one of half its depth and width. The weights are random, as costs do not
depend on them. All variants have the same student weights, teacher and batch, and are timed in turn in one process. ``eager maps``
is the usual way to imitate attention: ``attn_implementation="eager"``, ``output_attentions=True`` and a squared error of the maps.
"""

from __future__ import annotations

import copy
import gc
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, TrainingArguments

from kdgraft import TERMS
from kdgraft.hosts import installed
from kdgraft_nlp import DistillTrainer, Stored, fill_store
from kdgraft_nlp.data import train_tokenizer
from kdgraft_nlp.link import link_of
from kdgraft_nlp.reader import HFReader
from kdgraft_nlp.recipes import distilbert, minilmv2, pkd, tinybert
from kdgraft_nlp.student import graft
from kdgraft_nlp.tokens import read_batch

from ..timing import check_device, interleave, median_interval, peak_memory, ratio_interval
from .methods import methods
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
JSD: dict[str, Any] = dict(type="GeneralizedJSD", beta=0.5)
LM_TOKENS = 1024
LM_VOCABULARIES = (32_768, 131_072)


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
    chunks = [row for vocabulary in LM_VOCABULARIES for row in language_model(vocabulary, pairs, device)]
    held = f"{machine(device)}, a whole training step of a causal model on {LM_TOKENS} tokens with GeneralizedJSD, {max(pairs // 6, 3)} rounds"
    return publish({title: rows, held: chunks}, device, out)


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


def step(model: Any, inputs: dict[str, Tensor], device: str) -> Callable[[], None]:
    """Return a training step of a plain or a distilled model."""
    model.train()

    def loss() -> Tensor:
        output = model(**inputs)
        losses = [value for key, value in (output.get("distill") or {}).items() if key.endswith(".loss")]
        return output.loss + sum(losses)

    return training_step(loss, model.parameters(), device)


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


def language_model(vocabulary: int, pairs: int, device: str, width: int = 256) -> Rows:
    """Measure a whole step at one size of the vocabulary, of our losses and of TRL's where it is installed.

    ``no labels`` leaves out the cross-entropy to the labels, which TRL's distillation does not have; the ``stored`` teacher does not
    run, and its 50 largest probabilities of each token come from a store.
    """
    torch.manual_seed(0)

    def llama(hidden: int, layers: int) -> Any:
        sizes: dict[str, Any] = dict(
            hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=2 * hidden
        )
        built: Any = LlamaForCausalLM(
            LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=vocabulary, pad_token_id=0)
        )
        return built.to(device)

    teacher = llama(2 * width, 2).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, vocabulary, (4, LM_TOKENS // 4), generator=generator)
    inputs = {"input_ids": ids.to(device), "labels": ids.to(device)}
    state = copy.deepcopy(llama(width, 2).state_dict())

    def student(given: Any, chunk: int | None, host_weight: float = 1.0) -> Any:
        model = llama(width, 2)
        model.load_state_dict(state)
        if given is None:
            return model
        model = graft(model, given, [dict(JSD)], chunk=chunk)
        link_of(model).host_weight = host_weight
        counts = model.distiller.counts(read_batch(inputs, "causal"))
        link_of(model).totals = {name: n.to(device) for name, n in counts.items()}
        return model

    with tempfile.TemporaryDirectory() as scratch:
        stored = _stored(Path(scratch), llama(width, 2), teacher, ids)
        models = {
            "no distillation": student(None, None),
            "plain losses": student(teacher, None),
            "chunked": student(teacher, 256),
            "chunked, no labels": student(teacher, 256, 0.0),
            "stored teacher": student(stored, None),
            "stored teacher, chunked": student(stored, 256),
        }
        found = {name: step(model, inputs, device) for name, model in models.items()}
        if (theirs := _trl(Path(scratch), student(None, None), teacher, inputs, device)) is not None:
            found["TRL, no labels"] = theirs
        return _measured(found, max(pairs // 6, 3), vocabulary, device)


def _measured(steps: dict[str, Callable[[], None]], rounds: int, vocabulary: int, device: str) -> Rows:
    seconds = interleave(steps, rounds, warm_up=1, device=device)
    peaks = {}
    for name, run in steps.items():
        gc.collect()
        peaks[name] = peak_memory(run, device) / 2**20
    return [
        {
            "vocabulary": str(vocabulary),
            "step": name,
            "ms": f"{median_interval(values).median * 1e3:.0f}",
            "/ plain losses": str(ratio_interval(values, seconds["plain losses"])),
            "/ no distillation": str(ratio_interval(values, seconds["no distillation"])),
            "peak (MiB)": f"{peaks[name]:.0f}",
            "peak / plain losses": f"{peaks[name] / peaks['plain losses']:.3f}",
        }
        for name, values in seconds.items()
    ]


def _stored(folder: Path, student: Any, teacher: Any, ids: Tensor) -> Stored:
    """Return a teacher whose outputs are in a store."""
    rows = [{"input_ids": row.tolist()} for row in ids]
    args = TrainingArguments(str(folder), report_to=[], disable_tqdm=True, use_cpu=ids.device.type == "cpu")
    trainer = DistillTrainer(
        model=student,
        teacher=teacher,
        terms=[dict(JSD)],
        args=args,
        train_dataset=rows,
        data_collator=lambda features: {"input_ids": torch.tensor([one["input_ids"] for one in features])},
    )
    fill_store(trainer, folder / "store", progress=False)
    return Stored(folder / "store")


def _trl(folder: Path, student: Any, teacher: Any, inputs: dict[str, Tensor], device: str) -> Callable[[], None] | None:
    """Return a step of TRL's own distillation on the same batch, all tokens of which but the first are completions."""
    if not installed("trl"):
        return None
    from trl import DistillationConfig, DistillationTrainer

    told = dict(report_to=[], disable_tqdm=True, use_cpu=device == "cpu", bf16=False, activation_checkpointing=False)
    tokenizer = train_tokenizer(["a text"], vocab_size=300)
    tokenizer.eos_token, tokenizer.padding_side = tokenizer.sep_token, "left"
    trainer = DistillationTrainer(
        model=student,
        teacher_model=copy.deepcopy(teacher),
        args=DistillationConfig(str(folder / "trl"), beta=JSD["beta"], per_device_train_batch_size=4, **told),
        train_dataset=Dataset.from_dict({"prompt": ["a text"] * 4}),
        processing_class=tokenizer,
    )
    ids = inputs["input_ids"]
    mask = torch.ones_like(ids)
    parts = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": mask[:, :1],
        "completion_ids": ids[:, 1:],
        "completion_mask": mask[:, 1:],
    }
    model: Any = trainer.model.train()
    return training_step(lambda: trainer.compute_loss(model, dict(parts)), model.parameters(), device)
