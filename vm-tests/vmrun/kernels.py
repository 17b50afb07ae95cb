"""The kernels that can be booted, by the names ``--kernel`` takes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from . import cache
from .errors import NotBuilt
from .recipes import stock, uml


@dataclass(frozen=True, slots=True)
class Kernel:
    """One bootable kernel: which vehicle carries it and how it is made."""

    name: str
    vehicle: Literal["uml", "qemu"]
    time_limit_s: float
    purpose: str
    fingerprint: Callable[[], str]
    source_version: Callable[[], str | None]
    build: Callable[[], cache.Built]


def _uml(series: str) -> Kernel:
    name = f"uml-{series}"
    return Kernel(
        name,
        "uml",
        120.0,
        f"User Mode Linux {series}, self-built, cachefiles on demand",
        lambda: uml.fingerprint(series),
        lambda: uml.source_version(series),
        lambda: uml.build(name, series),
    )


def _on_demand(series: str) -> Kernel:
    name = f"debian-{series}"
    return Kernel(
        name,
        "qemu",
        600.0,
        f"Debian's own {series} cloud kernel, cachefiles and erofs modules rebuilt with on-demand mode",
        stock.fingerprint,
        lambda: stock.source_version(series),
        lambda: stock.build_on_demand(name, series),
    )


_ALL = (
    _uml("6.12"),
    _uml("6.1"),
    _on_demand("6.12"),
    _on_demand("6.1"),
    Kernel(
        "debian-fanotify",
        "qemu",
        600.0,
        "Debian's unmodified backports cloud kernel: fanotify pre-content events, file-backed EROFS",
        stock.fingerprint_fanotify,
        lambda: None,
        lambda: stock.build_fanotify("debian-fanotify"),
    ),
)
KERNELS = {kernel.name: kernel for kernel in _ALL}


def find(kernel: Kernel) -> cache.Built | None:
    """The kernel as built earlier, for the source that is installed now; None when there is none."""
    return cache.find(kernel.name, kernel.source_version(), kernel.fingerprint())


def obtain(kernel: Kernel, *, may_build: bool, rebuild: bool = False) -> cache.Built:
    """The kernel from the cache, built first when it is missing and *may_build*.

    Raises:
        NotBuilt: It is missing and must not be built.
        RunnerError: The build failed.
    """
    if not rebuild and (built := find(kernel)):
        return built
    if not may_build:
        raise NotBuilt(f"{kernel.name} is not built; `vm-tests/run --build {kernel.name}` builds it")
    with cache.lock(kernel.name):
        if not rebuild and (built := find(kernel)):  # whoever held the lock made it
            return built
        print(f"building {kernel.name}: {kernel.purpose}", file=sys.stderr, flush=True)
        return kernel.build()
