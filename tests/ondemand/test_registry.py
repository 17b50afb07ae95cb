"""Built-ins by name, entry points for the rest."""

from __future__ import annotations

from importlib.metadata import EntryPoint, EntryPoints

import pytest

from ondemand import registry
from ondemand.registry import Registry


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> Registry[object]:
    """Two built-in names, and a distribution that adds one and tries to replace one."""
    added = [EntryPoint("tree", "ast:AST", "shapes"), EntryPoint("json", "pickle:loads", "shapes")]

    def entry_points(*, group: str, name: str | None = None) -> EntryPoints:
        return EntryPoints(entry for entry in added if entry.group == group and name in (None, entry.name))

    monkeypatch.setattr(registry, "entry_points", entry_points)
    return Registry("shapes", {"json": "json:loads", "absent": "no_such_module:thing"})


def test_a_built_in_is_imported_when_asked_for(shapes: Registry[object]) -> None:
    import json

    assert shapes["json"] is json.loads


def test_an_entry_point_adds_a_name(shapes: Registry[object]) -> None:
    import ast

    assert shapes["tree"] is ast.AST


def test_names_are_built_ins_first_and_once(shapes: Registry[object]) -> None:
    assert list(shapes) == ["json", "absent", "tree"]


def test_an_unknown_name_is_a_key_error(shapes: Registry[object]) -> None:
    with pytest.raises(KeyError):
        shapes["circle"]


def test_listing_names_imports_nothing(shapes: Registry[object]) -> None:
    assert "absent" in list(shapes)
    with pytest.raises(ModuleNotFoundError):
        shapes["absent"]
