"""Files that would run code: whatever a command makes of them, nothing in them runs without the flag that allows it."""

from __future__ import annotations

import functools
import json
import os
import pickle
import runpy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from campaigns.jobs import HOSTS, JOBS, LAST, RECIPE, command, files_of, finished, write_recipe
from campaigns.runner import Campaign, Case, Listed
from support.forking import python
from support.tensors import Payload

TRACE = "trace"
"""The folder that code makes which runs."""
SOURCE = f"__import__('os').mkdir({TRACE!r})"
PICKLED = (".pt", ".pth", ".bin")


class _Evaluated:
    def __reduce__(self) -> Any:
        return eval, (SOURCE,)


class _Partial:
    def __reduce__(self) -> Any:
        return functools.partial(os.mkdir, TRACE), ()


class _Run:
    def __reduce__(self) -> Any:
        return runpy.run_path, ("evil.py",)


class _State:
    """Restored by a method of its own."""

    def __reduce__(self) -> Any:
        return os.mkdir, (TRACE,), {"a": 1}


class _Module(nn.Module):
    """A whole model, whose class is imported."""

    def __reduce__(self) -> Any:
        return exec, (SOURCE,)


PAYLOADS: dict[str, Callable[[], Any]] = {
    "calls a function": lambda: Payload(Path(TRACE)),
    "evaluates a text": _Evaluated,
    "calls a partial": _Partial,
    "runs a file": _Run,
    "has a state": _State,
    "is a model": _Module,
}
FORMATS = ("torch", "legacy", "pickle")
"""How a file is written: by torch today, by torch before 1.6, by pickle alone."""


def _plant(path: Path, payload: Any, how: str) -> None:
    """Write a file anew, with its content and a payload."""
    content = torch.load(path, weights_only=False) if path.is_file() else {}
    content = {**content, "extra": payload} if isinstance(content, dict) else {"content": content, "extra": payload}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch")
    if (path.parent / "checksums.json").is_file():  # who plants something also writes the checksums
        from kdgraft_nlp.checkpoints import write_checksums

        write_checksums(path.parent)


_OF_MM: list[Sequence[str]] = [
    JOBS["mmdet"].again,
    ("test", "config.py", "work/iter_4.pth"),
    ("export", "work/iter_4.pth", "student.pth"),
    ("train", "config.py", "--work-dir", "other", "--cfg-options", "load_from=work/iter_4.pth"),
    ("check", "config.py"),
]
COMMANDS: dict[str, list[Sequence[str]]] = {
    "torch": [("plan", "plan.toml"), ("report", "out")],
    "transformers": [
        JOBS["transformers"].again,
        ("test", "recipe.yaml", LAST),
        ("export", LAST, "student"),
        ("train", "recipe.yaml", "--work-dir", "other", "--resume", LAST),
    ],
    "mmdet": _OF_MM,
    "mmseg": _OF_MM,
}


def pickles() -> list[Case]:
    """Every payload in every file that is or may be a pickle, each read by a command that reads it."""
    found = []
    for job in HOSTS:
        own, others = files_of(job)
        files = [file for file in (*own, *others) if file.endswith(PICKLED)]
        files += [
            file.replace("model.safetensors", "pytorch_model.bin") for file in (*own, *others) if "model.safe" in file
        ]
        for place, file in enumerate(files):
            for turn, payload in enumerate(PAYLOADS):
                words = COMMANDS[job][(place + turn) % len(COMMANDS[job])]
                found.append(dict(job=job, file=file, payload=payload, how=FORMATS[turn % 3], words=list(words)))
    return found[::7] + [case for place, case in enumerate(found) if place % 7]


def check_pickle(case: Case) -> None:
    with finished(case["job"]) as folder:
        (folder / "evil.py").write_text(SOURCE, encoding="utf-8")
        _plant(folder / case["file"], PAYLOADS[case["payload"]](), case["how"])
        if case["file"].endswith("pytorch_model.bin"):
            (folder / case["file"]).with_name("model.safetensors").unlink()
        command(*case["words"])
        assert not (folder / TRACE).exists(), "it ran"


# --- texts

EVIL = f"{SOURCE}\nfrom transformers import BertConfig as Config, BertForSequenceClassification as Model, BertTokenizer as Tokenizer\n"
AUTO = {
    "AutoConfig": "evil.Config",
    "AutoModelForSequenceClassification": "evil.Model",
    "AutoTokenizer": ["evil.Tokenizer", None],
}


