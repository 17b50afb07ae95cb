"""One suite for every engine: over a scripted device, and over the kernel."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest

from ondemand.testing import ENGINE_CHECKS, RigFactory
from tests.ondemand import cachefiles_rigs, fanotify_rigs

Check = Callable[[RigFactory], Awaitable[None]]


@pytest.mark.parametrize("check", ENGINE_CHECKS, ids=lambda check: check.__name__)
async def test_fanotify_engine_over_scripted_device(check: Check, tmp_path: Path) -> None:
    await check(partial(fanotify_rigs.scripted, tmp_path))


@pytest.mark.kernel
@pytest.mark.parametrize("check", ENGINE_CHECKS, ids=lambda check: check.__name__)
async def test_fanotify_engine_over_kernel(check: Check, fanotify_directory: Path) -> None:
    await check(partial(fanotify_rigs.kernel, fanotify_directory))


@pytest.mark.parametrize("check", ENGINE_CHECKS, ids=lambda check: check.__name__)
async def test_cachefiles_engine_over_scripted_device(check) -> None:
    await check(cachefiles_rigs.scripted)


@pytest.mark.kernel
@pytest.mark.parametrize("check", ENGINE_CHECKS, ids=lambda check: check.__name__)
async def test_cachefiles_engine_over_kernel(check, cachefiles_directory: Path) -> None:
    await check(partial(cachefiles_rigs.kernel, cachefiles_directory))
