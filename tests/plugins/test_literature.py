"""The page of the literature: every system has a row, and its names, modules, tests and measured rows are there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from kdgraft import REGIONS, SCHEDULES, SOURCES, Registry
from kdgraft.hosts import hosts
from kdgraft.plans.read import RUN_KEYS
from support.pages import ROOT

PAGE = ROOT / "docs" / "literature.md"
SYSTEMS = (
    # class scores, and who teaches
    *(
        "Soft targets",
        "Ensemble",
        "Transfer sets",
        "Specialists",
        "Logit matching",
        "DKD",
        "NKD",
        "DIST",
        "BAN",
        "CWTM",
        "DKPP",
    ),
    *("TAKD", "ESKD", "DML", "DML_e", "ONE", "BYOT", "AKD", "BSS", "FunMatch", "Logit standardization"),
    # features and relations
    *(
        "FitNets",
        "AT",
        "AT by gradients",
        "Feature MMD",
        "NST",
        "FT",
        "AB",
        "FSP",
        "PKD",
        "CWD",
        "FGFI",
        "FGD",
        "MGD",
        "ReviewKD",
    ),
    *("PKT", "CRD", "RKD", "SP", "CC", "MasKD", "FreeKD"),
    # detection and segmentation
    *("Chen 2017: hint", "Chen 2017: a teacher at a higher resolution", "LD", "CrossKD", "BCKD", "KD-DETR"),
    *(
        "Ultralytics",
        "RT-DETRv4: deep",
        "Structured KD",
        "Structured KD: pair-wise",
        "Structured KD: holistic",
        "IFVD",
        "CIRKD",
    ),
    # language
    *("TinyBERT", "MobileBERT", "MiniLM", "MiniLMv2", "DistilBERT", "PKD-BERT", "Forward KL", "Reverse KL", "GKD"),
    *("Skewed KL", "ULD", "GOLD", "DSKD", "GKD λ", "MiniLLM", "Embeddings", "MarginMSE"),
    # other schemes
    "RT-DETRv4: weights",
    *("NetAug", "GAN compression", "Weights matching", "Mean teacher", "Stages"),
)
"""The systems that the project set out to have; a row's system begins with one of these words."""
KINDS = "term|recipe|source|schedule|region|plan key|class|function|argument"


class Row(NamedTuple):
    """A row of the page's tables: a system, its paper, names, modules, tests, and where it was measured."""

    system: str
    paper: str
    names: str
    modules: str
    tests: str
    measured: str


def _cells(text: str) -> list[list[str]]:
    lines = [
        line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| ---", "| system "))
    ]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


ROWS = [Row(*cells) for cells in _cells(PAGE.read_text(encoding="utf-8"))]


def _links(cell: str) -> list[tuple[str, Path, str]]:
    """The text, file and heading of each link in a cell."""
    found = re.findall(r"\[([^\]]+)\]\(([^)#]+)#?([^)]*)\)", cell)
    return [(text, (PAGE.parent / path).resolve(), heading) for text, path, heading in found]


def _file(module: str) -> Path:
    parts = module.split(".")
    folders = [ROOT / folder / Path(*parts) for folder in ("plugins", "det", "seg", "nlp")]
    (found,) = [
        path for folder in folders for path in (folder.with_suffix(".py"), folder / "__init__.py") if path.is_file()
    ]
    return found


@cache
def _defined(module: str) -> tuple[set[str], set[str]]:
    """The names that a module defines or registers at its top, and every argument or text in it."""
    tree = ast.parse(_file(module).read_text(encoding="utf-8"))
    tops = [node for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    calls = [one for node in tops for one in node.decorator_list if isinstance(one, ast.Call) and one.args]
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    words = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)} | texts
    return {*(node.name for node in tops), *(ast.literal_eval(call.args[0]) for call in calls)}, words


def _named(cell: str) -> list[tuple[str, str]]:
    """The kind and the name of everything in the column of names."""
    found, kind = [], ""
    for before, code in re.findall(r"([^`]*)`([^`]+)`", cell):
        told = re.search(rf"\b({KINDS})s? $", before)
        kind = told[1] if told else kind
        assert kind, f"{cell}: `{code}` has no kind"
        found.append((kind, code.partition("(")[0]))
    return found


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_of_the_literature_has_a_row(system: str):
    assert [row for row in ROWS if re.match(rf"{re.escape(system)}(?![\w-])", row.system)]


def test_no_system_has_two_rows():
    systems = [row.system for row in ROWS]
    assert len({*systems}) == len(systems) >= len(SYSTEMS)


@pytest.mark.parametrize("row", ROWS, ids=[row.system for row in ROWS])
def test_every_name_is_one_that_a_user_can_write(row: Row):
    modules = re.findall(r"`([\w.]+)`", row.modules)
    defined = {name for module in modules for name in _defined(module)[0]}
    words = {word for module in modules for word in _defined(module)[1]}
    for kind, name in _named(row.names):
        if kind == "plan key":
            assert name in RUN_KEYS and "kdgraft.plans.read" in modules, name
        elif kind == "argument":
            assert name in words, name
        else:
            assert name in defined, f"{name} is in none of {modules}"
            assert kind in ("class", "function") or any(one.holder(name) for one in _registries(kind)), name


def _registries(kind: str) -> list[Registry]:
    if kind in ("term", "recipe"):
        return [getattr(host, f"{kind}s") for host in hosts().values()]
    return [dict(source=SOURCES, schedule=SCHEDULES, region=REGIONS)[kind]]


@pytest.mark.parametrize("row", ROWS, ids=[row.system for row in ROWS])
def test_its_tests_are_there_and_are_about_it(row: Row):
    links = _links(row.tests)
    assert links and all(path.is_file() and str(path).endswith(f"/{text[1:-1]}") for text, path, _ in links)
    said = " ".join(path.read_text(encoding="utf-8") for _, path, _ in links)
    assert any(re.search(rf"\b{re.escape(name)}\b", said) for _, name in _named(row.names))


@pytest.mark.parametrize("row", ROWS, ids=[row.system for row in ROWS])
def test_its_measured_rows_stand_where_it_says(row: Row):
    links = _links(row.measured)
    assert bool(links) != (row.measured == "not measured")
    for text, path, heading in links:
        _, *sections = re.split(r"^#+ ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        (section,) = [one for one in sections if _anchor(one.partition("\n")[0]) == heading]
        label = re.search(r"`([^`]+)`", text)[1]
        assert label in [cells[0].strip("`") for cells in _cells(section)], f"{path.name}#{heading} has no row {label}"
        assert row.measured.startswith("cost only: ") == (path.name == "overhead.md")


def _anchor(title: str) -> str:
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip())
