"""Wrong entries in what users write: either what was meant is built, or one line says what to change and nothing runs."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from campaigns.jobs import RECIPE, command, write_plan, write_recipe
from campaigns.mutations import ODD, mutated
from campaigns.runner import Campaign, Case, Drawn
from kdgraft import TERMS, Distiller, DistillError, Reader
from kdgraft.schedules import Step, build_schedule
from support.methods import own_terms, spec, split
from support.plain import SETTINGS, model


@contextlib.contextmanager
def refused_in_one_line() -> Iterator[None]:
    """An error of the user's is one line that says something."""
    try:
        yield
    except DistillError as error:
        line = str(error)
        assert line.strip() and "\n" not in line, f"not one line: {line!r}"


def check_meant(given: Any, built: Any, where: str) -> None:
    """What was given as a number, a text or a flag is what was built."""
    for key, value in given.items() if isinstance(given, Mapping) else ():
        found = getattr(built, str(key), None)
        if isinstance(value, (bool, int, float, str)) and isinstance(found, (bool, int, float, str)):
            same = found == value or (isinstance(found, float) and not isinstance(value, str) and found == float(value))
            assert same, f"{where}: {key} is {found!r}, not {value!r}"


# --- terms


def term_entries() -> st.SearchStrategy[Case]:
    """One or two terms of plain PyTorch, or a recipe, with all that every term takes."""
    common = dict(weight=0.5, name="own", schedule=dict(type="Ramp", end=4, start=0.5), source="teacher")
    usable = split(TERMS, Reader)[0]
    terms = [spec(own_terms(TERMS)[kind], "conv", **{**SETTINGS.get(kind, {}), **common}) for kind in usable]
    entries = [{"terms": [term], "recipe": None} for term in terms]
    entries += [{"terms": [], "recipe": dict(type=name, weight=2.0)} for name in ("akd", "ft", "crd")]
    entries.append(
        {"terms": ["SoftTargets", dict(type="Hint", tap=["stem", "conv"], adapter="conv1x1")], "recipe": None}
    )
    # Misspelt names of arguments are Python's own to tell, in a call.
    return st.sampled_from(entries).flatmap(lambda entry: mutated(entry, under=(("terms",), ("recipe",))))


def check_terms(case: Case) -> None:
    torch.manual_seed(0)
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 4, 2, 0])
    with refused_in_one_line():
        terms, recipe = case.get("terms", ()), case.get("recipe")
        distiller = Distiller(model(4), model(8), terms, images, recipe=recipe)
        given = [one for one in terms or () if isinstance(one, Mapping)]
        if len(given) == len(distiller.terms) == 1:
            for one, built in zip(given, distiller.terms.values(), strict=True):
                check_meant(one, built, "term")
        loss = distiller(images, targets=labels).total(torch.zeros((), requires_grad=True))
        assert loss.isfinite(), f"loss {loss}"


# --- schedules and taps


def schedule_entries() -> st.SearchStrategy[Case]:
    entries = [
        dict(type="Ramp", end=7, begin=2, start=0.5, final=2.0, shape="cosine", by="epoch"),
        dict(type="Ramp", end=7, start=0.25, shape="linear"),
        dict(type="WarmUp", end=5, begin=1, start=0.1, by="iter"),
        dict(type="Decay", end=5, begin=1, final=0.1, shape="cosine"),
        dict(type="Stop", end=3, by="epoch"),
        [dict(type="WarmUp", end=3), dict(type="Stop", end=6)],
        "Constant",
    ]
    return st.sampled_from(entries).flatmap(mutated)


def factor(entry: Any, at: int) -> float:
    """A schedule written out."""
    if entry is None or entry == "Constant":
        return 1.0
    if isinstance(entry, list):
        return math.prod(factor(part, at) for part in entry)
    kind = entry["type"] if isinstance(entry, Mapping) else entry
    told = entry if isinstance(entry, Mapping) else {}
    if kind == "Constant":
        return 1.0
    end, begin = told["end"], told.get("begin", 0)
    if kind == "Stop":
        return float(at < end)
    first = told.get("start", 1.0 if kind == "Decay" else 0.0)
    last = told.get("final", 0.0 if kind == "Decay" else 1.0)
    if at >= end or at <= begin:
        return last if at >= end else first
    share = (at - begin) / (end - begin)
    share = (1 - math.cos(math.pi * share)) / 2 if told.get("shape") == "cosine" else share
    return (1 - share) * first + share * last


def check_schedule(case: Case) -> None:
    with refused_in_one_line():
        built = build_schedule(case)
        for at in range(9):
            step = Step(iteration=at, epoch=at)  # the entry counts in one of both
            assert math.isclose(built(step), factor(case, at), rel_tol=1e-12, abs_tol=1e-12), f"factor at {at}"


