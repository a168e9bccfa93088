"""The core imports no host framework and nothing that only demos and tables need."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from support.forking import python

FOREIGN = ("mmengine", "mmdet", "mmseg", "mmcv", "transformers", "sklearn", "pandas", "matplotlib", "scipy", "cv2")


@pytest.mark.parametrize("module", ["kdgraft", "kdgraft.cli", "kdgraft_hosts"])
def test_import(module: str):
    program = f"import sys, {module}; print(sorted(set({FOREIGN!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("transformers") is None, reason="needs the host")
def test_a_recipe_trains_and_evaluates_without_libraries_of_figures_and_tables(tmp_path: Path):
    rows = "\n".join(f'{{"text": "{w} cat", "label": "{w}"}}' for w in ("red", "blue") * 4)
    (tmp_path / "a.jsonl").write_text(rows)
    (tmp_path / "r.yaml").write_text(
        f"task: classification\ndata: {{train: {tmp_path}/a.jsonl, eval: {tmp_path}/a.jsonl, length: 8}}\n"
        "tokenizer: {vocab_size: 60}\ntraining: {use_cpu: true, max_steps: 1, save_strategy: 'no'}\n"
        "student: {model_type: bert, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 16}\n"
    )
    # transformers itself uses scikit-learn where it is, in generation; of pandas datasets makes a use of its own.
    program = f"""
import sys
foreign = ("sklearn", "matplotlib")
for name in (*foreign, *(name for name in sys.modules if name.startswith(foreign))):
    sys.modules[name] = None
from kdgraft.cli import main
sys.exit(main(["train", {str(tmp_path / "r.yaml")!r}, "--work-dir", {str(tmp_path / "out")!r}]))
"""
    done = python("-c", program, host="transformers")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "macro_f1" in done.stdout


@pytest.mark.parametrize("module", ["kdgraft", "kdgraft.cli", "kdgraft_hosts"])
def test_the_command_line_starts_without_torch(module: str):
    program = f"import sys, {module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr


def test_everything_that_is_promised_is_there():
    import kdgraft

    assert len(set(kdgraft.__all__)) == len(kdgraft.__all__)
    assert len(kdgraft.__all__) > 30
    for name in kdgraft.__all__:
        assert getattr(kdgraft, name) is not None


# Package by package what of ours, and of the hosts, it may import.
ROOT = Path(__file__).parents[2]
MM = {"mmengine", "mmcv"}
MAY: dict[str, set[str]] = {
    "kdgraft": set(),
    "kdgraft_hosts": {"kdgraft"},
    "kdgraft_mm": {"kdgraft"} | MM,
    "kdgraft_det": {"kdgraft", "kdgraft_hosts", "kdgraft_mm", "mmdet"} | MM,
    "kdgraft_seg": {"kdgraft", "kdgraft_hosts", "kdgraft_mm", "mmseg"} | MM,
    "kdgraft_nlp": {"kdgraft", "kdgraft_hosts", "transformers"},
    "kdgraft_bench": {"kdgraft"},
}
# Modules of kdgraft_bench named after a host import it, and are imported for it alone.
MAY |= {
    f"kdgraft_bench.{folder}.{host}": {"kdgraft_bench", "kdgraft", *more}
    for folder in ("costs", "hosts")
    for host, more in {
        "mm": {"kdgraft_mm", *MM},
        "det": {"kdgraft_mm", "kdgraft_det", "mmdet", *MM},
        "seg": {"kdgraft_mm", "kdgraft_seg", "mmseg", *MM},
        "nlp": {"kdgraft_nlp", "transformers"},
    }.items()
}
# Parts of a host's benchmark.
MAY |= {
    f"kdgraft_bench.hosts.{part}": MAY[f"kdgraft_bench.hosts.{host}"]
    for host, parts in {
        "mm": ("mm_setup", "efficientnet"),
        "det": ("det_setup", "detr"),
        "seg": ("seg_setup",),
        "nlp": ("nlp_setup", "attention", "own_texts", "pretrained"),
    }.items()
    for part in parts
}
MAY |= {f"kdgraft_bench.costs.{part}": MAY["kdgraft_bench.costs.nlp"] for part in ("language", "sharded")}
MAY["kdgraft_bench.report.checkpoints"] = {
    "kdgraft_bench",
    "kdgraft",
    "kdgraft_mm",
}  # imported where mmengine is installed
MAY["kdgraft_bench.trl_gkd"] = {"kdgraft", "transformers"}  # named by a benchmark, as a Trainer beside ours
PACKAGES = {name.partition(".")[0] for name in MAY}
HOSTS = {"mmengine", "mmcv", "mmdet", "mmseg", "transformers"}
MODULES = {
    ".".join(path.relative_to(ROOT / folder).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("plugins", "det", "seg", "nlp")
    for package in PACKAGES
    for path in (ROOT / folder / package).rglob("*.py")
}


def imported(name: str) -> Iterator[str]:
    """The modules that a module imports, in its functions too."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (full if (full := f"{base}.{alias.name}") in MODULES else base for alias in node.names)


def test_imports_only_go_down():
    assert {name.partition(".")[0] for name in MODULES} == PACKAGES
    assert set(MAY) <= set(MODULES)
    wrong = [
        f"{name} imports {other}"
        for name in MODULES
        for other in imported(name)
        if (top := other.partition(".")[0]) in HOSTS | PACKAGES
        and top not in MAY.get(name, MAY[name.partition(".")[0]]) | {name.partition(".")[0]}
    ]
    assert wrong == []


def test_no_module_imports_itself_through_others():
    graph = {name: {other for other in imported(name) if other in MODULES} - {name} for name in MODULES}
    assert sum(map(len, graph.values())) > 300
    while free := {name for name, others in graph.items() if not others}:
        graph = {name: others - free for name, others in graph.items() if name not in free}
    assert graph == {}


def test_no_module_uses_what_another_keeps_to_itself():
    wrong = [
        f"{name} imports {alias.name}"
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.level or str(node.module).startswith("kdgraft"))
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]
    assert wrong == []
