"""The command ``python -m kdgraft_bench.plans``."""

from __future__ import annotations

import argparse

from .measure import LENGTHS, SCHEMES, measure

parser = argparse.ArgumentParser(
    prog="python -m kdgraft_bench.plans", description="carry out a plan that ships; test its runs"
)
parser.add_argument("scheme", choices=SCHEMES)
parser.add_argument("host", choices=LENGTHS)
parser.add_argument("--seeds", type=int, default=1, help="number of seeds to train and average over (default: 1)")
parser.add_argument("--iterations", type=int, help="iterations of every training (default: those of the demo)")
parser.add_argument("--out", help="where results go (default: runs/plans/<scheme>_<host>)")
parser.add_argument("--dry-run", action="store_true", help="print what would be done, and do nothing")

if __name__ == "__main__":
    measure(**vars(parser.parse_args()))