class Nest(nn.Module):
    """Modules in lists and dicts, whose outputs are tensors, lists and dicts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, width, 1), nn.Conv2d(width, width, 1)])
        self.head = nn.Linear(width, 5)

    def pool(self, maps: torch.Tensor) -> torch.Tensor:
        return maps.mean((2, 3))

    def forward(self, images: torch.Tensor) -> dict[str, Any]:
        first = self.convs[0](images)
        second = self.convs[1](first)
        return {"maps": [first, second], "logits": self.head(self.pool(second))}


TAPS = {
    "convs.0": lambda net, x: net.convs[0](x),
    "convs[1]": lambda net, x: net.convs[1](net.convs[0](x)),
    "convs.1:input": lambda net, x: net.convs[0](x),
    "head:input": lambda net, x: net.pool(net.convs[1](net.convs[0](x))),
    "pool()": lambda net, x: net.pool(net.convs[1](net.convs[0](x))),
    "pool():input": lambda net, x: net.convs[1](net.convs[0](x)),
    "[logits]": lambda net, x: net(x)["logits"],
    "[maps][0]": lambda net, x: net(x)["maps"][0],
    "[maps][-1]": lambda net, x: net(x)["maps"][1],
    "head": lambda net, x: net(x)["logits"],
}
"""Taps, and what they read, written out."""


def tap_entries() -> st.SearchStrategy[Case]:
    letters = st.text(st.sampled_from("convshead01[]().:*-_ input\n"), max_size=6)
    pieces = st.tuples(st.sampled_from(sorted(TAPS)), st.integers(0, 12), st.integers(0, 12), letters)
    wrong = pieces.map(lambda p: p[0][: p[1]] + p[3] + p[0][p[1] + p[2] % 3 :])
    return st.one_of(st.sampled_from(sorted(TAPS)), wrong, st.sampled_from([one for one in ODD if one is not None]))


@cache
def _nests() -> tuple[Nest, Nest, torch.Tensor]:
    torch.manual_seed(0)
    return Nest(4), Nest(4), torch.rand(2, 3, 4, 4)


def check_tap(case: Case) -> None:
    student, teacher, images = _nests()
    with refused_in_one_line():
        distiller = Distiller(student, teacher, [dict(type="FeatureImitation", tap=case, adapter="none")], images)
        loss = distiller(images).loss
        (row, *more) = distiller.rows
        read = TAPS.get(case) if isinstance(case, str) else None
        if read is not None and not more:
            expected = (read(student, images) - read(teacher, images)).square().mean()
            assert torch.isclose(loss, expected), f"tap reads something else: {float(loss)} and not {float(expected)}"
            assert (
                tuple(map(int, row.student_shape.split("×"))) == read(student, images[:1].expand(2, -1, -1, -1)).shape
            )


# --- plans


def plan_entries() -> st.SearchStrategy[Case]:
    teacher = dict(config="tasks.py:large")
    assistant = dict(config="tasks.py:middle", teacher="teacher", terms=["SoftTargets"])
    student = dict(config="tasks.py:small", teacher="assistant", terms=[dict(type="SoftTargets", temperature=2.0)])
    entries = [
        dict(seeds=[0, 1], runs=dict(teacher=teacher, assistant=assistant, student=student)),
        dict(
            runs=dict(teacher=teacher, student=dict(config="tasks.py:small", teacher="teacher", recipe="akd", stop=2))
        ),
        dict(runs=dict(teacher=teacher, student={**student, "teacher": "teacher", "generations": 3})),
        dict(runs=dict(teacher=teacher, student=dict(config="tasks.py:small", each=dict(width=[2, 4, 8])))),
        dict(
            runs=dict(
                teacher=dict(teacher, each=dict(width=[2, 4])),
                student=dict(student, teacher=["teacher-2", "teacher-4"], options=dict(width=3)),
            )
        ),
        dict(runs=dict(teacher=teacher, student={**student, "teacher": "teacher", "data": dict(share=0.5)})),
        dict(runs=dict(first=dict(config="tasks.py:small", start="second"), second=teacher)),
    ]
    return st.sampled_from(entries).flatmap(lambda entry: mutated(entry, under=(("seeds",), ("runs",))))


def toml(value: Any) -> str:
    """A value as TOML, where that can say it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(str(key))} = {toml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value)  # null is no TOML, which must be said, too


def check_plan(case: Case) -> None:
    text = (
        "".join(f"{key} = {toml(value)}\n" for key, value in case.items()) if isinstance(case, Mapping) else str(case)
    )
    write_plan(text or " ")
    code, said = command("plan", "plan.toml", "--dry-run")
    if code == 0:
        for name in case["runs"]:
            assert name in said, f"run {name} is not in the plan"


# --- configs of MMDetection


def detector_entries() -> st.SearchStrategy[Case]:
    entry = dict(
        student="GFL",
        teacher=dict(config="its config", checkpoint="teacher.pth"),
        recipe=dict(type="ld", main=0.5),
        terms=[
            dict(
                type="FeatureImitation", tap="neck[*]", region="foreground", adapter="conv1x1", weight=2.0, name="own"
            ),
            dict(type="SoftTargets", temperature=3.0, schedule=dict(type="WarmUp", end=9)),
        ],
        dry_run_size=64,
    )
    plain_terms = {key: value for key, value in entry.items() if key != "recipe"}
    return st.sampled_from([entry, plain_terms]).flatmap(mutated)


