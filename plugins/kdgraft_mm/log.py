"""The suite's warnings in the log of the run that they are about."""

from __future__ import annotations

import logging

from mmengine.logging import MMLogger


class RunLog(logging.Handler):
    """Hands records on to whatever the Runner that was made last writes to: the console and its log file."""

    def emit(self, record: logging.LogRecord) -> None:
        for handler in MMLogger.get_current_instance().handlers:
            if record.levelno >= handler.level:
                handler.handle(record)


def tell_the_run() -> None:
    """Has the suite's warnings written as mmengine's own are."""
    logger = logging.getLogger("kdgraft")
    if not any(isinstance(handler, RunLog) for handler in logger.handlers):
        logger.addHandler(RunLog())
