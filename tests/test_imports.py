"""Imports point one way: the parts stay replaceable only as long as nobody reaches around a seam."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

#: What `ondemand` may import besides the standard library and itself.
ONDEMAND_ALLOWED = {"structlog"}

#: erofsd's layers, upper ones first: a module imports from its own layer and those below it.
LAYERS = (
    {"cli", "__main__", "quickstart"},
    {"daemon"},
    {"snapshotter"},
    {"fill", "build"},
    {"blobs", "images"},
    {"client", "logging"},
    {"config", "api"},
    {"backends", "codecs"},
    {"errors", "lazy", "__init__", "resources"},
)

#: Parts that sit in one layer and do not know each other.
STRANGERS = (("fill", "build"), ("backends", "codecs"))

#: Where engines may be seen. The command line only asks which of them work.
ENGINE_USERS = ("erofsd/daemon/", "erofsd/fill/provider.py", "erofsd/cli/machine.py", "erofsd/cli/doctor.py")


def python_files(package: str) -> list[Path]:
    """Every module of *package*, relative to the project."""
    return sorted(p.relative_to(ROOT) for p in (ROOT / package).rglob("*.py"))


def imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """Absolute name and line of every import in the file, wherever it stands in it.

    ``from a import b`` counts as ``a.b`` if that is a module, else as ``a``.
    """
    for node in ast.walk(ast.parse((ROOT / path).read_text("utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full if is_module(full) else node.module), node.lineno


def is_module(name: str) -> bool:
    """True if *name* is a module or package of ours."""
    path = ROOT / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def layer_of(part: str) -> int:
    """Index of the layer that *part* of erofsd belongs to."""
    for index, parts in enumerate(LAYERS):
        if part in parts:
            return index
    raise AssertionError(f"erofsd/{part}: not in LAYERS: say where it belongs")


def part_of(path: Path) -> str:
    """``cli`` for erofsd/cli/ls.py, ``config`` for erofsd/config.py."""
    return path.parts[1].removesuffix(".py")


@pytest.mark.parametrize("path", python_files("ondemand"), ids=str)
def test_ondemand_knows_the_kernel_and_nothing_of_images(path: Path) -> None:
    for name, line in imports_of(path):
        top = name.partition(".")[0]
        allowed = top in sys.stdlib_module_names or top == "ondemand" or top in ONDEMAND_ALLOWED
        assert allowed, f"{path}:{line}: imports {name}"


@pytest.mark.parametrize("path", python_files("erofsd"), ids=str)
def test_erofsd_imports_downwards_only(path: Path) -> None:
    here = part_of(path)
    for name, line in imports_of(path):
        if not name.startswith("erofsd."):
            continue
        there = name.split(".")[1]
        assert layer_of(there) >= layer_of(here), f"{path}:{line}: {here} imports {name}, which is above it"
        for pair in STRANGERS:
            assert {here, there} != set(pair), f"{path}:{line}: {here} and {there} do not know each other"


@pytest.mark.parametrize("path", python_files("erofsd"), ids=str)
def test_engines_are_seen_only_where_they_are_driven(path: Path) -> None:
    if path.as_posix().startswith(ENGINE_USERS):
        return
    for name, line in imports_of(path):
        assert not name.startswith(("ondemand.engines", "ondemand.protocol", "ondemand.wire")), (
            f"{path}:{line}: imports {name}"
        )


def test_wire_and_protocol_touch_no_descriptors_and_do_not_log() -> None:
    for path in python_files("ondemand"):
        if path.parts[1] in ("wire", "protocol"):
            for name, line in imports_of(path):
                assert name.partition(".")[0] not in ("os", "asyncio", "structlog", "logging"), (
                    f"{path}:{line}: imports {name}"
                )


def test_extensions_are_imported_by_the_modules_that_wrap_them_only() -> None:
    users: dict[str, list[str]] = {}
    for package in ("ondemand", "erofsd"):
        for path in python_files(package):
            for name, _ in imports_of(path):
                for base in (name, name.rpartition(".")[0]):
                    if (base.startswith(("ondemand._", "erofsd._"))) and "__" not in base:
                        users.setdefault(base, []).append(str(path))
                        break
    for extension, paths in users.items():
        assert len(set(paths)) == 1, f"{extension} is imported by {sorted(set(paths))}"