@cache
def _teacher() -> tuple[dict[str, Any], str]:
    from support.det import detector, save_teacher

    config = detector(width=6, channels=12)
    return config, save_teacher(Path(tempfile.mkdtemp()) / "teacher.pth", config)


def check_detector(case: Case) -> None:
    from support.det import build, detector, losses, raw_batch

    given = copy.deepcopy(case) if isinstance(case, dict) else {"terms": case}
    given = {key: value for key, value in given.items() if isinstance(key, str)}
    teacher = given.get("teacher")
    if isinstance(teacher, dict):
        told = {"its config": _teacher()[0], "teacher.pth": _teacher()[1]}
        given["teacher"] = {k: told.get(v, v) if isinstance(v, str) else v for k, v in teacher.items()}
    plain_model = detector()
    kind = plain_model.pop("type")
    with refused_in_one_line():
        built = build({"student": kind, **plain_model, **given, "type": "DistilledDetector"})
        if built.distiller is None:
            return
        for name, term in built.distiller.terms.items():
            for one in given.get("terms") or ():
                if isinstance(one, dict) and one.get("name") == name:
                    check_meant(one, term, f"term {name}")
        for name, value in losses(built, raw_batch()).items():
            assert not name.startswith("distill.") or value.isfinite(), f"{name} is {value}"


# --- recipe files and command lines


def recipe_entries() -> st.SearchStrategy[Case]:
    causal = dict(RECIPE, task="causal", data=dict(train="a.jsonl", text="text", length=8), chunked=4)
    causal["student"] = dict(model_type="gpt2", n_embd=8, n_layer=1, n_head=2)
    causal["terms"] = [dict(type="ForwardKL", weight=0.5)]
    plain = {key: value for key, value in RECIPE.items() if key not in ("teacher", "terms")}
    return st.sampled_from([RECIPE, plain, causal]).flatmap(mutated)


def check_recipe(case: Case) -> None:
    code, said = command("check", write_recipe(case))
    if code == 0:
        assert "loss" in said, "nothing was run"


def command_lines() -> st.SearchStrategy[Case]:
    lines = [
        ["check", "recipe.yaml", "--cfg-options", "training.learning_rate=0.1", "data.length=4"],
        ["train", "recipe.yaml", "--work-dir", "work", "--seed", "3", "--cfg-options", "training.max_steps=1"],
        ["train", "recipe.yaml", "--resume", "work", "--amp", "--timeout", "30"],
        ["export", "student.pth", "out.pth", "--force", "--trusted", "--peer", "a", "--onnx", "--size", "8", "8"],
        ["test", "recipe.yaml", "work", "--cfg-options", "data.length=4"],
        ["cache", "recipe.yaml", "--out", "store", "--top-k", "5", "--values", "float16"],
        ["list", "SoftTargets"],
        ["plan", "plan.toml", "--dry-run"],
        ["report", "out"],
    ]
    odd = (
        "",
        "0",
        "-1",
        "1e99",
        "nan",
        "a=b",
        "a.b.c=[",
        "training=5",
        "data=[unclosed",
        "--nothing",
        "--seed",
        "..",
        "é",
    )
    return st.sampled_from(lines).flatmap(lambda line: mutated(line, odd=odd)).map(_words)


def _words(line: Any) -> list[str]:
    return [str(word) for word in line] if isinstance(line, list) else [str(line)]


def check_command(case: Case) -> None:
    write_recipe(RECIPE)
    check_plan(dict(runs=dict(teacher=dict(config="tasks.py:large"))))
    command(*case)


def fuzz(name: str, attack: str, strategy: Any, check: Any, count: int, **settings: Any) -> Campaign:
    """A campaign of changed entries."""
    promise = f"{attack}: what was meant is built, or one line says what to change"
    return Campaign(f"fuzz {name}", promise, Drawn(strategy), check, count, **settings)


FUZZ: Sequence[Campaign] = (
    fuzz("terms", "terms and recipes of plain PyTorch", term_entries, check_terms, 3000, sample=60, block=300),
    fuzz("schedules", "schedules", schedule_entries, check_schedule, 1000, sample=100, block=500),
    fuzz("taps", "taps", tap_entries, check_tap, 1000, sample=50, block=250),
    fuzz("plans", "plans", plan_entries, check_plan, 2000, sample=20, block=200),
    fuzz(
        "detectors",
        "distilled models of MMDetection",
        detector_entries,
        check_detector,
        1000,
        sample=0,
        block=50,
        host="mmdet",
    ),
    fuzz(
        "recipes",
        "recipe files of Hugging Face",
        recipe_entries,
        check_recipe,
        1200,
        sample=4,
        block=50,
        host="transformers",
    ),
    fuzz("commands", "command lines", command_lines, check_command, 800, sample=4, block=50, host="transformers"),
)
