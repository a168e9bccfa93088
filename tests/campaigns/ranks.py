"""Several processes: 2, 3 and 4 with uneven batches are one, and no process waits for ever for one that died, stopped or differs."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from campaigns.equivalence import without_bias
from campaigns.jobs import finished, scratch
from campaigns.runner import Campaign, Case, Listed
from kdgraft import TERMS, Reader
from support.forking import environment
from support.methods import split
from support.plain import Method, method
from support.processes import as_rank, environments, found_by
from support.tensors import gradients

IMAGES = 9
LOCAL = ("WeightMatching", "BoundarySamples", "AdversarialImages", "ONE", "BYOT", "MaskedGeneration")
"""Terms of one process, whose own networks see batches of their own, or that draw masks for their images; ``tests/plugins/test_distributed.py`` has what holds for them."""
PATIENCE = 15
"""Seconds that the processes wait for each other (``--timeout``)."""


def terms() -> list[str]:
    """The terms of plain PyTorch that are compared."""
    return [name for name in split(TERMS, Reader)[0] if name not in LOCAL]


def shares(world: int, seed: int) -> list[slice]:
    """Uneven parts of the images, one for each process."""
    cuts = sorted(random.Random(seed).sample(range(1, IMAGES), world - 1))
    return [slice(start, end) for start, end in zip([0, *cuts], [*cuts, IMAGES], strict=True)]


def gradient(term: str, part: slice, steps: int = 3) -> dict[str, Tensor]:
    """The gradient of the last of a few steps of one process, on its part of the images."""
    built = method(term)
    generator = torch.Generator().manual_seed(0)
    images, drawn = torch.rand(2, IMAGES, 3, 8, 8, generator=generator, dtype=torch.float64)
    labels = drawn if built.labels.ndim > 1 else torch.arange(IMAGES) % 5
    one = Method(built.distiller.double(), images[part], labels[part])  # in float32 rounding would hide what is wrong
    for _ in range(steps):  # some terms train a network of their own first
        one.distiller.zero_grad()
        one.losses()["distill.term.loss"].backward()
    return gradients(one.distiller)


def of_rank(rank: int, told: str) -> dict[str, Any]:
    """What one process of several finds of each term: its gradients, or the error."""
    case = json.loads(told)
    part = shares(case["world"], case["seed"])[rank]
    return {term: gradient(term, part) for term in terms()}


def check_shares(case: Case) -> None:
    with scratch() as folder:
        found = found_by(case["world"], "campaigns.ranks", folder, json.dumps(case))
    wrong = []
    for term in terms():
        # The mean over processes, as DDP takes it.
        sides = [one[term] for one in found]
        mean = {name: torch.stack([side[name] for side in sides]).mean(0) for name in sides[0]}
        try:
            without_bias(mean, gradient(term, slice(0, IMAGES)), term, worst=1e-6)
        except AssertionError as error:
            wrong.append(str(error))
    assert not wrong, f"ranks: {len(wrong)} of {len(terms())}: {'; '.join(wrong)[:600]}"


# --- a process that dies, stops or differs


def check_fault(case: Case) -> None:
    """The process that is left ends by itself, in time, with a word."""
    words = {"transformers": ["recipe.yaml"], "mmdet": ["config.py"]}[case["job"]]
    with finished(case["job"]) as folder:
        ranks = [_rank(folder, one, words, case["fault"]) for one in environments(2)]
        try:
            if case["fault"] != "other config":
                _wait_for(folder / "spread", ranks)
                ranks[1].send_signal(signal.SIGKILL if case["fault"] == "killed" else signal.SIGSTOP)
            said, _ = ranks[0].communicate(timeout=PATIENCE + 150)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        assert ranks[0].returncode, "it went on alone"
        assert "kdgraft: error: " in said or "Traceback" not in said, f"no word: {said[-500:]!r}"


def _rank(folder: Path, told: dict[str, str], words: list[str], fault: str) -> subprocess.Popen[str]:
    steps = "training.max_steps=100000" if words[0].endswith("yaml") else "train_cfg.max_iters=100000"
    options = [steps]
    if fault == "other config" and told["RANK"] == "1":
        options.append("terms=[HiddenStates]" if words[0].endswith("yaml") else "model.terms.0.tap=neck[0]")
    command = ["train", *words, "--work-dir", "spread", "--timeout", str(PATIENCE), "--cfg-options", *options]
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "kdgraft", *command],
        cwd=folder,
        env=environment(**told, CUDA_VISIBLE_DEVICES=""),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _wait_for(out: Path, ranks: list[subprocess.Popen[str]]) -> None:
    """Wait until the run has saved something, so that both train."""
    until = time.monotonic() + 120
    while time.monotonic() < until and not any(out.glob("**/*.pth")) and not any(out.glob("checkpoint-*")):
        assert all(rank.poll() is None for rank in ranks), "a process ended before anything befell it"
        time.sleep(0.2)


def cases() -> list[Case]:
    worlds = [dict(world=2 + number % 3, seed=number) for number in range(30)]
    return worlds + [
        dict(job=job, fault=fault)
        for job in ("transformers", "mmdet")
        for fault in ("killed", "stopped", "other config")
    ]


def check(case: Case) -> None:
    (check_shares if "world" in case else check_fault)(case)


RANKS = Campaign(
    "ranks",
    "2, 3 and 4 processes with uneven batches have the gradient of one; where one is killed, stops or has another config, the others "
    "end with a word",
    Listed(cases),
    check,
    count=36,
    sample=1,
    seconds=400,
    host="mmdet",
)

if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    as_rank(of_rank)
