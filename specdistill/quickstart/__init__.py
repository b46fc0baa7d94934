"""The whole loop in one call, on any model and prompts, in the minutes it is given."""

from specdistill.quickstart.loop import check_run, quickstart
from specdistill.quickstart.plan import MINUTES, Plan, Task

__all__ = ["MINUTES", "Plan", "Task", "check_run", "quickstart"]
