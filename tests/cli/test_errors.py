"""How commands fail: one line and a hint for the user, a traceback for our own bugs."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from erofsd import errors
from erofsd.cli import ls, main, report


def failing(exc: BaseException) -> Callable[[argparse.Namespace], int]:
    """A verb that ends with *exc*."""

    def run(_args: argparse.Namespace) -> int:
        raise exc

    return run


@pytest.mark.parametrize(
    ("exc", "code"),
    [
        (errors.ErofsdError("x"), 1),
        (errors.UsageError("x"), 2),
        (errors.ConfigError("x"), 2),
        (errors.NotPossibleHere("x"), 3),
        (errors.CorruptImage("x"), 4),
        (errors.UnsupportedImage("x"), 4),
        (errors.BlobCorrupt("x"), 4),
        (errors.CodecError("x"), 4),
        (errors.BlobNotFound("x"), 5),
        (errors.BackendDenied("x"), 5),
        (errors.BackendTemporary("x"), 5),
        (errors.CacheFull("x"), 1),
    ],
)
def test_exit_code_follows_from_the_kind_of_error(
    exc: errors.ErofsdError, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ls, "run", failing(exc))
    assert main(["ls"]) == code
    assert capsys.readouterr().err == "erofsd: x\n"


def test_error_is_one_line_and_its_hint_another(capsys: pytest.CaptureFixture[str]) -> None:
    report(errors.ErofsdError("first\nsecond", hint="do this"))
    assert capsys.readouterr().err == "erofsd: first second\n  hint: do this\n"


def test_bug_is_printed_whole(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(ls, "run", failing(ZeroDivisionError("oops")))
    assert main(["ls"]) == 1
    text = capsys.readouterr().err
    assert "Traceback" in text
    assert "ZeroDivisionError: oops" in text
    assert "bug" in text


def test_interrupt_from_the_keyboard_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ls, "run", failing(KeyboardInterrupt()))
    assert main(["ls"]) == 130


def test_reader_that_goes_away_causes_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "erofsd", "doctor", "--json"],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        os.close(writer)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
