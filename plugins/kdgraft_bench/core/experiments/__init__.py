"""The experiments of ``kdgraft experiments``, in the order of their table."""

from .assistants import GAP, STOPPING
from .augmented import NETAUG
from .base import Experiment
from .every import EVERY
from .generations import BORN_AGAIN
from .generators import GENERATORS
from .hinton import ENSEMBLE, HARD_SOFT, SHARE, TEMPERATURE
from .methods import METHODS
from .mutual import MUTUAL
from .patience import PATIENCE
from .specialists import SPECIALISTS
from .weights import WEIGHTS

EXPERIMENTS = {
    each.name: each
    for each in (
        HARD_SOFT,
        TEMPERATURE,
        SHARE,
        ENSEMBLE,
        SPECIALISTS,
        GAP,
        STOPPING,
        METHODS,
        EVERY,
        MUTUAL,
        PATIENCE,
        BORN_AGAIN,
        NETAUG,
        GENERATORS,
        WEIGHTS,
    )
}

__all__ = ["EXPERIMENTS", "Experiment"]
