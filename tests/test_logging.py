"""Logs: one JSON object a line on stderr, whoever logs."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

PRELUDE = "import logging, structlog\nfrom erofsd.logging import configure_logging\n"


def logged(code: str) -> list[dict[str, Any]]:
    """What a fresh interpreter that runs *code* writes to stderr, line by line."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code], capture_output=True, check=True, stdin=subprocess.DEVNULL
    )
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_event_is_one_line_of_json_with_its_values() -> None:
    [event] = logged("configure_logging()\nstructlog.get_logger().info('fill.done', blob_id='x', offset=5)")
    assert event["event"] == "fill.done"
    assert (event["level"], event["blob_id"], event["offset"]) == ("info", "x", 5)
    assert event["timestamp"].endswith("Z")


def test_values_that_are_no_json_are_written_as_text() -> None:
    [event] = logged(
        "configure_logging()\nstructlog.get_logger().info('x', path=__import__('pathlib').Path('/a'))"
    )
    assert event["path"] == "/a"


def test_level_cuts_off_what_is_less_severe() -> None:
    events = logged(
        "configure_logging('warning')\nlog = structlog.get_logger()\n"
        "log.debug('a'); log.info('b'); log.warning('c'); log.error('d')"
    )
    assert [e["event"] for e in events] == ["c", "d"]


def test_traceback_is_in_the_line() -> None:
    [event] = logged(
        "configure_logging()\n"
        "try: 1 / 0\n"
        "except ZeroDivisionError: structlog.get_logger().exception('request.crashed')"
    )
    assert "ZeroDivisionError" in event["exception"]


def test_what_libraries_log_is_json_too() -> None:
    [event] = logged("configure_logging()\nlogging.getLogger('aiohttp').warning('odd %d', 7)")
    assert event["event"] == "library.logged"
    assert (event["logger"], event["message"], event["level"]) == ("aiohttp", "odd 7", "warning")


def test_exception_that_a_library_logs_keeps_its_traceback() -> None:
    [event] = logged(
        "configure_logging()\n"
        "try: 1 / 0\n"
        "except ZeroDivisionError: logging.getLogger('asyncio').exception('task died')"
    )
    assert "ZeroDivisionError" in event["exception"]


def test_log_that_nobody_reads_any_more_harms_nobody() -> None:
    code = PRELUDE + (
        "import os\nconfigure_logging()\nr, w = os.pipe()\nos.close(r)\nos.dup2(w, 2)\n"
        "structlog.get_logger().info('x')\nprint('alive')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert done.stdout == b"alive\n"
