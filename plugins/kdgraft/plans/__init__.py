"""Plans: runs that follow from one another, such as teacher, assistant, student."""

from .plan import Choice, Plan, PlannedRun
from .read import read_plan
from .run import carry_out

__all__ = ["Choice", "Plan", "PlannedRun", "carry_out", "read_plan"]
