"""Fixtures every test may use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.registry import Origin, RegistryServer, lying_origin

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def testdata() -> Path:
    """Real images made by other people's tools; absent from the repository itself."""
    path = ROOT.parent / "shared" / "testdata"
    if not path.is_dir():
        pytest.skip("no ../shared/testdata beside the checkout: real images cannot be read")
    return path


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    """A docker-registry that all tests share: use repository names of your own, and do not stop it."""
    server = RegistryServer(tmp_path_factory.mktemp("registry")).start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def nydusify(registry: RegistryServer, testdata: Path) -> str:
    """``host/nydusify``: a repository of the shared registry with all images of testdata, by their tags."""
    layout = testdata / "nydusify" / "layout"
    for tag in ("zstd", "lz4-128k", "batch", "dict", "index", "zran", "source"):
        registry.push_layout(layout, tag, "nydusify")
    return f"{registry.host}/nydusify"


@pytest.fixture
def origin() -> Iterator[Origin]:
    """An HTTP server that lies as it is told to."""
    with lying_origin() as server:
        yield server
