"""Steps to time, and the tables of their times and memory, the same for every host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from kdgraft.tables import print_rows

from ..results import markdown
from ..timing import median_interval, ratio_interval

Rows = list[dict[str, str]]


def training_step(loss: Callable[[], Tensor], parameters: Iterable[nn.Parameter], device: str) -> Callable[[], None]:
    """Return a step to time: forward, under bf16 autocast on a GPU, backward and SGD."""
    optimizer = torch.optim.SGD(parameters, lr=1e-5, momentum=0.9)

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def teacher_forward(forward: Callable[[], object], device: str) -> Callable[[], None]:
    """Return a step to time: a forward without gradients, under bf16 autocast on a GPU."""

    @torch.no_grad()
    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            forward()

    return step


def machine(device: str) -> str:
    """Describe the device in a title."""
    return f"{device}, {torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()


def compared(seconds: Mapping[str, Sequence[float]], references: Sequence[str] = ()) -> Rows:
    """Compare each step with ``plain`` + ``teacher forward`` and with the references, of the same round.

    Args:
        seconds: step -> seconds of each round.
        references: the steps in the denominators of further ratios.

    Returns:
        A row for each step, with its median and its ratios.
    """
    sums = [plain + teacher for plain, teacher in zip(seconds["plain"], seconds["teacher forward"], strict=True)]
    rows = []
    for name, values in seconds.items():
        distils = name not in ("plain", "teacher forward")
        row = {
            "step": name,
            "ms": f"{median_interval(values).median * 1e3:.0f}",
            "/ (plain + teacher forward)": str(ratio_interval(values, sums)) if distils else "–",
        }
        for reference in references:
            row[f"/ {reference}"] = str(ratio_interval(values, seconds[reference])) if distils else "–"
        rows.append(row)
    return rows


def publish(tables: Mapping[str, Rows], device: str, out: str) -> Rows:
    """Print tables and write them to ``bench_cpu.md`` or ``bench_cuda.md``; return the first one.

    Args:
        tables: title -> rows.
        device: the device that was measured.
        out: the folder.
    """
    for title, rows in tables.items():
        print_rows(rows, title)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n\n".join(f"{title}\n\n{markdown(rows)}" for title, rows in tables.items())
    (folder / f"bench_{device}.md").write_text(f"{text}\n")
    return next(iter(tables.values()))
