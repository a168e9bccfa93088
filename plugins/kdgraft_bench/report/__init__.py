"""``kdgraft report``: a page that shows whether distilling paid, from the folders that trainings leave behind."""

from .page import pictures_in, write_report
from .runs import Run, read_runs

__all__ = ["Run", "pictures_in", "read_runs", "write_report"]
