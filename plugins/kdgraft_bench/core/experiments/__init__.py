"""The experiments of ``kdgraft demo core``, in the order of their table."""

from .assistants import GAP, STOPPING
from .augmented import NETAUG
from .base import Experiment
from .every import EVERY
from .generations import BORN_AGAIN
from .hinton import ENSEMBLE, HARD_SOFT, SHARE, TEMPERATURE
from .methods import METHODS
from .patience import PATIENCE

EXPERIMENTS = {
    each.name: each
    for each in (HARD_SOFT, TEMPERATURE, SHARE, ENSEMBLE, GAP, STOPPING, METHODS, EVERY, PATIENCE, BORN_AGAIN, NETAUG)
}

__all__ = ["EXPERIMENTS", "Experiment"]
