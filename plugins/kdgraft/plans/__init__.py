"""Plans: runs that follow from one another, such as teacher, assistant, student."""

from .plan import Plan, PlannedRun, read_plan
from .run import carry_out

__all__ = ["Plan", "PlannedRun", "carry_out", "read_plan"]
