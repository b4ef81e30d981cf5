"""The server's log lines: as text for people, or as JSON for machines."""

from __future__ import annotations

import json
import logging
import sys
import time


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time (UTC), level, logger, message, and the record's `fields` if it has any."""

    def format(self, record: logging.LogRecord) -> str:
        """Format one record; a traceback becomes the field `exception`."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {"time": f"{moment}.{int(record.msecs):03d}Z", "level": record.levelname.lower()}
        line |= {"logger": record.name, "message": record.getMessage()} | getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def configure_logging(level: str, form: str = "text") -> logging.Formatter:
    """Log to stderr, and return the format; `level` is PyLLM's only, since libraries log prompts at lower levels."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    formatter = JsonFormatter() if form == "json" else text
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("pyllm").setLevel(level.upper())
    return formatter


def dropped_notice(formatter: logging.Formatter, count: int) -> str:
    """Return a line that says that `count` lines of the log are missing."""
    text = f"Lines of the log that were dropped here, because they could not be written in time: {count}"
    fields = {"name": "pyllm.server", "levelno": logging.WARNING, "levelname": "WARNING", "msg": text}
    return formatter.format(logging.makeLogRecord(fields)) + "\n"
