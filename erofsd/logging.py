"""structlog, configured once: JSON lines on stderr, the console renderer on a terminal."""

from __future__ import annotations

import logging as stdlib_logging
import os
import sys
from typing import Any

import msgspec
import structlog

from erofsd.config import LogLevel

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
STDERR_FILENO = 2


def configure_logging(level: LogLevel = "info", *, console: bool | None = None) -> None:
    """Send every event of at least *level* to stderr, also those of libraries that use ``logging``.

    Args:
        console: For a person instead of a collector; None means: if stderr is a terminal.
    """
    console = sys.stderr.isatty() if console is None else console
    renderer: structlog.typing.Processor
    if console:
        # Plain tracebacks: pretty ones would import rich wherever it happens to be installed.
        renderer = structlog.dev.ConsoleRenderer(
            colors=not os.environ.get("NO_COLOR"), exception_formatter=structlog.dev.plain_traceback
        )
    else:
        renderer = structlog.processors.JSONRenderer(serializer=_encode)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S.%f" if console else "iso", utc=not console),
            *([] if console else [structlog.processors.format_exc_info]),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=lambda *_: _Stderr(),
        cache_logger_on_first_use=True,
    )
    root = stdlib_logging.getLogger()
    root.handlers[:] = [_Forwarder()]
    root.setLevel(max(_LEVELS[level], stdlib_logging.INFO))


def _encode(event: dict[str, Any], **_: object) -> str:
    return msgspec.json.encode(event, enc_hook=str).decode()


class _Stderr:
    """Writes a line with one write(2): keeper and worker share the descriptor, and lines must not mix."""

    def msg(self, line: str) -> None:
        try:
            os.write(STDERR_FILENO, line.encode("utf-8", "backslashreplace") + b"\n")
        except OSError:
            pass  # whoever collected the log is gone; readers of mounted images must not notice

    debug = info = warning = error = critical = fatal = exception = log = msg


class _Forwarder(stdlib_logging.Handler):
    """Hands records of the standard library's logging to structlog."""

    def emit(self, record: stdlib_logging.LogRecord) -> None:
        try:
            log = structlog.get_logger()
            log.log(
                record.levelno // 10 * 10,
                "library.logged",
                logger=record.name,
                message=record.getMessage(),
                exc_info=record.exc_info,
            )
        except Exception:  # logging must never be what fails
            self.handleError(record)
