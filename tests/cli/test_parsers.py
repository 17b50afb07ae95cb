"""The command line itself: verbs, options, help, and that the manual knows all of them."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from erofsd.cli import VERBS, build_parser, main

MANUAL = Path(__file__).resolve().parents[2] / "erofsd/resources/erofsd.1"


def verb_parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of each verb."""
    for action in build_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    raise AssertionError("no verbs")


def options(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The options of *parser* but for --help."""
    return (a for a in parser._actions if a.option_strings and a.dest != "help")


def manual_section(verb: str) -> str:
    """What the manual says under the heading of *verb*, with roff's escapes for dashes undone."""
    text = MANUAL.read_text().replace("\\-", "-")
    match = re.search(rf"^\.SS erofsd {verb}\b.*?(?=^\.S[SH] )", text, re.MULTILINE | re.DOTALL)
    assert match, f"erofsd {verb} has no section in the manual"
    return match[0]


@pytest.mark.parametrize("verb", VERBS)
def test_manual_has_every_option_of_every_verb(verb: str) -> None:
    section = manual_section(verb)
    for action in options(verb_parsers()[verb]):
        for name in action.option_strings:
            assert re.search(rf"{re.escape(name)}\b", section), f"{verb} {name} is not in the manual"
        for choice in action.choices or ():
            assert str(choice) in section, f"{verb} {action.dest}={choice} is not in the manual"


@pytest.mark.parametrize("verb", VERBS)
def test_manual_has_no_option_that_does_not_exist(verb: str) -> None:
    known = {name for action in options(verb_parsers()[verb]) for name in action.option_strings}
    tags = re.findall(r"^\.TP\n(.*)$", manual_section(verb), re.MULTILINE)
    named = {name for tag in tags for name in re.findall(r"--[a-z-]+", tag)}
    assert named <= known


def test_manual_lists_every_exit_code() -> None:
    status = re.search(r"^\.SH EXIT STATUS.*?(?=^\.SH )", MANUAL.read_text(), re.MULTILINE | re.DOTALL)
    assert status
    assert re.findall(r"^\.B (\d+)$", status[0], re.MULTILINE) == ["0", "1", "2", "3", "4", "5", "130"]


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_has_an_example_of_it(verb: str) -> None:
    text = verb_parsers()[verb].format_help()
    assert "examples:" in text
    assert f"erofsd {verb}" in text.partition("examples:")[2]


@pytest.mark.parametrize("verb", VERBS)
def test_every_argument_is_explained(verb: str) -> None:
    for action in verb_parsers()[verb]._actions:
        assert action.help, f"{verb} {action.dest}"


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    began = time.monotonic()
    code = (
        "import sys; from erofsd.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('aiohttp', 'asyncio', 'structlog', 'msgspec', 'uvloop') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    "argv", [[], ["nonsense"], ["ls", "--nonsense"], ["mount", "a", "b", "--engine", "x"]]
)
def test_wrong_usage_ends_with_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as info:
        main(argv)
    assert info.value.code == 2


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as info:
        main(["--version"])
    assert info.value.code == 0
    assert re.fullmatch(r"erofsd \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_what_is_not_there_yet_ends_with_3_and_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mount", "example.org/x", "/mnt", "--engine", "nbd"]) == 3
    assert "not in this version" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["/mnt", "--prepare"], [], ["--prepare", "--standalone"]])
def test_mount_wants_a_directory_or_none(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mount", "example.org/x", *argv]) == 2
    assert "DIR" in capsys.readouterr().err
