"""Regions: weights over the positions at which features are compared."""

from .base import All, Region, on_grid, token_weights, valid_positions
from .fine_grained import FineGrained
from .foreground import Foreground, foreground_weights

__all__ = [
    "All",
    "FineGrained",
    "Foreground",
    "Region",
    "foreground_weights",
    "on_grid",
    "token_weights",
    "valid_positions",
]
