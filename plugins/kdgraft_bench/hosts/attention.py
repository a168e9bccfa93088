"""Pictures of attention: what the last layer of each model looks at in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from matplotlib.figure import Figure
from transformers import AutoTokenizer

from kdgraft_nlp.recipe_tasks import TASKS
from kdgraft_nlp.tasks import AUTO_CLASSES


def draw_attention(models: Mapping[str, str], task: str, text: str | list[str], path: Path) -> None:
    """Draw the last layer's attention maps on one sentence, with a row for each model and a column for each head.

    Args:
        models: the folders of saved models by their titles.
        task: the recipe's task.
        text: a sentence, or its words.
        path: the file.
    """
    found = []
    for title, folder in models.items():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AUTO_CLASSES[TASKS[task].model].from_pretrained(folder, attn_implementation="eager").eval()
        inputs = tokenizer(text, return_tensors="pt", is_split_into_words=isinstance(text, list))
        with torch.no_grad():
            maps = model(**inputs, output_attentions=True).attentions[-1][0]
        tokens = [token.replace("Ġ", " ").strip() for token in tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])]
        found.append((title, tokens, maps.numpy()))
    heads = max(len(maps) for _, _, maps in found)
    shape = (2.3 * heads + 0.8, 2.3 * len(found) + 0.5)
    figure = Figure(figsize=shape, layout="constrained")
    axes = figure.subplots(len(found), heads, squeeze=False)
    last = len(found) - 1
    for place, (row, (method, tokens, maps)) in enumerate(zip(axes, found, strict=True)):
        for head, axis in enumerate(row):
            if head >= len(maps):
                axis.set_axis_off()
                continue
            axis.imshow(maps[head], cmap="viridis", vmin=0, vmax=maps.max())
            axis.set_xticks(
                range(len(tokens)), tokens if place == last else [""] * len(tokens), rotation=90, fontsize=6
            )
            axis.set_yticks(range(len(tokens)), tokens if head == 0 else [""] * len(tokens), fontsize=6)
            axis.set_title(f"{method}, head {head + 1}", fontsize=8)
    figure.suptitle("attention of the last layer: each row is the attention of one token", fontsize=9)
    figure.savefig(path, dpi=130)
