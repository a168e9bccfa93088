"""SFTTrainers of TRL on small models and chats."""

from __future__ import annotations

import pytest
from datasets import Dataset

from support import nlp as support
from support.tensors import gradients

trl = pytest.importorskip("trl")

CHAT = (
    "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def tokenizer():
    found = support.by_letter("right")
    found.eos_token = "<pad>"
    found.chat_template = CHAT
    return found


def chats(count=12):
    words = ("cat", "dog", "cow", "hen")
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"what is a {words[i % 4]}"}],
                "completion": [{"role": "assistant", "content": "it is " + words[(i + 1) % 4] * (1 + i % 3)}],
            }
            for i in range(count)
        ]
    )


def texts(count=12):
    return Dataset.from_list([{"text": "the cat sat on a mat " * (1 + i % 4)} for i in range(count)])


def model(width=16, layers=2, seed=1):
    return support.quiet(support.model("llama", width, layers, seed=seed, pad_token_id=0, eos_token_id=0))


def teacher():
    return model(32, 4, seed=2)


def trainer_of(folder, data=None, student=None, eval_data=None, **settings):
    told = dict(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
        max_length=64,
        activation_checkpointing=False,
        seed=1,
    )
    return trl.SFTTrainer(
        model=model() if student is None else student,
        args=trl.SFTConfig(**{**told, **settings}),
        train_dataset=chats() if data is None else data,
        eval_dataset=eval_data,
        processing_class=tokenizer(),
    )


def first_batch(trainer):
    return next(iter(trainer.get_train_dataloader()))


def step(trainer, batch, items=None):
    """The loss and the gradients of a training step without the optimizer's."""
    trainer.model.train().zero_grad()
    trainer.state.epoch, trainer.current_gradient_accumulation_steps = 0.0, 1
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)
    loss.backward()
    return loss.detach(), gradients(trainer.model)
