"""The throughput of a DistillTrainer on one process, and under FSDP2 on two that share its batch.

Run as a module it is one of these processes, and the first of them prints its figures.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import TrainerCallback, TrainingArguments

from kdgraft.distributed import rank
from kdgraft.errors import DistillError
from kdgraft_nlp import DistillTrainer

from .language import JSD, llama
from .steps import Rows

SEQUENCES, LENGTH = 4, 128
STEPS, WARM_UP = 6, 2
SETTINGS = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def sharded_rows(device: str, vocabulary: int = 32_768, width: int = 256) -> Rows:
    """Measure one process, and two under FSDP2, which have half of the cores or one GPU each.

    Raises:
        DistillError: the processes failed.
    """
    counts = (1, 2) if device == "cpu" or torch.cuda.device_count() > 1 else (1,)
    found = {count: _measured(count, device, vocabulary, width) for count in counts}
    return [
        {
            "processes": "1" if count == 1 else f"{count}, FSDP2",
            "tokens/s": f"{one['tokens/s']:.0f}",
            "/ one process": f"{one['tokens/s'] / found[1]['tokens/s']:.2f}",
            "peak of a process (MiB)": f"{one['peak']:.0f}",
        }
        for count, one in found.items()
    ]


def _measured(count: int, device: str, vocabulary: int, width: int) -> dict[str, float]:
    threads = max((os.cpu_count() or 1) // count, 1)
    told = {**os.environ, "OMP_NUM_THREADS": str(threads), **(SETTINGS if count > 1 else {})}
    if device == "cpu":
        told["CUDA_VISIBLE_DEVICES"] = ""
    told["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(count), "-m"] if count > 1 else []
    command = [sys.executable, "-m", *launch, __name__, device, str(vocabulary), str(width)]
    done = subprocess.run(command, env=told, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise DistillError(f"{count} processes failed: {done.stderr.strip().splitlines()[-1:] or done.returncode}")
    figures: dict[str, float] = json.loads(lines[-1])
    return figures


class _Clock(TrainerCallback):
    """Callback that notes the time of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begun = 0.0

    def on_step_begin(self, *args: Any, **settings: Any) -> None:
        self._begun = time.perf_counter()

    def on_step_end(self, *args: Any, **settings: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._begun)


def shard_on_cpus() -> None:
    """Let accelerate shard on CPUs, for a measurement: it does so on accelerators alone, so that a process of several says it is one."""
    before = PartialState.__init__

    def begin(self: Any, *args: Any, **settings: Any) -> None:
        before(self, *args, **settings)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = begin  # type: ignore[method-assign]


def measure(device: str, vocabulary: int, width: int) -> dict[str, float]:
    """Train some steps in this process, alone or as one of several, and return its tokens a second and its peak in MiB."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1 and device == "cpu":
        shard_on_cpus()
    torch.manual_seed(0)
    student, teacher = llama(width, vocabulary, "cpu"), llama(2 * width, vocabulary, "cpu")
    ids = torch.randint(1, vocabulary, (SEQUENCES * (STEPS + WARM_UP), LENGTH))
    clock = _Clock()
    with tempfile.TemporaryDirectory() as scratch:
        args = TrainingArguments(
            str(Path(scratch)),
            per_device_train_batch_size=SEQUENCES // count,
            max_steps=STEPS + WARM_UP,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
            use_cpu=device == "cpu",
            optim="sgd",
        )
        trainer = DistillTrainer(
            model=student,
            teacher=teacher,
            terms=[dict(JSD)],
            chunked=True,
            args=args,
            train_dataset=[{"input_ids": row.tolist(), "labels": row.tolist()} for row in ids],
            data_collator=lambda rows: {key: torch.tensor([row[key] for row in rows]) for key in rows[0]},
            callbacks=[clock],
        )
        trainer.train()
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else _largest()
    return {"tokens/s": SEQUENCES * LENGTH / float(np.median(clock.seconds[WARM_UP:])), "peak": peak / 2**20}


def _largest() -> int:
    """Return the most bytes that this process has held; ``ru_maxrss`` would be those of the process that started it, if larger."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 0


if __name__ == "__main__":
    told = measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    if rank() == 0:
        print(json.dumps(told), flush=True)
