"""Small real Hugging Face models and data for the tests."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, TrainingArguments

import kdgraft_nlp  # noqa: F401
from support.commands import refused as refused_by_all
from support.tensors import gradients

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

refused = partial(refused_by_all, progress=True)
VOCABULARY = 40
TASKS: dict[str, tuple[str, str]] = {
    "bert": ("BertForSequenceClassification", "sequence"),
    "distilbert": ("DistilBertForSequenceClassification", "sequence"),
    "roberta": ("RobertaForMaskedLM", "masked"),
    "electra": ("ElectraForTokenClassification", "tokens"),
    "deberta": ("DebertaV2ForSequenceClassification", "sequence"),
    "gpt2": ("GPT2LMHeadModel", "causal"),
    "llama": ("LlamaForCausalLM", "causal"),
    "qwen": ("Qwen3ForCausalLM", "causal"),
    "t5": ("T5ForConditionalGeneration", "seq2seq"),
    "vit": ("ViTForImageClassification", "image"),
}
"""Family -> the class under test and its task."""


def model(
    family: str, width: int = 16, layers: int = 2, heads: int = 4, seed: int = 0, kind: str = "", **settings: Any
) -> Any:
    """A small model with random weights.

    Args:
        family: one of ``TASKS``.
        kind: another class of the family, such as ``"BertForQuestionAnswering"``.
    """
    kind = kind or TASKS[family][0]
    sizes: dict[str, Any] = dict(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=2 * width,
        vocab_size=VOCABULARY,
    )
    if family == "distilbert":
        sizes = dict(dim=width, n_layers=layers, n_heads=heads, hidden_dim=2 * width, vocab_size=VOCABULARY)
    elif family == "gpt2":
        sizes = dict(n_embd=width, n_layer=layers, n_head=heads, vocab_size=VOCABULARY)
    elif family == "t5":
        sizes = dict(
            d_model=width,
            d_kv=width // heads,
            num_layers=layers,
            num_heads=heads,
            d_ff=2 * width,
            vocab_size=VOCABULARY,
        )
        sizes["decoder_start_token_id"] = 0
    elif family == "electra":
        sizes["embedding_size"] = 8
    elif family == "vit":
        del sizes["vocab_size"]
        sizes.update(image_size=16, patch_size=8)
    elif family in ("llama", "qwen"):
        sizes["num_key_value_heads"] = heads // 2
        if family == "qwen":
            sizes["head_dim"] = width // heads
    elif family == "deberta":
        sizes.update(
            relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8, max_relative_positions=16
        )
    if family not in ("gpt2", "t5", "vit"):
        sizes["max_position_embeddings"] = 64
    if any(word in kind for word in ("SequenceClassification", "TokenClassification", "ImageClassification")):
        sizes["num_labels"] = 3
    found = getattr(transformers, kind)
    torch.manual_seed(seed)
    built = found(found.config_class(**{**sizes, **settings}))
    # Freshly initialised models say nothing much: make their layers and heads matter.
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim > 1 and family != "t5":
                parameter.mul_(4)
    return built


def samples(count: int = 8, task: str = "sequence", seed: int = 0, longest: int = 9) -> list[dict[str, Any]]:
    """Samples of different lengths, from 3 tokens on, with labels of the task."""
    draw = random.Random(seed)
    found = []
    for i in range(count):
        ids = [1] + [draw.randrange(5, VOCABULARY) for _ in range(2 + i % (longest - 2))]
        sample: dict[str, Any] = {"input_ids": ids}
        if task == "sequence":
            sample["labels"] = i % 3
        elif task == "tokens":
            sample["labels"] = [-100] + [draw.randrange(3) for _ in ids[1:]]
        elif task == "question":
            sample.update(start_positions=draw.randrange(len(ids)), end_positions=draw.randrange(len(ids)))
        elif task == "masked":
            sample["labels"] = [token if draw.random() < 0.5 else -100 for token in ids]
        elif task == "causal":
            sample["labels"] = [-100, *ids[1:]]
        elif task == "seq2seq":
            sample["labels"] = [draw.randrange(5, VOCABULARY) for _ in range(2 + i % 3)]
        elif task == "image":
            generator = torch.Generator().manual_seed(seed * 100 + i)
            sample = {"pixel_values": torch.rand(3, 16, 16, generator=generator), "labels": i % 3}
        found.append(sample)
    return found


def collate(features: list[dict[str, Any]], extra: int = 0) -> dict[str, Tensor]:
    """Pads on the right, by ``extra`` tokens more than needed."""
    batch: dict[str, Tensor] = {}
    for name in features[0]:
        values = [feature[name] for feature in features]
        if isinstance(values[0], Tensor):
            batch[name] = torch.stack(values)
        elif isinstance(values[0], list):
            length = max(map(len, values)) + extra
            fill = 0 if name == "input_ids" else -100
            batch[name] = torch.tensor([value + [fill] * (length - len(value)) for value in values])
            if name == "input_ids":
                batch["attention_mask"] = torch.tensor([[1] * len(v) + [0] * (length - len(v)) for v in values])
        else:
            batch[name] = torch.tensor(values)
    return batch


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    """Training arguments of a short, quiet run on the CPU."""
    defaults: dict[str, Any] = dict(
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
        seed=1,
    )
    return TrainingArguments(str(folder), **{**defaults, **settings})


def quiet(built: nn.Module) -> nn.Module:
    """The model without any dropout."""
    for module in built.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout"):
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 0.0)
    return built


def by_word(side="right"):
    """[CLS] w w w [SEP]"""
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", "the", "cat", "sat", "a", "dog", "on"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        mask_token="[MASK]",
        padding_side=side,
        model_max_length=32,
    )


def by_letter(side="left"):
    """One token a character, spaces too, no special tokens, padded on the left by default."""
    letters = ["<pad>", *"abcdefghijklmnopqrstuvwxyz "]
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, []))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", padding_side=side, model_max_length=64
    )


def loss_of(student: Any, batch: Any) -> Tensor:
    """The sum of the distillation losses of one pass of a grafted student."""
    student(**batch)
    return torch.stack([v for k, v in student.distill_link.last.losses.items() if k.endswith(".loss")]).sum()


def distilled_step(student: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The distillation loss of a grafted student and its gradient, alone."""
    student.zero_grad()
    loss = loss_of(student, batch)
    loss.backward()
    return loss.detach(), gradients(student)


