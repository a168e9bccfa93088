"""Teacher, plain student and distilled student on your own tagged words: a starting point to copy and change.

    python nlp/configs/token_classification.py --train train.jsonl --eval val.jsonl --out runs/mine

One {"tokens": [...], "tags": [...]} a line; tags are BIO.
"""

from __future__ import annotations

from classification import STUDENT, TEACHER, TRAINING
from script import main

TERMS = [dict(type="SoftTargets", temperature=2.0), dict(type="AttentionMaps"), dict(type="HiddenStates")]

if __name__ == "__main__":
    main("tokens", TEACHER, STUDENT, dict(TRAINING, learning_rate=5e-4), TRAINING, terms=TERMS)
