"""What campaigns found: a file to which each block is added when it ends, and the table of counts on the page."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from campaigns.runner import TESTS, Campaign, Counts, Failure

ROOT = TESTS.parent
PAGE = ROOT / "docs" / "campaigns.md"
MARKS = "<!-- counts: make campaign -->", "<!-- /counts -->"
Key = tuple[str, int, int]
"""A block: its campaign, its number and its size."""


def fingerprint() -> str:
    """Return a hash of the code that is attacked and of the campaigns; results of other code do not count."""
    found = hashlib.sha256()
    for folder in ("plugins", "det", "seg", "nlp", "tests/campaigns", "tests/support"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


class Results:
    """The blocks that ended, one a line: an interrupted command goes on with the others.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.code = fingerprint()
        self.blocks: dict[Key, Counts] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                told = json.loads(line)
            except json.JSONDecodeError:  # killed while it was written
                continue
            if told.pop("code") == self.code:
                key = told.pop("campaign"), told.pop("block"), told.pop("size")
                self.blocks[key] = Counts(**{**told, "failures": [Failure(**one) for one in told["failures"]]})

    def add(self, key: Key, counts: Counts) -> None:
        """Write down a block."""
        self.blocks[key] = counts
        name, block, size = key
        line = json.dumps(dict(code=self.code, campaign=name, block=block, size=size, **asdict(counts)), default=repr)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def of(self, name: str) -> Counts:
        """Return the sum of a campaign's blocks."""
        blocks = [counts for (campaign, *_), counts in sorted(self.blocks.items()) if campaign == name]
        failures = [failure for counts in blocks for failure in counts.failures]
        return Counts(sum(c.tried for c in blocks), failures, sum(c.seconds for c in blocks))


def table(campaigns: Sequence[Campaign], found: Mapping[str, Counts]) -> str:
    """Return the table of counts as Markdown; a campaign that was not run whole says so."""
    lines = ["| campaign | attack, and what must hold | tried | held | failed |", "| --- | --- | ---: | ---: | ---: |"]
    for campaign in campaigns:
        counts = found[campaign.name]
        tried = f"{counts.tried:,}" + (f" of {campaign.count:,}" if counts.tried < campaign.count else "")
        cells = campaign.name, campaign.attack, tried, f"{counts.held:,}", f"{len(counts.failures):,}"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
