"""What campaigns found: a file to which each block is added when it ends, and the table of counts on the page."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from campaigns.runner import TESTS, Campaign, Counts, Failure

ROOT = TESTS.parent
PAGE = ROOT / "docs" / "campaigns.md"
MARKS = "<!-- counts: make campaign -->", "<!-- /counts -->"
ATTACKED = ("plugins", "det", "seg", "nlp", "tests/support")
"""The folders of the code that is attacked, and of the models and data that every campaign builds on."""
Key = tuple[str, int, int]
"""A block: its campaign, its number and its size."""


def fingerprint(campaign: Campaign) -> str:
    """Return a hash of the code that is attacked and of the campaign's own modules; results of other code do not count."""
    found = hashlib.sha256()
    attacked = [path for folder in ATTACKED for path in (ROOT / folder).rglob("*.py")]
    check: Any = campaign.check
    own = Path(inspect.getfile(getattr(check, "func", check)))
    for path in sorted({*attacked, *with_imports(own, set())}):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def with_imports(path: Path, seen: set[Path]) -> set[Path]:
    """Return a module of the campaigns with those that it imports, directly or not."""
    seen.add(path)
    for name in re.findall(r"^ *from campaigns\.(\w+) import", path.read_text(encoding="utf-8"), re.MULTILINE):
        other = TESTS / "campaigns" / f"{name}.py"
        if other not in seen:
            with_imports(other, seen)
    return seen


class Results:
    """The blocks that ended, one a line: an interrupted command goes on with the others.

    Args:
        path: the file.
        campaigns: the campaigns whose results it has.
    """

    def __init__(self, path: Path, campaigns: Sequence[Campaign]) -> None:
        self.path = path
        self.code = {one.name: fingerprint(one) for one in campaigns}
        self.blocks: dict[Key, Counts] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                told = json.loads(line)
            except json.JSONDecodeError:  # killed while it was written
                continue
            key = told.pop("campaign"), told.pop("block"), told.pop("size")
            if told.pop("code") == self.code.get(key[0]):
                self.blocks[key] = Counts(**{**told, "failures": [Failure(**one) for one in told["failures"]]})

    def add(self, key: Key, counts: Counts) -> None:
        """Write down a block."""
        self.blocks[key] = counts
        name, block, size = key
        told = dict(code=self.code[name], campaign=name, block=block, size=size, **asdict(counts))
        line = json.dumps(told, default=repr)
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