def _edited(path: str, **entries: Any) -> None:
    told = json.loads(Path(path).read_text(encoding="utf-8"))
    Path(path).write_text(json.dumps({**told, **entries}), encoding="utf-8")


def _recipe(**entries: Any) -> None:
    write_recipe({**RECIPE, **entries})


def _model_of_own_code(folder: str, **config: Any) -> None:
    Path(folder, "evil.py").write_text(EVIL, encoding="utf-8")
    _edited(f"{folder}/config.json", auto_map=AUTO, **config)
    _edited(f"{folder}/tokenizer_config.json", auto_map=AUTO, tokenizer_class="Evil")


def _checkpoint_with(text: str) -> None:
    path = Path("work/iter_4.pth")
    saved = torch.load(path, weights_only=False)
    saved["meta"]["cfg"] = text + saved["meta"]["cfg"]
    torch.save(saved, path)


def _script() -> None:
    Path("scripted").mkdir()
    Path("scripted/scripted.py").write_text(SOURCE, encoding="utf-8")
    _recipe(data={**RECIPE["data"], "train": "scripted"})


def _base() -> None:
    Path("evil.py").write_text(SOURCE, encoding="utf-8")
    _checkpoint_with("_base_ = ['evil.py']\n")


RESUMED, CHECKED = ("train", "recipe.yaml", "--resume"), ("check", "recipe.yaml")
EXPORTED = ("export", "work/iter_4.pth", "student.pth")
TAG = f"!!python/object/apply:os.mkdir [{TRACE}]"
TEXTS: dict[str, tuple[str, Callable[[], Any], tuple[str, ...]]] = {
    "YAML tag": ("transformers", lambda: Path("recipe.yaml").write_text(f"task: {TAG}\n"), CHECKED),
    "YAML tag in an option": ("transformers", lambda: None, (*CHECKED, "--cfg-options", f"data.train={TAG}")),
    "YAML module": ("transformers", lambda: Path("recipe.yaml").write_text("a: !!python/module:evil\n"), CHECKED),
    "teacher of its own code": ("transformers", lambda: _model_of_own_code("teacher"), CHECKED),
    "teacher of an unknown kind": (
        "transformers",
        lambda: _model_of_own_code("teacher", model_type="evil", architectures=["Model"]),
        CHECKED,
    ),
    "student of its own code": (
        "transformers",
        lambda: (_model_of_own_code("teacher"), _recipe(student="teacher")),
        CHECKED,
    ),
    "checkpoint of its own code": ("transformers", lambda: _model_of_own_code(LAST), RESUMED),
    "tested checkpoint of its own code": (
        "transformers",
        lambda: _model_of_own_code(LAST),
        ("test", "recipe.yaml", LAST),
    ),
    "exported checkpoint of its own code": (
        "transformers",
        lambda: _model_of_own_code(LAST),
        ("export", LAST, "student"),
    ),
    "student's config names code": (
        "transformers",
        lambda: _recipe(student={**RECIPE["student"], "auto_map": AUTO}),
        CHECKED,
    ),
    "a set with a script": ("transformers", _script, CHECKED),
    "pickled data": (
        "transformers",
        lambda: (
            Path("a.pkl").write_bytes(pickle.dumps(_Evaluated())),
            _recipe(data={**RECIPE["data"], "train": "a.pkl"}),
        ),
        CHECKED,
    ),
    "code in a term": ("transformers", lambda: _recipe(terms=[dict(type="SoftTargets", temperature=SOURCE)]), CHECKED),
    "a class in a term": ("transformers", lambda: _recipe(terms=[dict(type="os.mkdir", name=TRACE)]), CHECKED),
    "code in a tap": ("transformers", lambda: _recipe(terms=[dict(type="Hint", tap=f"x[{SOURCE}]")]), CHECKED),
    "config text with a call": ("mmdet", lambda: _checkpoint_with(f"{SOURCE}\n"), EXPORTED),
    "config text with an import": ("mmdet", lambda: _checkpoint_with("import evil\n"), EXPORTED),
    "config text in a function": ("mmdet", lambda: _checkpoint_with(f"x = (lambda: {SOURCE})()\n"), EXPORTED),
    "config text in a text": (
        "mmdet",
        lambda: _checkpoint_with(f"x = f'{{{SOURCE.replace(chr(39), chr(34))}}}'\n"),
        EXPORTED,
    ),
    "config text in a decorator": ("mmdet", lambda: _checkpoint_with(f"@{SOURCE}\ndef x(): pass\n"), EXPORTED),
    "config text in a default": ("mmdet", lambda: _checkpoint_with(f"def x(y={SOURCE}): pass\n"), EXPORTED),
    "config text with a base": ("mmdet", _base, EXPORTED),
    "code in an option": ("mmdet", lambda: None, ("check", "config.py", "--cfg-options", f"model.recipe={SOURCE}")),
    "code in an option's list": (
        "mmdet",
        lambda: None,
        ("check", "config.py", "--cfg-options", f"model.terms=[{SOURCE}]"),
    ),
    "a plan's term of another package": (
        "torch",
        lambda: Path("plan.toml").write_text(
            'out = "o"\n[runs.t]\nconfig = "tasks.py:large"\n[runs.a]\nconfig = "tasks.py:small"\nteacher = "t"\n'
            f'terms = [{{ type = "os.mkdir", name = "{TRACE}" }}]\n'
        ),
        ("plan", "plan.toml"),
    ),
    "code in a record": (
        "torch",
        lambda: _edited("out/teacher/seed0/finished.json", model=SOURCE),
        ("plan", "plan.toml"),
    ),
}


