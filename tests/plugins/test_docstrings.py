"""The documentation of the core: every public name has some, and its examples run."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch

import kdgraft
import kdgraft_hosts
from kdgraft.listing import _sections

CLASSES = [name for name in kdgraft.__all__ if isinstance(getattr(kdgraft, name), type)]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def run(text: str, names: dict[str, Any], name: str) -> dict[str, Any]:
    """Run the examples of a docstring, starting from ``names``; return the names that they leave."""
    failed: list[str] = []
    test = doctest.DocTestParser().get_doctest(text, names, name, None, 0)
    doctest.DocTestRunner(optionflags=FLAGS).run(test, out=failed.append, clear_globs=False)
    assert not failed, "".join(failed)
    return test.globs


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """The names that the package's own docstring defines for all examples."""
    with torch.random.fork_rng():
        return run(kdgraft.__doc__ or "", {}, "kdgraft")


@pytest.mark.parametrize("name", CLASSES)
def test_every_public_class_has_an_example_that_runs(
    name: str, names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    text = vars(getattr(kdgraft, name)).get("__doc__") or ""
    assert "    >>> " in text, f"{name}: add an example to its docstring"
    monkeypatch.chdir(tmp_path)  # some examples write checkpoints
    with torch.random.fork_rng():
        run(text, names, name)


def test_an_example_that_fails_is_noticed():
    with pytest.raises(AssertionError, match=r"Expected:\s+3\s+Got:\s+2"):
        run(">>> 1 + 1\n3\n", {}, "wrong")


def members() -> Iterator[tuple[str, Any, bool]]:
    """Public functions, classes and methods of the core by qualified name, and whether each is a member of a class."""
    for module in pkgutil.walk_packages(kdgraft.__path__, "kdgraft."):
        if module.name == "kdgraft.__main__":
            continue
        for name, item in vars(importlib.import_module(module.name)).items():
            if name.startswith("_") or getattr(item, "__module__", None) != module.name:
                continue
            if isinstance(item, (type, FunctionType)):
                yield f"{module.name}.{name}", item, False
            for inner in vars(item) if isinstance(item, type) else ():
                if not inner.startswith("_") and isinstance(vars(item)[inner], (FunctionType, property, classmethod)):
                    yield f"{module.name}.{name}.{inner}", getattr(item, inner), True


def test_everything_public_is_documented():
    found = list(members())
    assert len(found) > 200
    # getdoc looks at the overridden method too.
    assert [name for name, item, _ in found if not inspect.getdoc(item)] == []


def test_a_section_on_arguments_lists_all_of_them():
    lacking = {}
    for name, item, _ in members():
        described = _sections(item)[1] if inspect.isfunction(item) else {}
        taken = set(inspect.signature(item).parameters) - {"self", "cls"} if described else set()
        if taken - set(described):
            lacking[name] = taken - set(described)
    assert lacking == {}


def test_no_docstring_opens_with_a_question_word():
    """Those of attributes, strings that stand alone in a body, included."""
    opening = re.compile(r"\s*(What|Which|Whether|How|That|Who)\b")
    paths = [path for package in (kdgraft, kdgraft_hosts) for path in Path(package.__path__[0]).rglob("*.py")]
    found = [
        f"{path.name}:{node.lineno}"
        for path in paths
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and opening.match(str(node.value.value))
    ]
    assert len(paths) > 50
    assert found == []