def same_step(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> None:
    """Compare two results of :func:`distilled_step`; a gradient that one lacks is 0."""
    torch.testing.assert_close(one[0], other[0], rtol=1e-4, atol=1e-6)
    for name in one[1].keys() | other[1].keys():
        a, b = (found[1].get(name, torch.zeros(())) for found in (one, other))
        torch.testing.assert_close(
            *torch.broadcast_tensors(a, b), rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def built(kind: str, seed: int, **settings: Any) -> Any:
    """A small random model of a class of the library, without dropout."""
    found = getattr(transformers, kind)
    torch.manual_seed(seed)
    model = quiet(found(found.config_class(**settings)))
    with torch.no_grad():  # freshly initialised models say nothing much
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


def outputs(model: Any, batch: Any, train: bool = False, **more: Any) -> Any:
    """What a model by itself gives; a student with normalisation over the batch in training."""
    with torch.no_grad():
        return model.train(train)(**{k: v for k, v in batch.items() if k != "labels"}, **more)


def kl(student: Tensor, teacher: Tensor, temperature: float = 1.0, dim: int = -1) -> Tensor:
    """KL(teacher ‖ student) written out."""
    p, q = (F.log_softmax(x / temperature, dim) for x in (teacher, student))
    return (p.exp() * (p - q)).sum(dim)
