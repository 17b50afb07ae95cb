"""Promises of the project as a whole: what is shipped, what the scripts and the documents say."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import erofsd

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "CHANGELOG.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")))


def test_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    manual = (ROOT / "erofsd/resources/erofsd.1").read_text()
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert project["version"] == erofsd.__version__
    assert f'"erofsd {erofsd.__version__}"' in manual
    assert f"## {erofsd.__version__}" in changelog


def test_license_is_apache_2_in_full() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_first_screen_of_the_readme_shows_the_two_commands() -> None:
    first_screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:40])
    assert "scripts/quickstart" in first_screen
    assert "scripts/test" in first_screen


def test_scripts_are_executable_and_parse() -> None:
    for name in ("scripts/quickstart", "scripts/test", ".ci/run"):
        assert os.access(ROOT / name, os.X_OK), name
        subprocess.run(["bash", "-n", str(ROOT / name)], check=True)
        assert "set -euo pipefail" in (ROOT / name).read_text(), name


def test_continuous_integration_runs_the_test_script_and_nothing_else() -> None:
    lines = (ROOT / ".ci/run").read_text().splitlines()
    commands = [line for line in lines if line and not line.startswith(("#", "set "))]
    assert len(commands) == 1
    assert commands[0].endswith('scripts/test"')


def test_vm_tests_are_refused_by_name_until_there_are_some() -> None:
    if (ROOT / "vm-tests/run").exists():
        return
    done = subprocess.run([str(ROOT / "scripts/test"), "--vm"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "virtual machine" in done.stderr


def test_links_between_documents_lead_somewhere() -> None:
    for name in DOCUMENTS:
        text = (ROOT / name).read_text()
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            if "://" not in target:
                assert (ROOT / name).parent.joinpath(target).exists(), f"{name} links to {target}"


def test_every_package_ships_its_types() -> None:
    for package in ("erofsd", "ondemand"):
        assert (ROOT / package / "py.typed").exists()
