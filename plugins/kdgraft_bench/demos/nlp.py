"""``kdgraft demo nlp``: the gain of distillation, on text that every machine has, or on a real set of your own.

In the first comparison BERTs classify sentences of docstrings by their library: a teacher from scratch, a smaller student, and the
student with the recipes for classifiers. In the second, a small Llama teaches a smaller one on the same text, measured by
perplexity; in the third, which runs where one of its recipes is named, the smaller one has a tokenizer of its own. All students have
the same training set and schedule. The weights of terms were tuned on the validation split with other seeds; the tables are of the
test split. ``--data DIR`` takes real sentences (``train.jsonl``, ``val.jsonl``) instead.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from kdgraft.errors import DistillError
from kdgraft_nlp.data import read

from ..comparison import TWO_SPLITS, run
from ..data import check_layout
from ..data.docstrings import write_sentences
from ..results import Result
from .hf import TokenizerComparison, TrainerComparison, bert, llama, quiet
from .on_policy import ON_POLICY

DATA = dict(train=14_000, val=2100, test=4200)

_SOFT = dict(temperature=4.0)
CLASSIFIERS: dict[str, dict[str, Any]] = {
    # Temperature and weight of the soft targets were tuned on the validation sentences with seed 100; the others are published.
    "tinybert": dict(recipe=dict(type="tinybert", logits=2.0, **_SOFT)),
    "minilm": dict(recipe="minilm", terms=[dict(type="SoftTargets", weight=2.0, **_SOFT)]),
    "minilmv2": dict(recipe="minilmv2", terms=[dict(type="SoftTargets", weight=2.0, **_SOFT)]),
    "distilbert": dict(recipe=dict(type="distilbert", soft=2.0, **_SOFT)),
    "pkd": dict(recipe=dict(type="pkd", soft=2.0, **_SOFT)),
    "mobilebert": dict(recipe="mobilebert"),
    # tinybert without attention, hidden states and embeddings.
    "soft_targets": dict(terms=[dict(type="SoftTargets", weight=2.0, **_SOFT)]),
}
TAGGERS = {name: recipe for name, recipe in CLASSIFIERS.items() if name != "pkd"}
"""The recipes of classifiers, without the one that compares only the first token of a sentence."""
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "gkd": dict(recipe="gkd"),
    # The published ratio 5 : 1 : 2, where the last number is the weight of the host's loss.
    "distilbert": dict(recipe=dict(type="distilbert", soft=2.5, cosine=0.5)),
}
TWO_TOKENIZERS: dict[str, dict[str, Any]] = {name: dict(recipe=name) for name in ("uld", "gold", "dskd")}
"""The recipes for a teacher with another tokenizer, at the weights that their authors give."""
DEFAULT = ("tinybert",)

SENTENCES = TrainerComparison(
    dataset="docstring sentences",
    recipe_task="classification",
    told=dict(length=48),
    teacher=bert(128, 4),
    student=bert(32, 2),
    rates=(5e-4, 2e-3),
    recipes=CLASSIFIERS,
    default=DEFAULT,
    scores={"accuracy": ("eval_accuracy", 3), "macro_f1": ("eval_macro_f1", 3)},
)
TAGS = replace(
    SENTENCES,
    recipe_task="tokens",
    recipes=TAGGERS,
    scores={"span_f1": ("eval_span_f1", 3), "accuracy": ("eval_accuracy", 3)},
    folder="tags",
)
LANGUAGE = TrainerComparison(
    dataset="docstring text",
    recipe_task="causal",
    told=dict(length=64),
    teacher=llama(128, 4),
    student=llama(32, 2),
    rates=(2e-3, 4e-3),
    recipes=LANGUAGE_MODELS,
    default=("gkd", "distilbert"),
    scores={"perplexity": ("eval_perplexity", 2)},
    vocabulary=2000,
    batch_size=8,
    folder="language_model",
)
# Texts of the same kind for both models; only the students' perplexities are of the same tokens.
TOKENIZERS = TokenizerComparison(
    dataset="docstring text, another tokenizer",
    recipe_task="causal",
    told=dict(length=64, joined=False),
    teacher=LANGUAGE.teacher,
    student=LANGUAGE.student,
    rates=LANGUAGE.rates,
    recipes=TWO_TOKENIZERS,
    default=(),
    scores=LANGUAGE.scores,
    tested="test split (perplexity of each model's own tokens: to be compared among the students)",
    vocabulary=LANGUAGE.vocabulary,
    batch_size=16,  # sentences: about as many tokens as in the blocks of LANGUAGE
    folder="other_tokenizer",
    evaluations=3,
    one_scale=False,
)


def own_set(root: Path, fraction: float) -> list[TrainerComparison]:
    """Return the comparisons on a real set: sentences with a ``label`` are classified, ``tokens`` with ``tags`` are tagged.

    Args:
        root: a folder with ``train.jsonl`` and ``val.jsonl``, lines of ``{"text": …, "label": …}``, or with ``tokens`` (a list of
            words) in place of ``text``, and ``tags`` (one for each word) in place of ``label`` or beside it.
        fraction: the share of the training set to use.

    Raises:
        DistillError: a file or a column is missing.
    """
    check_layout(root, ("train.jsonl", "val.jsonl"), "train.jsonl and val.jsonl")
    columns = set.intersection(*(set(read(str(root / f"{name}.jsonl")).column_names) for name in ("train", "val")))
    words = "tokens" in columns
    if not words and "text" not in columns:
        raise DistillError(f"--data {root}: train.jsonl and val.jsonl need a column 'text', or 'tokens'")
    found = [*([SENTENCES] if "label" in columns else []), *([TAGS] if words and "tags" in columns else [])]
    if not found:
        raise DistillError(f"--data {root}: train.jsonl and val.jsonl need a column 'label', or 'tokens' and 'tags'")
    found[0] = replace(found[0], folder="")
    return [
        replace(
            each,
            dataset=f"{root.name}, tags" if each.recipe_task == "tokens" else root.name,
            told=dict(each.told, fraction=fraction),
            splits=TWO_SPLITS,
            tested="val split",
        )
        for each in found
    ]


def write_data(folder: Path) -> Path:
    """Write the sentences to a folder; return it."""
    return write_sentences(folder, DATA)


def main(
    out: str | Path = "runs/demo/nlp", data: str | None = None, fraction: float = 1.0, **settings: Any
) -> list[Result]:
    """Train everything, print the tables and write the files to ``out``.

    Args:
        out: the folder of the results; those of further comparisons are written to folders in it.
        data: the folder of a real set (see :func:`own_set`), to use instead of the docstrings.
        fraction: the share of a real set's training sentences to use, drawn with the seed.
        **settings: see :func:`kdgraft_bench.comparison.run`.
    """
    if data is None:
        return run([SENTENCES, LANGUAGE, TOKENIZERS, ON_POLICY], write_data, out, **settings)
    root = Path(data)
    with quiet():
        comparisons = own_set(root, fraction)
    return run(comparisons, lambda _: root, out, **settings)
