"""The suite's warnings in the log of the run that they are about."""

from __future__ import annotations

import logging

from mmengine.logging import MMLogger


class RunLog(logging.Handler):
    """Passes records on to the handlers of the latest Runner: the console and its log file."""

    def emit(self, record: logging.LogRecord) -> None:
        """Pass one record on to the handlers whose level admits it."""
        for handler in MMLogger.get_current_instance().handlers:
            if record.levelno >= handler.level:
                handler.handle(record)


def tell_the_run() -> None:
    """Send the suite's warnings to the handlers that write mmengine's own messages."""
    logger = logging.getLogger("kdgraft")
    if not any(isinstance(handler, RunLog) for handler in logger.handlers):
        logger.addHandler(RunLog())
