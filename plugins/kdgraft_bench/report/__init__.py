"""``kdgraft report``: a page that shows whether distilling paid, from the folders that trainings leave behind."""

from .page import write_report
from .runs import Run, pictures_of, read_runs

__all__ = ["Run", "pictures_of", "read_runs", "write_report"]
