"""Puts into the site what GitHub shows elsewhere: pages, figures and tests where they lie, and a reference page for each package.

Pages keep their paths, so that the same links work here and there. The reference is made from the names in ``__all__`` and their
docstrings, which are read and not imported.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from pygments.formatters import HtmlFormatter

ROOT = Path(__file__).parents[1]
PAGES = ("*.md", "[!.]*/README.md", "docs/**/*.md", "[!.]*/figures/*", "tests/**/test_*.py")
PACKAGES = {
    "kdgraft": "plugins/kdgraft/__init__.pyi",
    "kdgraft.losses": "plugins/kdgraft/losses/__init__.py",
    "kdgraft_det": "det/kdgraft_det/__init__.py",
    "kdgraft_seg": "seg/kdgraft_seg/__init__.py",
    "kdgraft_nlp": "nlp/kdgraft_nlp/__init__.py",
}
MODULES = {
    "kdgraft.fit": ("fit", "Fitted"),
    "kdgraft.plain": ("Task",),
    "kdgraft.specialists": (
        "confusable_classes",
        "specialist_of",
        "SpecialistData",
        "correct_dustbin",
        "combine_specialists",
    ),
    "kdgraft.hosts": ("Host", "HostTrainer", "Job", "TrainedModel"),
}


def public_names(package: str) -> dict[str, str]:
    """Where each public name of a package is defined, ``module.name``, as its ``__init__`` imports it."""
    if package in MODULES:
        return {name: f"{package}.{name}" for name in MODULES[package]}
    tree = ast.parse((ROOT / PACKAGES[package]).read_text(encoding="utf-8"))
    found, names = {}, []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            module = f"{package}.{node.module}" if node.level else node.module
            found |= {alias.asname or alias.name: f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            names = ast.literal_eval(node.value)
    registries = {f"{package}.registry.TERMS", f"{package}.registry.RECIPES"}  # of a host: kdgraft_hosts has them
    return {name: found[name] for name in names if package == "kdgraft" or found[name] not in registries}


def reference(package: str) -> str:
    """The reference page of a package, in Markdown."""
    entries = (f"::: {where}\n" for where in public_names(package).values())
    return f"# {package}\n\n" + "\n".join(entries)


def on_files(files: Files, config: Any) -> Files:
    """The files of the site."""
    kept = [file for file in files if not file.src_uri.endswith((".md", ".py"))]
    pages = sorted({path for pattern in PAGES for path in ROOT.glob(pattern)})
    kept += [File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)) for path in pages]
    for package in (*PACKAGES, *MODULES):
        kept.append(File.generated(config, f"reference/{package}.md", content=reference(package)))
    kept.append(File.generated(config, "pygments.css", content=HtmlFormatter().get_style_defs(".highlight")))
    return Files(kept)


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings' roles as plain names."""
    return re.sub(r":\w+:<code>~?(?:[\w.]+\.)?(\w+)</code>", r"<code>\1</code>", html)
