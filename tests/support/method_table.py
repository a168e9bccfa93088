"""The README's table of methods: every recipe, and every term that is not a recipe by itself, by host, made from their sources.

``python tests/support/method_table.py`` writes it. ``tests/*/test_methods.py`` train each ✓ of a term.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from kdgraft.hosts import hosts
from kdgraft.registry import Registry, expand_recipe

README = Path(__file__).parents[2] / "README.md"
MARKS = "<!-- methods: python tests/support/method_table.py -->", "<!-- /methods -->"
COLUMNS = {"det": "detection", "seg": "segmentation", "nlp": "Hugging Face", "torch": "plain PyTorch"}
FAMILIES = {
    "class scores and numbers": {"classes", "numbers"},
    "relations between samples": {"samples"},
    "features": set[str](),
}
"""Titles of the core's methods by what they need; the last one has all others."""


def _needs(registry: Registry, name: str, terms: Registry) -> list[str]:
    """What a term needs, or all terms of a recipe."""
    if registry.kind == "term":
        return list(registry.needs(name))
    kinds = [spec["type"] for spec in expand_recipe(name, registry)]
    return list(dict.fromkeys(need for kind in kinds for need in terms.needs(kind)))


def _family(holder: Registry | None, needs: list[str]) -> str:
    for name, title in COLUMNS.items():
        if name != "torch" and holder in (hosts()[name].recipes, hosts()[name].terms):
            return f"{title} alone"
    return next(title for title, some in FAMILIES.items() if some & set(needs) or not some)


def rows() -> dict[str, list[list[str]]]:
    """The rows of each family: name, first line, a mark for each host, needs, paper."""
    columns = [hosts()[name] for name in COLUMNS]
    recipes = [host.recipes.get(name) for host in columns for name in host.recipes]
    whole = {recipe.__name__ for recipe in recipes if isinstance(recipe, type)}
    found: dict[tuple[str, int], tuple[str, list[str]]] = {}
    for kind in ("recipes", "terms"):
        for host in columns:
            registry: Registry = getattr(host, kind)
            for name, line in registry.describe().items():
                holder = registry.holder(name)
                ours = registry.get(name).__module__.startswith(
                    "kdgraft"
                )  # other tests register terms of third parties
                if not ours or (kind == "terms" and name in whole) or (name, id(holder)) in found:
                    continue
                needs = _needs(registry, name, host.terms)
                core = holder is getattr(
                    hosts()["torch"], kind
                )  # a plugin's recipe of the same name is the core's with its settings
                here = [core or getattr(h, kind).holder(name) is holder for h in columns]
                usable = [one and not set(needs) & set(h.lacks) for one, h in zip(here, columns, strict=True)]
                cells = [
                    f"`{name}`",
                    _said(line),
                    *("✓" if one else "–" for one in usable),
                    ", ".join(needs),
                    _link(line),
                ]
                found[name, id(holder)] = _family(holder, needs), cells
    titles = [*FAMILIES, *(f"{title} alone" for title in COLUMNS.values())]
    families = {title: [cells for family, cells in found.values() if family == title] for title in titles}
    return {title: sorted(cells) for title, cells in families.items() if cells}


def _said(line: str) -> str:
    """The first line of a docstring without its source."""
    return (
        re.sub(r" \([^()]*\b(?:19|20|ICCV|CVPR|NeurIPS|equation|arXiv)[^()]*\)", "", line)
        .replace("``", "`")
        .rstrip(".")
    )


def _link(line: str) -> str:
    paper = re.search(r"\d{4}\.\d{4,5}", line)
    return f"[{paper[0]}](https://arxiv.org/abs/{paper[0]})" if paper else ""


def table() -> str:
    """The table as Markdown, with a line before each family."""
    head = ["method", "", *COLUMNS.values(), "needs", "paper"]
    lines = [head, ["---"] * len(head)]
    for title, cells in rows().items():
        lines += [[f"**{title}**", *[""] * (len(head) - 1)], *cells]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    from marked import write_between  # beside this file, whose folder is the first of the path

    write_between(README, MARKS, table())
    sys.exit()
