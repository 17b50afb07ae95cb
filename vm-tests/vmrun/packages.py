"""Debian packages: install what a build or a vehicle needs, download what must not be installed.

Mirrors are never named here: apt's own configuration says where packages come from.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import RunnerError

_LOCK_TIMEOUT_S = 600
_APT_ENV = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}


def installed_version(package: str) -> str | None:
    """Version of an installed package, None when it is absent or this is no Debian."""
    try:
        reply = subprocess.run(
            ["dpkg-query", "-W", "-f", "${db:Status-Abbrev} ${Version}", package],
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        return None
    status, _, version = reply.stdout.partition("  ")
    return version.strip() if reply.returncode == 0 and status.startswith("ii") else None


def ensure(packages: Sequence[str]) -> None:
    """Install those of *packages* that are missing.

    Raises:
        RunnerError: Not root, or apt could not; names the packages.
    """
    missing = [package for package in packages if installed_version(package) is None]
    if not missing:
        return
    if os.geteuid() != 0:
        raise RunnerError(f"packages missing, install them as root: {' '.join(missing)}")
    print(f"installing {' '.join(missing)}", file=sys.stderr, flush=True)
    # Guests that are started side by side may all want the same packages.
    wait = f"-oDPkg::Lock::Timeout={_LOCK_TIMEOUT_S}"
    install = ["apt-get", "install", wait, "-y", "-q", "--no-install-recommends", *missing]
    # Lists may be absent or out of date: once more.
    for command in (install, ["apt-get", "update", wait, "-q"], install):
        reply = _apt(command)
        if reply.returncode == 0 and command is install:
            return
    raise RunnerError(
        f"apt-get could not install {' '.join(missing)}:\n{reply.stdout[-2000:]}{reply.stderr[-2000:]}"
    )


def _apt(command: Sequence[str], cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=_APT_ENV, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


def debian_mirror() -> str:
    """The mirror that the host's own sources use for Debian's main archive (not the security one).

    Raises:
        RunnerError: They name none.
    """
    wanted = ["Created-By: Packages", "Origin: Debian", "Component: main"]
    reply = _apt(["apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME)", *wanted])
    for line in reply.stdout.splitlines():
        uri, _, codename = line.partition(" ")
        if re.fullmatch(r"[a-z]+", codename):  # "bookworm", neither "bookworm-updates" nor "-security"
            return uri
    raise RunnerError("the host's apt sources name no mirror of Debian's main archive")


class Archive:
    """A view of the package archive: the host's own, or a private one that leaves the host's lists alone."""

    def __init__(self, options: Sequence[str] = ()) -> None:
        self._options = list(options)

    def search(self, pattern: str) -> dict[str, str]:
        """Packages whose whole name matches *pattern*, with the newest version of each.

        Args:
            pattern: Means the same in POSIX, which apt-cache speaks, and in Python: no ``\\d``.
        """
        names = [
            line.split(" ", 1)[0]
            for line in self._run("apt-cache", "search", "--names-only", pattern).splitlines()
        ]
        names = [name for name in names if re.fullmatch(pattern, name)]
        if not names:
            return {}
        found: dict[str, str] = {}
        for stanza in self._run("apt-cache", "show", "--no-all-versions", *names).split("\n\n"):
            fields = dict(
                line.split(": ", 1) for line in stanza.splitlines() if re.match(r"(Package|Version): ", line)
            )
            if fields:
                found[fields["Package"]] = fields["Version"]
        return found

    def extract(self, packages: Sequence[str], downloads: Path, root: Path) -> None:
        """Download each ``package`` or ``package=version`` and unpack it below *root*; none is installed."""
        downloads.mkdir(parents=True, exist_ok=True)
        root.mkdir(parents=True, exist_ok=True)
        before = set(downloads.iterdir())
        self._run("apt-get", "download", *packages, cwd=downloads)
        for package_file in sorted(set(downloads.iterdir()) - before):
            subprocess.run(["dpkg", "-x", package_file, root], check=True)
            package_file.unlink()

    def _run(self, program: str, *arguments: str, cwd: Path | None = None) -> str:
        reply = _apt([program, *self._options, *arguments], cwd)
        if reply.returncode != 0:
            raise RunnerError(f"{program} {' '.join(arguments)[:200]}: {reply.stderr.strip()[-1000:]}")
        return reply.stdout


class PrivateArchive(Archive):
    """Packages of another suite, by an apt root of our own below *home*."""

    def __init__(self, home: Path, suite: str) -> None:
        self._home = home
        super().__init__(
            [
                f"-oDir::State={home}/state",
                "-oDir::State::status=/var/lib/dpkg/status",
                f"-oDir::Cache={home}/cache",
                f"-oDir::Etc::sourcelist={home}/list",
                "-oDir::Etc::sourceparts=/dev/null",
            ]
        )
        for part in ("state/lists/partial", "cache/archives/partial"):
            (home / part).mkdir(parents=True, exist_ok=True)
        keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
        (home / "list").write_text(f"deb [signed-by={keyring}] {debian_mirror()} {suite} main\n")
        self._run("apt-get", "update", "-q")
