"""``make campaign``: run campaigns, go on where they were interrupted, print what failed and write the table of counts."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from campaigns import CAMPAIGNS
from campaigns.pool import run_blocks
from campaigns.results import MARKS, PAGE, ROOT, Key, Results, table
from campaigns.runner import Campaign, Counts
from kdgraft.errors import nearest
from kdgraft.hosts import installed
from support.marked import write_between

OUT = ROOT / "build" / "campaigns"


def main(argv: Sequence[str] | None = None) -> int:
    """Run campaigns and return 1 if any case failed."""
    arguments = _parser().parse_args(argv)
    chosen = {name: CAMPAIGNS[name] for name in arguments.names or CAMPAIGNS if installed(CAMPAIGNS[name].host)}
    results = Results(arguments.out / "results.jsonl", list(CAMPAIGNS.values()))
    keys = [key for name, one in chosen.items() for key in _blocks(name, one, arguments.share)]
    due = [key for key in keys if key not in results.blocks]
    print(f"{len(due)} of {len(keys)} blocks to run; what ended is in {results.path}", flush=True)

    def ended(key: Key, counts: Counts) -> None:
        results.add(key, counts)
        print(f"{key[0]} {key[1]}: {counts.held} of {counts.tried} held, {counts.seconds:.0f} s", flush=True)
        for failure in counts.failures:
            print(f"  {failure.kind}\n    {json.dumps(failure.case, default=repr)[:300]}", flush=True)

    run_blocks(CAMPAIGNS, due, ended, processes=arguments.processes, log=arguments.out / "log.txt")
    found = {name: results.of(name) for name in CAMPAIGNS}
    print(table(list(chosen.values()), found))
    if arguments.table or not arguments.names:
        write_between(PAGE, MARKS, table(list(CAMPAIGNS.values()), found))
    return int(any(counts.failures for counts in (found[name] for name in chosen)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m campaigns", description=__doc__)
    parser.add_argument("names", nargs="*", type=_known, help="some campaigns; all by default")
    parser.add_argument("--share", type=float, default=1.0, help="run this part of each campaign")
    parser.add_argument("--processes", type=int, default=2, help="how many run side by side")
    parser.add_argument("--table", action="store_true", help="write the table even where only some campaigns are named")
    parser.add_argument(
        "--out", type=Path, default=OUT, help="the folder of the results, which a second call completes"
    )
    return parser


def _known(name: str) -> str:
    """Return the name of a campaign."""
    if name not in CAMPAIGNS:
        raise argparse.ArgumentTypeError(f"no campaign is called {name!r}{nearest(name, CAMPAIGNS)}")
    return name


def _blocks(name: str, campaign: Campaign, share: float) -> list[Key]:
    """Return the blocks of a campaign; the last one may be smaller."""
    count = max(1, math.ceil(campaign.count * share))
    sizes = [campaign.block] * (count // campaign.block) + [count % campaign.block]
    return [(name, number, size) for number, size in enumerate(sizes) if size]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
