"""Names in registries and their documentation, as ``kdgraft list`` shows them."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

NEEDS = {
    "maps": "feature maps (B, C, H, W)",
    "samples": "one vector per sample",
    "classes": "class scores",
    "labels": "labels of exclusive classes",
    "numbers": "regressed numbers, such as boxes",
    "images": "images as the input of both models",
    "classifiers": "classifiers of whole images, which can run on other images within a step",
    "generators": "generators, which make an image of an image",
    "boxes": "boxes around objects",
    "queries": "scores of the candidates of a query",
    "single-label": "one class for each sample",
}
"""The kinds of tensors and facts that terms need, see :attr:`kdgraft.Term.needs`; a host may lack some of them."""


def written(package: str, variable: str) -> dict[str, str]:
    """Return the names that a package's files register, without importing the package or the framework that it needs.

    Args:
        package: the package, such as ``"kdgraft_det"``.
        variable: the registry's name in it, such as ``"TERMS"``.

    Returns:
        The first line of the docstring by name; empty if the package's sources are not available.
    """
    found = _registered(package, variable)
    return {name: (ast.get_docstring(node) or "").partition("\n")[0] for name, node in found.items()}


def needs_written(package: str, variable: str, name: str) -> tuple[str, ...]:
    """Return :attr:`kdgraft.Term.needs` of a registered class, as its sources and those of its bases declare it."""
    node = _registered(package, variable).get(name)
    classes = _by_name(package)
    while isinstance(node, ast.ClassDef):
        for line in node.body:
            target = line.targets[0] if isinstance(line, ast.Assign) else getattr(line, "target", None)
            if isinstance(target, ast.Name) and target.id == "needs":
                assert isinstance(line, (ast.Assign, ast.AnnAssign)) and line.value is not None
                return tuple(ast.literal_eval(line.value))
        node = classes.get(ast.unparse(node.bases[0])) if node.bases else None
    return ()


@cache
def _registered(package: str, variable: str) -> dict[str, ast.ClassDef | ast.FunctionDef]:
    """Return the definitions under ``@VARIABLE.register`` or ``@VARIABLE.register("name")`` by name."""
    found: dict[str, ast.ClassDef | ast.FunctionDef] = {}
    for node in _definitions(package):
        for decorator in node.decorator_list:
            named = decorator.args[0] if isinstance(decorator, ast.Call) and decorator.args else None
            function = decorator.func if isinstance(decorator, ast.Call) else decorator
            if ast.unparse(function) == f"{variable}.register":
                found[str(named.value) if isinstance(named, ast.Constant) else node.name] = node
    return found


@cache
def _by_name(package: str) -> dict[str, ast.ClassDef | ast.FunctionDef]:
    """Return the definitions of the core and of a package by name."""
    return {one.name: one for home in ("kdgraft", package) for one in _definitions(home)}


@cache
def _definitions(package: str) -> list[ast.ClassDef | ast.FunctionDef]:
    """Return the classes and functions of a package's files, without importing them."""
    spec = find_spec(package) if package else None
    if spec is None or spec.origin is None:
        return []
    files = sorted(Path(spec.origin).parent.rglob("*.py"))
    nodes = [node for path in files for node in ast.parse(path.read_text(encoding="utf-8")).body]
    return [node for node in nodes if isinstance(node, (ast.ClassDef, ast.FunctionDef))]


def first_line(target: Any) -> str:
    """Return the first line of a docstring."""
    return (inspect.getdoc(target) or "").partition("\n")[0]


def explained(target: Callable[..., Any]) -> str:
    """Return the documentation of a class or function, and each argument with its default.

    The arguments include those that a class passes on to its bases.
    """
    told, described = "", dict[str, str]()
    for part in inspect.getmro(target) if isinstance(target, type) else (target,):
        if part.__module__.startswith("torch.") or part is object:
            break
        before, own = _sections(part)
        told = told or before
        for name, said in own.items():
            if name not in described or described[name].startswith("see :class:"):
                described[name] = said
    lines = [f"    {name}{value}    {described.get(name, '')}".rstrip() for name, value in arguments_of(target).items()]
    if "where" in described and isinstance(target, type):  # of a term on class scores; each host has its own
        lines.append(f"    …    {described['where']}")
    text = "\n".join([told, "", *(["Arguments:", *lines] if lines else ["No arguments."])])
    text = re.sub(r"^\.\. math:: *", "    ", text, flags=re.MULTILINE)
    return re.sub(r":(?:class|func|meth|attr|data|mod|math):`~?([^`]+)`", r"``\1``", text)  # a terminal shows no links


def arguments_of(target: Callable[..., Any]) -> dict[str, str]:
    """Return the arguments of a function, or of a class and its bases, by name: `` = default``, or ``""`` without a default."""
    found: dict[str, str] = {}
    settled = {"self"}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for part in _parts(target):
        function = vars(part).get("__init__") if isinstance(part, type) else part
        if function is None:
            continue
        parameters = [p for p in inspect.signature(function).parameters.values() if p.kind in named]
        taken = {p.name: "" if p.default is p.empty else f" = {_value(p.default)}" for p in parameters}
        found.update({name: value for name, value in taken.items() if name not in settled and name not in found})
        settled |= _settled(function)
    return found


def _parts(target: Callable[..., Any]) -> Iterator[Any]:
    """Yield a function, or a class and those of its bases whose arguments it accepts."""
    if not isinstance(target, type):
        yield target
        return
    for base in inspect.getmro(target):
        if base.__module__.startswith("torch.") or base is object:
            return
        yield base
        own = vars(base).get("__init__")
        if own is not None and not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(own).parameters.values()):
            return


def _settled(function: Any) -> set[str]:
    """Return the arguments that an ``__init__`` sets itself in the call of its base, so that callers cannot."""
    try:
        tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return set()
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "super().__init__"]
    return {keyword.arg for call in calls for keyword in call.keywords if keyword.arg is not None}


def _value(default: Any) -> str:
    return default.__name__ if inspect.isroutine(default) or isinstance(default, type) else repr(default)


def _sections(part: Any) -> tuple[str, dict[str, str]]:
    """Split a docstring into its text without sections, and the description of each argument."""
    text = inspect.cleandoc(part.__doc__ or "")
    told, *sections = re.split(
        r"^(Args|Returns|Raises|Example|Examples|Yields|Attributes)::?\n", text, flags=re.MULTILINE
    )
    described: dict[str, str] = {}
    for title, section in zip(sections[::2], sections[1::2], strict=True):
        if title == "Args":
            for entry in re.split(r"\n(?=\S)", textwrap.dedent(section).strip()):
                names, _, said = entry.partition(": ")
                described.update(dict.fromkeys(re.split(r",\s*", names), " ".join(said.split())))
    return told.strip(), described
