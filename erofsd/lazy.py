"""Modules that are loaded when something of them is first used."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType


def load_lazily(name: str) -> ModuleType:
    """The module *name*, executed at the first access to an attribute of it.

    For what costs more than the rest of a short command together and is often not used. The first access must
    come from one thread.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    loader = importlib.util.LazyLoader(spec.loader)
    spec.loader = loader
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
