"""Teacher, plain student and distilled student on your own sentences: a starting point to copy and change.

    python nlp/configs/classification.py --train train.jsonl --eval val.jsonl --out runs/mine

The files are jsonl, csv, or folders of datasets' save_to_disk. With --teacher FOLDER an existing teacher is used instead of one
trained here.
"""

from __future__ import annotations

from script import main

STUDENT = dict(model_type="bert", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
TEACHER = dict(STUDENT, hidden_size=128, num_hidden_layers=4, intermediate_size=512)
TRAINING = dict(
    num_train_epochs=8,
    per_device_train_batch_size=32,
    learning_rate=2e-3,
    lr_scheduler_type="cosine",
    warmup_steps=0.1,
    weight_decay=0.01,
)

if __name__ == "__main__":
    main("classification", TEACHER, STUDENT, dict(TRAINING, learning_rate=5e-4), TRAINING, recipe="tinybert")
