"""The demonstration, as the README's first command runs it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from erofsd.cli import main, quickstart
from erofsd.cli.machine import file_system
from ondemand.engines import Probe, probe

needs_engine = pytest.mark.skipif(
    os.geteuid() != 0 or not probe("fanotify", "/var/tmp").works, reason="fanotify does not work here"
)


@pytest.mark.kernel
@needs_engine
def test_demonstration_tells_its_figures_and_leaves_nothing_behind(tmp_path: Path) -> None:
    base = Path("/var/tmp", f"erofsd-test-{os.getpid()}")
    base.mkdir()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "erofsd", "quickstart", "--json", "--dir", str(base)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert list(base.iterdir()) == []
    finally:
        shutil.rmtree(base, ignore_errors=True)
    figures = json.loads(done.stdout)
    assert figures["engine"] == "fanotify"
    assert 0 < figures["fetched_bytes"] < figures["image_bytes"] / 2
    assert figures["image_bytes"] < figures["content_bytes"]
    assert 20 < figures["files_read"] < figures["files"]
    assert figures["files_compared"] == figures["files"]
    assert figures["waits"] > 0
    assert str(base) not in Path("/proc/self/mountinfo").read_text()


def test_kernel_without_an_engine_ends_with_3_and_says_how_to_get_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(
        "erofsd.cli.machine.probe_engines",
        lambda _: [Probe("fanotify", False, "EINVAL", "use a newer kernel")],
    )
    monkeypatch.setattr(quickstart, "_working_directory", lambda _: Path("/var/tmp"))
    assert main(["quickstart"]) == 3
    text = capsys.readouterr().err
    assert "fanotify: EINVAL" in text
    assert "use a newer kernel" in text
    assert "Linux 6.15" in text


@pytest.mark.skipif(file_system(Path("/dev/shm")) != "tmpfs", reason="no tmpfs on /dev/shm")
def test_directory_on_the_wrong_file_system_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert main(["quickstart", "--dir", "/dev/shm"]) == 3
    assert "/dev/shm is on tmpfs" in capsys.readouterr().err
