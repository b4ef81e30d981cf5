"""How the program's own log lines are written: as text for people, or as JSON for machines."""

from __future__ import annotations

import json
import logging
import sys
import time
from contextvars import ContextVar

current_request: ContextVar[str] = ContextVar("current_request", default="-")
"""The id of the request that is being answered, for what is said of its failures."""


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (UTC), level, logger, message, and the record's `fields` where it has some."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of one record; a traceback is one more member."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def configure_logging(level: str, form: str = "text") -> None:
    """Send log lines to stderr; `level` is for our own, since what libraries say in detail includes prompts."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(JsonFormatter() if form == "json" else text)
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("pyllm").setLevel(level.upper())
