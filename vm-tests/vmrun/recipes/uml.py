"""User Mode Linux from Debian's kernel source: tinyconfig plus ``configs/``, and what ``patches/`` mends."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from vmrun import cache, packages
from vmrun.errors import RunnerError

from . import source

_HERE = Path(__file__).resolve().parents[2]
FRAGMENTS = (_HERE / "configs/common", _HERE / "configs/uml")
PATCHES = tuple(sorted((_HERE / "patches").glob("uml-*.patch")))
TOOLS = ("gcc", "make", "flex", "bison", "bc", "xz-utils", "patch", "ccache")

# Symbols which that series does not know yet; any other loss is a mistake in the fragments.
UNKNOWN_IN = {
    "6.1": {"CONFIG_EROFS_FS_ZIP_DEFLATE", "CONFIG_EROFS_FS_ZIP_ZSTD", "CONFIG_EROFS_FS_BACKED_BY_FILE"},
}
_REVISION = b"1"  # raise when the steps below change what comes out


def fingerprint(series: str) -> str:
    """Names the configuration: the fragments, the patches and this recipe's revision."""
    return cache.fingerprint(_REVISION, series.encode(), *(path.read_bytes() for path in FRAGMENTS + PATCHES))


def source_version(series: str) -> str | None:
    """Version of the installed source package; without one, None, any built kernel serves."""
    return packages.installed_version(source.package(series))


def build(name: str, series: str) -> cache.Built:
    """Configure, compile and publish one UML kernel: four to eleven minutes on two cores, 30 s by ccache.

    Raises:
        RunnerError: A package is missing, the configuration lost a symbol, or make failed.
    """
    packages.ensure([source.package(series), *TOOLS])
    version = source_version(series)
    assert version is not None
    with cache.scratch(name) as work:
        tree = source.unpack(series, work)
        for patch in PATCHES:
            source.apply(patch, tree)
        _configure(name, series, tree)
        source.make(name, tree, "ARCH=um", "linux")
        made = work / "made"
        made.mkdir()
        subprocess.run(["strip", "-o", made / "linux", tree / "linux"], check=True)
        shutil.copy(tree / ".config", made / "config")
        release = (tree / "include/config/kernel.release").read_text().strip()
        return cache.publish(name, made, fingerprint(series), version, release, {"kernel": "linux"})


def _configure(name: str, series: str, tree: Path) -> None:
    source.make(name, tree, "ARCH=um", "tinyconfig")
    merge = ["scripts/kconfig/merge_config.sh", "-m", ".config", *map(str, FRAGMENTS)]
    subprocess.run(merge, cwd=tree, check=True, capture_output=True)
    source.make(name, tree, "ARCH=um", "olddefconfig")
    lost = lost_symbols((tree / ".config").read_text()) - UNKNOWN_IN.get(series, set())
    if lost:
        raise RunnerError(
            f"{name}: Kconfig dropped {', '.join(sorted(lost))}: a dependency is missing in configs/"
        )


def lost_symbols(config: str) -> set[str]:
    """Symbols that the fragments set and *config*, a finished .config, does not have."""
    wanted = re.compile(r"^(CONFIG_\w+)=", re.MULTILINE)
    asked = {symbol for path in FRAGMENTS for symbol in wanted.findall(path.read_text())}
    return asked - set(wanted.findall(config))
