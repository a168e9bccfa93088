"""Plans: runs that follow from one another, such as teacher, assistant, student."""

from .plan import Choice, Plan, PlannedRun
from .read import located, plan_of, read_plan, read_toml
from .run import carry_out

__all__ = ["Choice", "Plan", "PlannedRun", "carry_out", "located", "plan_of", "read_plan", "read_toml"]
