"""Log lines for people (`text`) or machines (`json`), on stderr."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, Literal

LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

FIELDS = "fields"
"""Name of the extra under which a log call gives its values: `log.info("...", extra={FIELDS: {...}})`."""


class TextFormatter(logging.Formatter):
    """`2026-01-31 12:00:00 INFO message key=value`"""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        fields: dict[str, Any] = getattr(record, FIELDS, {})
        return " ".join([line, *(f"{name}={plain(value)}" for name, value in fields.items())])


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message and the fields."""

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure(log_format: str, level: str) -> None:
    """Send all of this process's log lines to stderr. `log_format` is `text` or `json`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for chatty in ("uvicorn.error", "uvicorn.access", "httpx", "transformers"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def plain(value: object) -> str:
    """`value` as one word of a text line, quoted where it could be taken for more or move the cursor."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    mistakable = not text or not text.isprintable() or any(c in ' "=' for c in text)
    return json.dumps(text) if mistakable else text
