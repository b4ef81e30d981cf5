"""The server's log lines: as text for people, or as JSON for machines."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

from .context import RequestContext
from .errors import shorten

logger = logging.getLogger("pyllm.server")

PROBES = frozenset({"/health", "/ready", "/metrics"})
"""Routes that machines ask for all the time: logged at debug level, not counted, and open without a key."""


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


def configure_logging(level: str, form: str = "text") -> None:
    """Log to stderr; `level` is PyLLM's only, since libraries log prompts at lower levels."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(JsonFormatter() if form == "json" else text)
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("pyllm").setLevel(level.upper())


def log_request(context: RequestContext, seconds: float) -> None:
    """Log a request that has ended, without its prompt."""
    level = logging.DEBUG if context.path in PROBES else logging.INFO
    if not logger.isEnabledFor(level):
        return
    method, status, request_id = context.scope["method"], context.status, context.request_id
    path = repr(shorten(context.scope["path"]).encode("ascii", "backslashreplace").decode())[1:-1]
    fields: dict[str, Any] = {"method": method, "path": path, "status": status, "id": request_id}
    text = ""
    if context.generation is not None:
        progress = context.generation.log_fields()
        text = "".join(f" {kind}_tokens={count}" for kind, count in progress["tokens"].items())
        text += "".join(f" {name}={value:.3f}" for name, value in progress.items() if name != "tokens")
        fields |= progress
    fields["seconds"] = round(seconds, 6)
    line = "%s %s %d id=%s%s seconds=%.3f"
    logger.log(level, line, method, path, status, request_id, text, seconds, extra={"fields": fields})
