"""Pushing: what a real registry takes, and what is done when the connection breaks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import msgspec
import pytest

from erofsd.backends.ocilayout import LayoutBackend
from erofsd.backends.push import LayoutTarget, RegistryTarget, open_target, store
from erofsd.backends.reference import RegistryReference
from erofsd.backends.settings import RegistrySettings, SourceSettings
from erofsd.errors import BackendTemporary, BlobCorrupt, BlobNotFound, ErofsdError, SourceError
from ondemand.ranges import Range
from tests.registry import PASSWORD, USERNAME, RegistryServer

BODY = random.Random(3).randbytes(6_000_001)
DIGEST = f"sha256:{hashlib.sha256(BODY).hexdigest()}"
SETTINGS = SourceSettings(inactivity_s=1.0, connect_timeout_s=2.0, attempts=4)
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"


@pytest.fixture
def body(tmp_path: Path) -> Path:
    """BODY in a file."""
    path = tmp_path / "body"
    path.write_bytes(BODY)
    return path


def target(host: str, repository: str, *mounts: str) -> RegistryTarget:
    """A repository to push to."""
    opened = open_target(RegistryReference(host, repository, "x", None), SETTINGS, mounts=mounts)
    assert isinstance(opened, RegistryTarget)
    return opened


# --- a real registry ---


async def test_blob_that_was_pushed_can_be_read_and_is_not_asked_for_again(
    registry: RegistryServer, body: Path
) -> None:
    told: list[int] = []
    repository = target(registry.host, "push/a")
    try:
        assert not await repository.provide(DIGEST, len(BODY))
        await repository.push_blob(DIGEST, len(BODY), body, told.append)
        assert await repository.provide(DIGEST, len(BODY))
        read = [piece async for piece in repository.stream(DIGEST, Range(0, len(BODY)))]
    finally:
        await repository.aclose()
    assert b"".join(read) == BODY
    assert sum(told) == len(BODY)
    assert repository.uploaded_bytes == len(BODY)


async def test_blob_of_another_repository_is_mounted(registry: RegistryServer, body: Path) -> None:
    first, second = target(registry.host, "push/from"), target(registry.host, "push/to", "push/from")
    try:
        await first.push_blob(DIGEST, len(BODY), body, lambda size: None)
        assert not await second.provide(DIGEST, len(BODY), ["push/nothing-here"])
        assert await second.provide(DIGEST, len(BODY), ["push/nothing-here", "push/from"])
        assert second.uploaded_bytes == 0
    finally:
        await first.aclose()
        await second.aclose()


async def test_registry_refuses_what_has_another_digest(registry: RegistryServer) -> None:
    repository = target(registry.host, "push/wrong")
    try:
        with pytest.raises(SourceError, match="digest"):
            await repository.push_blob(DIGEST, 3, b"abc", lambda size: None)
        assert not await repository.provide(DIGEST, 3)
    finally:
        await repository.aclose()


async def test_push_to_a_registry_with_a_password(tmp_path: Path, body: Path) -> None:
    server = RegistryServer(tmp_path / "registry", password=True, tls=True).start()
    try:
        settings = SourceSettings(
            registries={server.host: _login(server)}, inactivity_s=2.0, connect_timeout_s=2.0
        )
        repository = RegistryTarget(RegistryReference(server.host, "a/b", "x", None), settings)
        try:
            await repository.push_blob(DIGEST, len(BODY), body, lambda size: None)
            assert await repository.provide(DIGEST, len(BODY))
        finally:
            await repository.aclose()
    finally:
        server.stop()


def _login(server: RegistryServer) -> RegistrySettings:
    return RegistrySettings(ca=server.ca, username=USERNAME, password=PASSWORD)


# --- a registry that breaks off ---


@dataclass
class Uploads:
    """A registry that remembers how far uploads came, and can lose connections.

    Attributes:
        cuts: For each coming PATCH: after how many of its bytes the connection breaks; None: not at all.
        forgets: It does not know broken uploads any more.
        away: So many questions for an upload are answered by 503.
        silent_commit: It stores the next blob and breaks off before it says so.
    """

    cuts: list[int | None] = field(default_factory=list)
    forgets: bool = False
    away: int = 0
    silent_commit: bool = False
    seen: list[tuple[str, str, str]] = field(default_factory=list)
    parts: dict[str, bytearray] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    host: str = ""


@pytest.fixture
def uploads() -> Iterator[Uploads]:
    """A registry for uploads only."""
    state = Uploads()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def answer(self, status: int, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content_Length": "0", **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()

        def note(self) -> str:
            state.seen.append((self.command, urlsplit(self.path).path, self.headers.get("Content-Range", "")))
            return urlsplit(self.path).path.rpartition("/")[2]

        def place(self, name: str) -> dict[str, str]:
            at = len(state.parts[name])
            return {"Location": f"/v2/r/blobs/uploads/{name}", "Range": f"0-{max(0, at - 1)}"}

        def do_HEAD(self) -> None:
            digest = self.note()
            known = digest in state.blobs
            length = str(len(state.blobs[digest])) if known else "0"
            self.answer(200 if known else 404, Content_Length=length)

        def do_POST(self) -> None:
            self.note()
            name = f"u{len(state.parts)}"
            state.parts[name] = bytearray()
            self.answer(202, **self.place(name))

        def do_PATCH(self) -> None:
            name = self.note()
            if name not in state.parts:
                self.answer(404)
                return
            stated = re.match(r"(\d+)-", self.headers.get("Content-Range", "0-"))
            assert stated
            if int(stated[1]) != len(state.parts[name]):
                self.answer(416)
                return
            length = int(self.headers["Content-Length"])
            cut = state.cuts.pop(0) if state.cuts else None
            state.parts[name] += self.rfile.read(length if cut is None else cut)
            if cut is not None:
                if state.forgets:
                    del state.parts[name]
                self.close_connection = True
                self.connection.close()
                return
            self.answer(202, **self.place(name))

        def do_GET(self) -> None:
            name = self.note()
            if state.away:
                state.away -= 1
                self.answer(503)
            elif name in state.parts:
                self.answer(204, **self.place(name))
            else:
                self.answer(404)

        def do_PUT(self) -> None:
            name = self.note()
            state.parts[name] += self.rfile.read(int(self.headers.get("Content-Length", 0)))
            digest = parse_qs(urlsplit(self.path).query)["digest"][0]
            state.blobs[digest] = bytes(state.parts.pop(name))
            if state.silent_commit:
                state.silent_commit = False
                self.close_connection = True
                self.connection.close()
                return
            self.answer(201, Docker_Content_Digest=digest)

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # breaking off is what this is about

    server = Server(("127.0.0.1", 0), Handler)
    state.host = f"127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield state
    server.shutdown()
    server.server_close()


async def push(
    uploads: Uploads, body: Path, remembered: Path | None = None, settings: SourceSettings = SETTINGS
) -> list[int]:
    """Push BODY there; what was told of the progress."""
    told: list[int] = []
    reference = RegistryReference(uploads.host, "r", "x", None)
    repository = open_target(reference, settings, uploads=remembered)
    try:
        await repository.push_blob(DIGEST, len(BODY), body, told.append)
    finally:
        await repository.aclose()
    return told


async def test_upload_goes_on_at_the_byte_where_the_connection_broke(uploads: Uploads, body: Path) -> None:
    uploads.cuts = [2_500_000, 1_000_000]
    told = await push(uploads, body)
    assert uploads.blobs[DIGEST] == BODY
    assert sum(told) == len(BODY)
    ranges = [stated for method, _, stated in uploads.seen if method == "PATCH"]
    assert ranges == ["", f"2500000-{len(BODY) - 1}", f"3500000-{len(BODY) - 1}"]


async def test_upload_goes_on_when_the_registry_is_back(uploads: Uploads, body: Path) -> None:
    uploads.cuts, uploads.away = [2_500_000], 1
    await push(uploads, body)
    ranges = [stated for method, _, stated in uploads.seen if method == "PATCH"]
    assert ranges == ["", f"2500000-{len(BODY) - 1}"]


async def test_another_run_goes_on_at_the_byte_where_the_upload_broke(
    uploads: Uploads, body: Path, tmp_path: Path
) -> None:
    remembered = tmp_path / "uploads"
    remembered.mkdir()
    uploads.cuts = [2_500_000]
    with pytest.raises(BackendTemporary, match=DIGEST):
        await push(uploads, body, remembered, msgspec.structs.replace(SETTINGS, attempts=2))
    assert DIGEST not in uploads.blobs
    assert [path.stat().st_mode & 0o777 for path in remembered.iterdir()] == [0o600]
    assert sum(await push(uploads, body, remembered)) == len(BODY)
    assert uploads.blobs[DIGEST] == BODY
    ranges = [stated for method, _, stated in uploads.seen if method == "PATCH"]
    assert ranges == ["", f"2500000-{len(BODY) - 1}"]
    assert not list(remembered.iterdir())


@pytest.mark.parametrize("text", ["", "nonsense", "http://[", "\0", "ftp://127.0.0.1/x"])
async def test_damaged_memory_of_an_upload_is_none(uploads: Uploads, body: Path, text: str) -> None:
    remembered = body.parent / "uploads"
    remembered.mkdir()
    uploads.cuts = [2_500_000]
    with pytest.raises(BackendTemporary):
        await push(uploads, body, remembered, msgspec.structs.replace(SETTINGS, attempts=2))
    (path,) = remembered.iterdir()
    path.write_text(text)
    await push(uploads, body, remembered)
    assert uploads.blobs[DIGEST] == BODY


async def test_upload_begins_again_where_the_registry_forgot_it(uploads: Uploads, body: Path) -> None:
    uploads.cuts, uploads.forgets = [2_500_000], True
    told = await push(uploads, body)
    assert uploads.blobs[DIGEST] == BODY
    assert sum(told) == len(BODY)
    assert [method for method, _, _ in uploads.seen].count("POST") == 2


async def test_blob_whose_last_answer_was_lost_is_not_sent_twice(uploads: Uploads, body: Path) -> None:
    uploads.silent_commit = True
    assert sum(await push(uploads, body)) == len(BODY)
    assert [method for method, _, _ in uploads.seen].count("PATCH") == 1


async def test_upload_that_never_gets_anywhere_ends(uploads: Uploads, body: Path) -> None:
    uploads.cuts, uploads.forgets = [100] * 50, True
    with pytest.raises(BackendTemporary):
        await push(uploads, body)
    assert DIGEST not in uploads.blobs


# --- layouts ---


async def test_layout_that_was_written_is_a_layout(tmp_path: Path, body: Path) -> None:
    layout = LayoutTarget(tmp_path / "new" / "layout")
    await layout.push_blob(DIGEST, len(BODY), body, lambda size: None)
    manifest = json.dumps({"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "layers": []}).encode()
    await layout.push_manifest(manifest, MANIFEST_TYPE, "one")
    await layout.push_manifest(manifest, MANIFEST_TYPE, "two")
    await layout.push_manifest(manifest, MANIFEST_TYPE, "one")
    reader = LayoutBackend(tmp_path / "new" / "layout")
    assert (await reader.fetch_document("one")).body == manifest
    assert (await reader.fetch_document("two")).body == manifest
    assert await reader.size(DIGEST.removeprefix("sha256:")) == len(BODY)
    index = json.loads((tmp_path / "new" / "layout" / "index.json").read_text())
    assert len(index["manifests"]) == 2


async def test_layout_keeps_what_it_had(tmp_path: Path) -> None:
    layout = LayoutTarget(tmp_path)
    (tmp_path / "index.json").write_text('{"schemaVersion":2,"manifests":[],"annotations":{"a":"b"}}')
    await layout.push_manifest(b'{"layers":[]}', MANIFEST_TYPE, "x")
    assert json.loads((tmp_path / "index.json").read_text())["annotations"] == {"a": "b"}


async def test_broken_index_of_a_layout_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text("[]")
    with pytest.raises(ErofsdError, match=r"index\.json"):
        await LayoutTarget(tmp_path).push_manifest(b'{"layers":[]}', MANIFEST_TYPE, "x")


async def test_size_that_differs_at_the_registry_is_refused(registry: RegistryServer) -> None:
    repository = target(registry.host, "push/size")
    try:
        digest = f"sha256:{hashlib.sha256(b'abc').hexdigest()}"
        await repository.push_blob(digest, 3, b"abc", lambda size: None)
        with pytest.raises(BlobCorrupt):
            await repository.provide(digest, 4)
        with pytest.raises(BlobNotFound):
            await repository.fetch_document("nothing")
    finally:
        await repository.aclose()


@pytest.mark.parametrize("linked", [True, False])
def test_what_is_stored_is_on_disk_before_it_has_its_name(
    body: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: bool
) -> None:
    target = tmp_path / "new" / "blob"
    synced: set[int] = set()
    fsync = os.fsync

    def watched(fd: int) -> None:
        fsync(fd)
        if not target.exists():
            synced.add(os.fstat(fd).st_ino)

    def no_link(*args: object) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "fsync", watched)
    if not linked:
        monkeypatch.setattr(os, "link", no_link)
    store(body, target)
    assert target.read_bytes() == BODY
    assert (target.stat().st_ino == body.stat().st_ino) == linked
    assert target.stat().st_ino in synced
    assert [path.name for path in target.parent.iterdir()] == ["blob"]
