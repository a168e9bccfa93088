"""The first cases of each campaign; ``make campaign`` runs them all."""

from __future__ import annotations

from pathlib import Path

import pytest

from campaigns import CAMPAIGNS
from campaigns.damage import can_mount
from campaigns.runner import Listed
from kdgraft.hosts import installed

SLOW = [name for name, one in CAMPAIGNS.items() if not one.sample]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CAMPAIGNS]
)
@pytest.mark.timeout(600)
def test_the_first_cases_hold(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    campaign = CAMPAIGNS[name]
    if not installed(campaign.host) or (name == "no space" and not can_mount()):
        pytest.skip("this machine lacks what the campaign needs")
    monkeypatch.chdir(tmp_path)
    size = campaign.sample or 1
    counts = campaign.run(0, size)
    assert counts.tried == size
    assert not counts.failures, [(one.kind, one.case, one.said) for one in counts.failures]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, one in CAMPAIGNS.items() if isinstance(one.cases, Listed)])
def test_a_list_of_cases_is_tried_once_and_whole(name: str):
    campaign = CAMPAIGNS[name]
    if not installed(campaign.host) or (name == "no space" and not can_mount()):
        pytest.skip("this machine lacks what the campaign needs")
    assert isinstance(campaign.cases, Listed) and len(campaign.cases.cases()) == campaign.count
