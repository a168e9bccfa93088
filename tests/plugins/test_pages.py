"""The pages of the documentation: their programs and jobs run as printed, their commands and names are those of the code."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import subprocess
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from kdgraft import toml
from kdgraft.cli import _parser as kdgraft_parser
from kdgraft.hosts import MissingHost, hosts, installed
from kdgraft.listing import arguments_of
from support import method_table
from support.marked import between_marks
from support.pages import (
    BLOCKS,
    JOBS,
    PAGES,
    PROGRAMS,
    ROOT,
    missing_host,
    program,
    run_job,
    run_program,
    shown_commands,
)

SLOW = {"Detection", "Segmentation", "Hugging Face", "Plain PyTorch", "Plans: runs that follow from one another"}
"""Sections whose jobs train for more than half a minute."""
READERS = {
    "torch": ("kdgraft.readers", "Reader"),
    "det": ("kdgraft_det.reader", "DetReader"),
    "seg": ("kdgraft_seg.reader", "SegReader"),
    "nlp": ("kdgraft_nlp.reader", "HFReader"),
}
"""What reads class scores in each host; its arguments are those of terms on class scores."""
MADE = {"student.pth", "peer.pth", "teacher_0.pth", "teacher_1.pth", "run", "runs", "out", "student"}
MADE |= {"adapter", "embedder", "teacher", "store", "student.onnx", "soft.jsonl"}
"""What programs on the pages may leave in the folder that they run in."""
PRINTED = {
    "Plain PyTorch": "distilled {'loss'",
    "A method of your own": "[{'loss': ",
    "Hugging Face": "'label'",
    "Segmentation": "mAcc",
    "Detection": "GFL torch.Size(",
    "Plans: runs that follow from one another": "student (seed 1, torch): finished",
}
"""Of each job, something that it prints at its end."""


@pytest.mark.parametrize("number", range(len(PROGRAMS)), ids=[f"{p.page} {p.section}" for p in PROGRAMS])
def test_every_program_of_the_pages_runs_from_an_empty_folder(tmp_path: Path, number: int):
    if missing := missing_host([PROGRAMS[number].text]):
        pytest.skip(f"needs {missing}")
    run_program(PROGRAMS[number].text, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= MADE


@pytest.mark.timeout(2400)
@pytest.mark.parametrize(
    ("page", "section"), [pytest.param(*job, marks=[pytest.mark.slow] * (job[1] in SLOW), id=job[1]) for job in JOBS]
)
def test_every_job_of_the_pages_runs_as_printed(tmp_path: Path, page: str, section: str):
    if missing := missing_host([block.text for block in BLOCKS if (block.page, block.section) == (page, section)]):
        pytest.skip(f"needs {missing}")
    assert PRINTED[section] in run_job(page, section, tmp_path, timeout=2400).splitlines()[-1]


def test_the_readmes_example_runs_as_printed(tmp_path: Path):
    run_program(program("Distiller(", 'Hint("1"', "student.pth"), tmp_path)
    saved = torch.load(tmp_path / "student.pth")
    assert set(saved) == {"0.weight", "0.bias", "4.weight", "4.bias"}


def test_peers_are_saved_as_plain_as_the_student(tmp_path: Path):
    run_program(program("Distiller(", "Peer("), tmp_path)
    student, peer = (torch.load(tmp_path / name) for name in ("student.pth", "peer.pth"))
    assert student.keys() == peer.keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert (len(student["0.bias"]), len(peer["0.bias"])) == (8, 12)


def test_a_block_is_a_program_a_config_a_file_or_a_job():
    assert {block.language for block in BLOCKS if not block.file} <= {"python", "toml", "bash"}
    assert not [block for block in BLOCKS if block.file and (block.page, block.section) not in JOBS and _runs(block)]


def _runs(block) -> bool:
    return block.file != "pyproject.toml"  # of a package that is not there


# --- commands that are shown


def _check_kdgraft(words: list[str]) -> None:
    choices = next(a for a in kdgraft_parser()._actions if a.choices).choices
    assert words[0] in choices
    if words[1:] and all(word.startswith("-") for word in words[1:]):
        assert set(words[1:]) <= set(choices[words[0]]._option_string_actions)
    elif words[1:]:
        kdgraft_parser().parse_args(words)
    for word in words:
        if word.startswith(("det/", "seg/", "nlp/")):
            assert (ROOT / word).is_file(), word
    if words[0] == "list" and words[1:] and words[1] != "NAME":
        registries = [registry for host in hosts().values() for registry in (host.terms, host.recipes)]
        assert any(registry.holder(words[1]) for registry in registries), words[1]


def _check_launched(words: list[str], parser) -> None:
    at = words.index("kdgraft") if "kdgraft" in words else len(words)
    if "kdgraft" in words:
        _check_kdgraft(words[at + 1 :])
    parser.parse_args(words)


def _check(words: list[str]) -> None:
    tool, *rest = words
    if tool == "kdgraft":
        _check_kdgraft(rest)
    elif tool == "make":
        done = subprocess.run(["make", "-n", *rest], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif tool == "pip":
        extras = toml.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        asked = re.findall(r"\[([\w,]+)\]", rest[1])
        assert rest[0] == "install" and set(",".join(asked).split(",")) - {""} <= set(extras)
    elif tool == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        assert rest[0] == "launch"
        if rest[1:]:
            _check_launched(rest[1:], launch_command_parser())
    elif tool == "torchrun":
        from torch.distributed.run import get_args_parser

        _check_launched(rest, get_args_parser())
    elif rest[0] == "-m":
        assert tool == "python" and find_spec(rest[1]), rest[1]
    else:
        assert tool == "python" and (ROOT / rest[0]).is_file()


SHOWN = shown_commands()


@pytest.mark.parametrize(("page", "command"), SHOWN, ids=[f"{page} {command}" for page, command in SHOWN])
def test_every_command_that_is_shown_is_one(page: str, command: str):
    if "kdgraft_bench" in command:
        pytest.importorskip("pandas", reason="measuring needs the extra bench")
    _check(shlex.split(command))


# --- names


def _code() -> list[tuple[str, str]]:
    """Code within lines, each with its page; the log of changes names what is gone."""
    fence = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
    return [
        (page.name, code)
        for page in PAGES
        if page.name != "CHANGELOG.md"
        for code in re.findall(r"(?<!`)`([^`\n]+)`", fence.sub("", page.read_text(encoding="utf-8")))
    ]


def test_every_name_on_the_pages_is_one_of_the_code():
    files = [path for folder in ("plugins", "det", "seg", "nlp", "tests") for path in (ROOT / folder).rglob("*.py")]
    words = {word for path in files if path != Path(__file__) for word in re.findall(r"\w+", path.read_text())}
    found = {(page, name) for page, code in _code() for name in re.findall(r"\b[A-Z]+[a-z]+[A-Z]\w*", code)}
    assert len(found) > 60
    assert {(page, name) for page, name in found if name not in words} == set()


def test_every_file_on_the_page_of_files_is_there():
    named = [re.findall(r"`([\w/.]+)`", line.split("|")[1]) for line in _lines("plugins/README.md", "| `")]
    assert len(named) > 15
    for first, *others in named:
        for path in (first, *(f"{first.split('/')[0]}/{other}" for other in others)):
            assert (ROOT / "plugins" / path).exists(), path


def _lines(page: str, start: str) -> list[str]:
    return [line for line in (ROOT / page).read_text(encoding="utf-8").splitlines() if line.startswith(start)]


@pytest.mark.parametrize("host", READERS)
def test_every_argument_on_the_pages_is_one_of_the_term(host: str):
    """Arguments that say where class scores are belong to one host each; on pages for all hosts any of them may stand."""
    try:
        terms, _ = hosts()[host].registries()
    except MissingHost as missing:
        pytest.skip(str(missing))
    if host == "torch" and not all(installed(hosts()[name].framework) for name in READERS):
        pytest.skip("pages for all hosts show arguments of hosts that are not installed here")
    readers = [name for name in READERS if installed(hosts()[name].framework) and host in ("torch", name)]
    modules = [(import_module(READERS[name][0]), READERS[name][1]) for name in readers]
    where = {key for module, name in modules for key in inspect.signature(getattr(module, name).scores).parameters}
    own = set(terms) if host == "torch" else set(terms) - set(hosts()["torch"].terms or ())
    found = [(page, code, call) for page, code in _code() if (call := _call(code)) and call.func.id in own]
    assert found
    for page, code, call in found:
        takes = {*arguments_of(terms.get(call.func.id)), *where}
        assert {keyword.arg for keyword in call.keywords} <= takes, f"{page}: {code}"


def _call(code: str) -> ast.Call | None:
    """A call of something by its name, if that is what a text is."""
    try:
        found = ast.parse(code.replace("…", "None"), mode="eval").body
    except SyntaxError:
        return None
    return found if isinstance(found, ast.Call) and isinstance(found.func, ast.Name) else None


def test_the_table_of_methods_is_made_from_the_sources():
    if not all(installed(host.framework) for host in hosts().values()):
        pytest.skip("the table is of all hosts")
    shown = between_marks(method_table.README.read_text(), method_table.MARKS)[1]
    assert shown == method_table.table(), "run PYTHONPATH=tests python tests/support/method_table.py"
