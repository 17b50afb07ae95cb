"""The engines, and which of them this kernel can run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ondemand.engines.base import Engine
from ondemand.errors import EngineUnavailable, OndemandError
from ondemand.registry import Registry

ENGINES: Registry[type[Engine]] = Registry(
    "ondemand.engines",
    {
        "fanotify": "ondemand.engines.fanotify:FanotifyEngine",
        "cachefiles": "ondemand.engines.cachefiles:CachefilesEngine",
    },
)

PROOFS: Registry[Callable[[str], None]] = Registry(
    "ondemand.proofs",
    {
        "fanotify": "ondemand.canary:prove_fanotify",
        "cachefiles": "ondemand.canary_cachefiles:prove_cachefiles",
    },
)
"""For each engine, what tries it in a directory and raises EngineUnavailable."""

KNOWN = ("fanotify", "cachefiles", "nbd")
"""Names that mean an engine, in the order of preference, whether or not this version has it."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What became of the attempt to use an engine.

    Attributes:
        reason: How it was refused; empty if it works.
        hint: What an operator can do about that; empty if nothing.
    """

    name: str
    works: bool
    reason: str = ""
    hint: str = ""


def probe(name: str, directory: str) -> Probe:
    """Can the engine *name* serve files in *directory*? Found out by trying, never from version numbers.

    Blocks for milliseconds, for some seconds at worst: not on the event loop's thread.

    Raises:
        KeyError: No engine has that name.
    """
    try:
        prove = PROOFS[name]
    except KeyError:
        if name not in KNOWN:
            raise
        return Probe(name, False, f"this version of the program has no {name} engine yet")
    try:
        prove(directory)
    except EngineUnavailable as exc:
        return Probe(name, False, exc.reason, exc.hint)
    except (OSError, OndemandError) as exc:
        return Probe(name, False, f"the trial ended with: {exc}")
    return Probe(name, True)
