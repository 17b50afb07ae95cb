"""Built-ins by name, entry points for the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Generic, TypeVar, cast

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps a name to an object that is imported when it is first asked for.

    Args:
        group: Entry-point group in which other distributions add theirs. A built-in is never replaced.
        builtin: Name to ``"module:attribute"``, listed by hand where a reader can find it.
    """

    def __init__(self, group: str, builtin: Mapping[str, str]) -> None:
        self._group = group
        self._builtin = dict(builtin)

    def __getitem__(self, name: str) -> T:
        """The object called *name*.

        Raises:
            KeyError: Nobody registered that name.
        """
        if target := self._builtin.get(name):
            module, _, attribute = target.partition(":")
            return cast(T, getattr(import_module(module), attribute))
        for entry in entry_points(group=self._group, name=name):
            return cast(T, entry.load())
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        """Names: the built-in ones in their written order, then the others."""
        yield from self._builtin
        yield from (e.name for e in entry_points(group=self._group) if e.name not in self._builtin)
