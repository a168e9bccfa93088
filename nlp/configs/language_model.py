"""Teacher, plain student and distilled student as causal language models of your own text: a starting point.

    python nlp/configs/language_model.py --train text.jsonl --eval val.jsonl --out runs/mine

One {"text": ...} a line. The losses are computed in chunks, so that neither model's logits are held.
"""

from __future__ import annotations

from script import main

STUDENT = dict(
    model_type="llama",
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=128,
)
TEACHER = dict(STUDENT, hidden_size=192, num_hidden_layers=4, intermediate_size=384)
TRAINING = dict(
    num_train_epochs=4,
    per_device_train_batch_size=16,
    learning_rate=2e-3,
    lr_scheduler_type="cosine",
    warmup_steps=0.1,
)

if __name__ == "__main__":
    main("causal", TEACHER, STUDENT, TRAINING, TRAINING, recipe="gkd", chunked=True)
