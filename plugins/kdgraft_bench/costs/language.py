"""The costs of distilling causal language models, beside TRL's own distillation and with a teacher that ran before.

A Llama of random weights teaches one of half its width. Losses over a vocabulary are most of such a step on a CPU.
"""

from __future__ import annotations

import copy
import gc
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from kdgraft.hosts import installed
from kdgraft_nlp import DistillTrainer, Stored, fill_store
from kdgraft_nlp.chunked import tokens_at_once
from kdgraft_nlp.data import train_tokenizer
from kdgraft_nlp.link import link_of
from kdgraft_nlp.student import graft
from kdgraft_nlp.tokens import read_batch

from ..timing import interleave, median_interval, peak_memory, ratio_interval
from .steps import Rows, training_step

JSD: dict[str, Any] = dict(type="GeneralizedJSD", beta=0.5)
FORWARD: dict[str, Any] = dict(type="GeneralizedJSD", beta=0.0)
"""The forward KL under the name by which TRL knows it too."""
TOKENS = 512
VOCABULARIES = (32_768, 131_072)
WIDTH = 256


def llama(width: int, vocabulary: int, device: str) -> Any:
    """Return a causal model of two layers with random weights."""
    sizes: dict[str, Any] = dict(
        hidden_size=width, num_hidden_layers=2, num_attention_heads=4, intermediate_size=2 * width
    )
    config = LlamaConfig(**sizes, num_key_value_heads=4, vocab_size=vocabulary, pad_token_id=0)
    built: Any = LlamaForCausalLM(config)
    return built.to(device)


def step(model: Any, inputs: dict[str, Tensor], device: str) -> Callable[[], None]:
    """Return a training step of a plain or a distilled model."""
    model.train()

    def loss() -> Tensor:
        output = model(**inputs)
        losses = [value for key, value in (output.get("distill") or {}).items() if key.endswith(".loss")]
        return output.loss + sum(losses)

    return training_step(loss, [one for one in model.parameters() if one.requires_grad], device)


def language_model(vocabulary: int, rounds: int, device: str, width: int = WIDTH) -> Rows:
    """Measure a whole step at one size of the vocabulary, of our losses and of TRL's where it is installed.

    ``no labels`` leaves out the cross-entropy to the labels, which TRL's distillation does not have; the ``stored`` teacher does not
    run, and its 50 largest probabilities of each token come from a store; ``LoRA`` trains adapters of rank 8 in all layers, and with
    ``its own base`` the student without them teaches.
    """
    torch.manual_seed(0)
    teacher = llama(2 * width, vocabulary, device).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, vocabulary, (4, TOKENS // 4), generator=generator)
    inputs = {"input_ids": ids.to(device), "labels": ids.to(device)}
    state = copy.deepcopy(llama(width, vocabulary, device).state_dict())
    chunk = tokens_at_once(teacher)

    def plain() -> Any:
        model = llama(width, vocabulary, device)
        model.load_state_dict(state)
        return model

    def student(
        given: Any, chunk: int | None, term: dict[str, Any] = JSD, host_weight: float = 1.0, lora: bool = False
    ) -> Any:
        model = graft(_adapted(plain()) if lora else plain(), given, [dict(term)], chunk=chunk)
        link_of(model).host_weight = host_weight
        counts = model.distiller.counts(read_batch(inputs, "causal"))
        link_of(model).totals = {name: n.to(device) for name, n in counts.items()}
        return model

    with tempfile.TemporaryDirectory() as scratch:
        stored = _stored(Path(scratch), plain(), teacher, ids)
        models = {
            "no distillation": plain(),
            "plain losses": student(teacher, None),
            "chunked": student(teacher, chunk),
            "stored teacher": student(stored, None),
            "stored teacher, chunked": student(stored, chunk),
        }
        if installed("peft"):
            models["LoRA, chunked"] = student(teacher, chunk, lora=True)
            models["LoRA, its own base, chunked"] = student("base", chunk, lora=True)
        models["chunked, no labels"] = student(teacher, chunk, host_weight=0.0)
        models["chunked, forward KL, no labels"] = student(teacher, chunk, FORWARD, 0.0)
        found = {name: step(model, inputs, device) for name, model in models.items()}
        if installed("trl"):
            for title, term in (("TRL, no labels", JSD), ("TRL, forward KL, no labels", FORWARD)):
                found[title] = _trl(Path(scratch) / title[5:12], plain(), teacher, inputs, device, term["beta"])
        return _measured(found, rounds, vocabulary, device)


def _adapted(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))


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


def _trl(
    folder: Path, student: Any, teacher: Any, inputs: dict[str, Tensor], device: str, beta: float
) -> Callable[[], None]:
    """Return a step of TRL's own distillation on the same batch, all tokens of which but the first are completions."""
    from trl import DistillationConfig, DistillationTrainer

    told = dict(report_to=[], disable_tqdm=True, use_cpu=device == "cpu", bf16=False, activation_checkpointing=False)
    tokenizer = train_tokenizer(["a text"], vocab_size=300)
    tokenizer.eos_token, tokenizer.padding_side = tokenizer.sep_token, "left"
    trainer = DistillationTrainer(
        model=student,
        teacher_model=copy.deepcopy(teacher),
        args=DistillationConfig(str(folder), beta=beta, per_device_train_batch_size=4, **told),
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