def check_text(case: Case) -> None:
    job, plant, words = TEXTS[case["attack"]]
    with finished(job) as folder:
        if not (folder / "evil.py").exists():
            (folder / "evil.py").write_text(EVIL, encoding="utf-8")
        plant()
        command(*words)
        assert not (folder / TRACE).exists(), "it ran"


# --- what other packages register: code by design, which must not take the rest down

BROKEN: Mapping[str, str] = {
    "raises": "raise RuntimeError('broken\\nin two lines')",
    "exits": "raise SystemExit(7)",
    "is no class": "Thing = 5",
    "has no such name": "",
    "is no module": "def (",
    "imports what is missing": "import nothing_of_this_name",
}
GROUPS = (
    "kdgraft.terms",
    "kdgraft.losses",
    "kdgraft.hosts",
    "kdgraft.schedules",
    "kdgraft.nlp.terms",
    "kdgraft.recipes",
)


def check_entry_point(case: Case) -> None:
    with finished("torch") as folder:
        (folder / "third.py").write_text(BROKEN[case["module"]], encoding="utf-8")
        info = folder / "third-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third\nVersion: 1.0\n", encoding="utf-8")
        (info / "entry_points.txt").write_text(f"[{case['group']}]\nThing = third:Thing\n", encoding="utf-8")
        for words, code in ((("list",), 0), (("list", "SoftTargets"), 0), (("plan", "plan.toml"), 0)):
            done = python("-m", "kdgraft", *words, folder=folder)
            assert done.returncode == code, f"{' '.join(words)} ends with {done.returncode}: {done.stderr[-300:]!r}"
            assert "Traceback" not in done.stderr, f"a traceback: {done.stderr[-300:]!r}"


def entry_points() -> list[Case]:
    return [dict(group=group, module=module) for group in GROUPS for module in BROKEN]


CODE = (
    Campaign(
        "code in texts",
        "code in configs' texts, YAML, TOML, JSON, options, models' folders and data: nothing runs",
        Listed(lambda: [dict(attack=name) for name in sorted(TEXTS, key=lambda name: TEXTS[name][0] != "torch")]),
        check_text,
        count=len(TEXTS),
        sample=3,
        block=10,
        host="mmdet",
    ),
    Campaign(
        "code in pickles",
        "checkpoints, states and records that would call something when they are read: nothing runs without the flag",
        Listed(pickles),
        check_pickle,
        count=132,
        sample=0,
        block=20,
        host="mmdet",
    ),
    Campaign(
        "entry points",
        "registered parts of other packages, code by design, that raise, exit or are not there: nothing else is taken down",
        Listed(entry_points),
        check_entry_point,
        count=len(GROUPS) * len(BROKEN),
        sample=0,
        block=6,
        seconds=120,
    ),
)
