"""Sources of one and the same blob, each of another kind."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from erofsd.backends.faulty import FaultyBackend
from erofsd.backends.http import HttpBackend
from erofsd.backends.localfs import LocalBackend
from erofsd.backends.measured import MeasuredBackend
from erofsd.backends.ocilayout import LayoutBackend
from erofsd.backends.places import FirstOf
from erofsd.backends.reference import parse_registry_reference
from erofsd.backends.registry import RegistryBackend
from erofsd.backends.retry import RetryBackend
from erofsd.backends.settings import SourceSettings
from erofsd.backends.slow import SlowBackend
from erofsd.backends.transport import HttpClient, HttpLimits
from tests.registry import Origin, RegistryServer, nginx

BODY = random.Random(7).randbytes(3_000_001)
BLOB_ID = hashlib.sha256(BODY).hexdigest()
EMPTY_ID = hashlib.sha256(b"").hexdigest()
MISSING_ID = "0" * 64

# Short, so that a hang is noticed while the test waits for it.
SETTINGS = SourceSettings(inactivity_s=0.3, connect_timeout_s=2.0, attempts=4)
# For sources that do not hang, on a machine that may be busy.
PATIENT = SourceSettings(attempts=4)

Make = Callable[[], MeasuredBackend]


@pytest.fixture(scope="session")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An OCI layout with BODY and the empty blob, and no image."""
    path = tmp_path_factory.mktemp("layout")
    blobs = path / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    (blobs / BLOB_ID).write_bytes(BODY)
    (blobs / EMPTY_ID).write_bytes(b"")
    (path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": []}))
    return path


@pytest.fixture(scope="session")
def web(tmp_path_factory: pytest.TempPathFactory, layout: Path) -> Iterator[str]:
    """An nginx in front of the layout's blobs."""
    with nginx(tmp_path_factory.mktemp("nginx"), layout / "blobs" / "sha256") as url:
        yield url


def client(settings: SourceSettings = SETTINGS) -> HttpClient:
    """One with the settings of these tests."""
    return HttpClient(HttpLimits.of(settings))


def registry_backend(host: str, repository: str, settings: SourceSettings = SETTINGS) -> RegistryBackend:
    """A backend for *repository*."""
    return RegistryBackend(parse_registry_reference(f"{host}/{repository}"), settings)


KINDS = (
    "localfs",
    "layout",
    "nginx",
    "origin",
    "registry",
    "retry",
    "retry-registry",
    "faulty",
    "slow",
    "first-of",
)


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest, layout: Path) -> Make:
    """Makes a backend that has BODY and the empty blob."""
    kind: str = request.param
    match kind:
        case "localfs":
            return lambda: LocalBackend([layout / "blobs" / "sha256"])
        case "layout":
            return lambda: LayoutBackend(layout)
        case "nginx":
            url: str = request.getfixturevalue("web")
            return lambda: HttpBackend(client(PATIENT), prefix=url)
        case "origin":
            origin: Origin = request.getfixturevalue("origin")
            origin.objects = {f"/b/{BLOB_ID}": BODY, f"/b/{EMPTY_ID}": b""}
            return lambda: HttpBackend(client(PATIENT), prefix=f"{origin.url}/b/")
        case "retry":
            return lambda: RetryBackend(LocalBackend([layout]), 3)
        case "faulty":
            return lambda: FaultyBackend(LocalBackend([layout]))
        case "slow":
            return lambda: SlowBackend(LocalBackend([layout]), latency_s=0.001, bytes_per_s=1e10)
        case "first-of":
            return lambda: FirstOf([LocalBackend([layout / "none"]), LocalBackend([layout])])
    server: RegistryServer = request.getfixturevalue("registry")
    for body in (BODY, b""):
        server.push_blob("conformance", body)
    if kind == "registry":
        return lambda: registry_backend(server.host, "conformance", PATIENT)
    return lambda: RetryBackend(registry_backend(server.host, "conformance", PATIENT), 3)
