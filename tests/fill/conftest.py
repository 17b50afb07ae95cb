"""A running provider over a store in a temporary directory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from erofsd.fill.provider import FillProvider
from tests.fill.images import Rig


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    provider = FillProvider(workers=2)
    runner = asyncio.get_running_loop().create_task(provider.run())
    await asyncio.sleep(0)
    try:
        yield Rig(tmp_path / "blobs", provider)
    finally:
        runner.cancel()
        try:
            await runner
        except asyncio.CancelledError:
            pass
