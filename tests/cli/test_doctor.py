"""What doctor finds, and what it ends with."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest

from erofsd.cli import main
from erofsd.cli.machine import existing, file_system, kernel_options, knows_file_system
from ondemand.engines import KNOWN, Probe


@pytest.fixture
def working(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel with an engine."""
    monkeypatch.setattr("erofsd.cli.machine.probe_engines", lambda _: [Probe("fanotify", True)])
    monkeypatch.setattr("erofsd.cli.machine.is_privileged", lambda: True)
    monkeypatch.setattr("erofsd.cli.machine.knows_file_system", lambda _: True)


def checks(out: str) -> dict[str, dict[str, str]]:
    """The checks that ``doctor --json`` printed, by name."""
    return {check["name"]: check for check in json.loads(out)["checks"]}


def doctor(*argv: str) -> int:
    """Run it with a socket that is not there."""
    return main(["doctor", "--json", "--socket", "/nonexistent/api.sock", *argv])


@pytest.mark.usefixtures("working")
def test_machine_that_can_do_it_ends_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor("--state-dir", "/var/tmp") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"]
    assert report["engines"][0] == {"name": "fanotify", "works": True, "reason": "", "hint": ""}


@pytest.mark.usefixtures("working")
def test_kernel_without_an_engine_ends_with_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "erofsd.cli.machine.probe_engines",
        lambda _: [Probe("fanotify", False, "no such flag", "newer kernel")],
    )
    assert main(["doctor", "--socket", "/nonexistent/x"]) == 3
    text = capsys.readouterr().out
    assert "no such flag" in text
    assert "newer kernel" in text
    assert "no engine works" in text


@pytest.mark.usefixtures("working")
@pytest.mark.skipif(file_system(Path("/dev/shm")) != "tmpfs", reason="no tmpfs on /dev/shm")
def test_state_directory_on_tmpfs_is_in_the_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor("--state-dir", "/dev/shm/x/y") == 1
    check = checks(capsys.readouterr().out)["state directory"]
    assert check["status"] == "failed"
    assert "tmpfs" in check["detail"]
    assert "ext4" in check["hint"]


@pytest.mark.usefixtures("working")
def test_wrong_configuration_is_one_of_the_findings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.toml").write_text("deadlin = 5")
    assert doctor("--state-dir", "/var/tmp", "--config", str(tmp_path / "c.toml")) == 1
    check = checks(capsys.readouterr().out)["configuration"]
    assert "unknown key deadlin" in check["detail"]
    assert "deadline" in check["hint"]


@pytest.mark.usefixtures("working")
def test_few_descriptors_are_a_warning_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    assert doctor("--state-dir", "/var/tmp") == 0
    check = checks(capsys.readouterr().out)["descriptors"]
    assert check["status"] == "warning"
    assert "LimitNOFILE" in check["hint"]


def test_every_known_engine_has_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    doctor("--state-dir", "/var/tmp")
    report = json.loads(capsys.readouterr().out)
    assert [engine["name"] for engine in report["engines"]] == list(KNOWN)
    assert all(engine["works"] or engine["reason"] for engine in report["engines"])


def test_file_system_of_a_path_that_is_not_there_is_that_of_its_parent() -> None:
    assert existing(Path("/proc/nonexistent/x")) == Path("/proc")
    assert file_system(Path("/proc/nonexistent/x")) == "proc"


def test_kernel_is_read_without_a_complaint() -> None:
    assert knows_file_system("proc")
    assert not knows_file_system("nonexistent")
    assert all(name.startswith("CONFIG_") for name in kernel_options())
    assert os.uname().sysname == "Linux"
