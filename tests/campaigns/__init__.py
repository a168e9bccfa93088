"""Campaigns: seeded attacks on the promises, many at a time and counted. ``make campaign`` runs them all, ``make test`` a sample of each."""

from __future__ import annotations

from campaigns.code import CODE
from campaigns.damage import DAMAGE, NO_SPACE
from campaigns.equivalence import EQUIVALENCE
from campaigns.fuzz import FUZZ
from campaigns.kills import KILLS
from campaigns.long import LONG
from campaigns.numbers import CRITICS, NUMBERS
from campaigns.ranks import RANKS
from campaigns.runner import Campaign

CAMPAIGNS: dict[str, Campaign] = {
    campaign.name: campaign
    for campaign in (KILLS, *DAMAGE, NO_SPACE, *FUZZ, NUMBERS, CRITICS, RANKS, *CODE, EQUIVALENCE, LONG)
}
"""By name, in the order of the table."""
