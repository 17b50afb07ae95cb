"""Where images are written to: a repository of a registry, or an OCI image layout.

The order is the promise: blobs first, manifests when all that they name is there, the tag last. Whatever
fails before that leaves nothing that anybody could pull.

Sources: opencontainers/distribution-spec, "Push", "Mounting a blob from another repository", "Resuming an
upload", "Pushing Manifests with Subject"; opencontainers/image-spec, image-layout.md.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from yarl import URL

from erofsd.backends.documents import INDEX_MAX, REF_NAME, Document, digest_of
from erofsd.backends.localfs import translate
from erofsd.backends.reference import LayoutReference, RegistryReference
from erofsd.backends.registry import RegistryBackend
from erofsd.backends.retry import RetryBackend, pause_s
from erofsd.backends.settings import SourceSettings
from erofsd.backends.transport import plain, refusal
from erofsd.backends.uploads import Uploads
from erofsd.errors import BackendTemporary, BlobCorrupt, BlobNotFound, CorruptImage, ErofsdError, SourceError

if TYPE_CHECKING:
    from aiohttp import ClientResponse

PIECE_SIZE = 256 << 10
SINGLE_MAX = 1 << 20  # bytes that go with the request that ends an upload: another round trip costs more
COMMIT_S = 300.0  # a registry may hash, copy and store a whole blob before it answers
_AWAY = (429, 502, 503, 504)  # says who stands before a registry, or one that has no time now
OCTETS = "application/octet-stream"

Content = Path | bytes
Tell = Callable[[int], None]
"""Hears how many more bytes are done; negative where they have to be done again."""
T = TypeVar("T")


class ImageTarget(Protocol):
    """Takes images.

    Attributes:
        name: For messages: ``docker://host/repository``, ``oci:DIR``.
        uploaded_bytes: Bytes of blobs that went there.
    """

    @property
    def name(self) -> str: ...

    uploaded_bytes: int

    async def provide(self, digest: str, size: int, repositories: Sequence[str] = ()) -> bool:
        """See whether the blob is there already, or comes from another repository of the same registry.

        Args:
            repositories: Where else on this registry it may be.
        """
        ...

    async def push_blob(self, digest: str, size: int, content: Content, tell: Tell) -> None:
        """Store a blob. It is there when this returns.

        Raises:
            SourceError: The target will not have it.
            BlobCorrupt: What arrived there is not what *digest* says.
        """
        ...

    async def push_manifest(self, body: bytes, media_type: str, tag: str | None) -> bool:
        """Store a manifest or an index; all that it names is there.

        Args:
            tag: None: by digest alone.

        Returns:
            True if the target itself keeps track of what refers to the manifest's ``subject``.
        """
        ...

    async def fetch_document(self, selector: str | None) -> Document:
        """See ImageSource."""
        ...

    async def aclose(self) -> None:
        """Close connections."""
        ...


def open_target(
    reference: RegistryReference | LayoutReference,
    settings: SourceSettings,
    *,
    mounts: Sequence[str] = (),
    uploads: Path | None = None,
) -> RegistryTarget | LayoutTarget:
    """The target that *reference* is in.

    Args:
        mounts: Repositories of the same registry that blobs may be mounted from.
        uploads: Directory in which broken uploads are remembered; None: they are not.
    """
    match reference:
        case RegistryReference():
            return RegistryTarget(reference, settings, mounts, Uploads(uploads))
        case LayoutReference(path):
            return LayoutTarget(path)


class RegistryTarget(RegistryBackend):
    """One repository of a registry, to push to; an ImageTarget."""

    def __init__(
        self,
        reference: RegistryReference,
        settings: SourceSettings,
        mounts: Sequence[str] = (),
        uploads: Uploads | None = None,
    ) -> None:
        own = f"repository:{reference.repository}:pull,push"
        others = sorted({m for m in mounts if m != reference.repository})
        super().__init__(reference, settings, (own, *(f"repository:{m}:pull" for m in others)))
        self.uploaded_bytes = 0
        self._uploads = uploads or Uploads()
        self._attempts = settings.attempts
        self._inactivity_s = settings.inactivity_s
        self._retry = RetryBackend(self, settings.attempts)

    async def provide(self, digest: str, size: int, repositories: Sequence[str] = ()) -> bool:
        """See ImageTarget."""
        if await self._retry.call(partial(self._has, digest, size)):
            self._uploads.forget(self.name, digest)  # it arrived, and only the answer did not
            return True
        for repository in repositories:
            if await self._retry.call(partial(self._mount, digest, repository)):
                return True
        return False

    async def push_blob(self, digest: str, size: int, content: Content, tell: Tell) -> None:
        """See ImageTarget. Goes on where a connection or another run broke off, if the registry remembers."""
        location = self._uploads.load(self.name, digest)
        offset, attempt, told = 0, 1, 0
        broken = location is not None  # and only the registry knows how much of it has arrived

        def count(length: int) -> None:
            nonlocal told
            told += length
            tell(length)

        while True:
            began_at = offset
            try:
                if broken:
                    location, offset = await self._progress(location, size)
                    broken = False
                    count(offset - told)
                    attempt = 1 if offset > began_at else attempt
                if location is None:
                    location = await self._begin()
                if size - offset > SINGLE_MAX:
                    self._uploads.save(self.name, digest, location)
                    location = await self._send_rest(location, content, offset, size, count)
                    offset = size
                await self._commit(location, digest, content, offset, size)
                break
            except BackendTemporary as exc:
                if await self._after_break(digest, size):
                    break
                if attempt == self._attempts:
                    raise BackendTemporary(f"{digest}: {exc}", hint=exc.hint) from exc
                attempt, broken = attempt + 1, True
                await asyncio.sleep(pause_s(exc, attempt))
        self._uploads.forget(self.name, digest)
        count(size - told)
        self.uploaded_bytes += size

    async def push_manifest(self, body: bytes, media_type: str, tag: str | None) -> bool:
        """See ImageTarget."""
        digest = digest_of(body)
        put = partial(self._put_manifest, body, media_type, tag or digest, digest)
        return await self._retry.call(put)

    # --- requests ---

    async def _has(self, digest: str, size: int) -> bool:
        response = await self._request(f"/blobs/{digest}", "HEAD", {})
        response.close()
        if response.status == 200:
            if response.content_length not in (None, size):
                stated = response.content_length
                raise BlobCorrupt(f"{self.name}: has {digest} with {stated} bytes, not {size}")
            return True
        if response.status in (403, 404, 410):  # some tell strangers no more than 403
            return False
        raise await refusal(response, f"{self.name}: {digest}")

    async def _mount(self, digest: str, repository: str) -> bool:
        url = self._url("/blobs/uploads/").with_query({"mount": digest, "from": repository})
        response = await self._send("POST", url)
        response.close()
        if response.status == 201:
            return True
        if response.status == 202:  # the registry did not find it there, and began an upload instead
            with_location = self._location(response)
            (await self._send("DELETE", with_location)).close()
            return False
        if response.status in (400, 401, 403, 404, 405):
            return False
        raise await refusal(response, f"{self.name}: mounting {digest} from {repository}")

    async def _begin(self) -> URL:
        response = await self._send("POST", self._url("/blobs/uploads/"))
        if response.status != 202:
            raise await refusal(response, f"{self.name}: beginning an upload")
        response.close()
        return self._location(response)

    async def _send_rest(self, location: URL, content: Content, offset: int, size: int, tell: Tell) -> URL:
        headers = {"Content-Type": OCTETS, "Content-Length": str(size - offset)}
        if offset:  # without a range the first request is plain streaming, which every registry knows
            headers["Content-Range"] = f"{offset}-{size - 1}"
        response = await self._send("PATCH", location, headers, content=(content, offset, size), tell=tell)
        if response.status in (404, 416):
            response.close()
            raise _Forgotten(f"{self.name}: the registry has forgotten the upload ({response.status})")
        if response.status not in (201, 202, 204):
            raise await refusal(response, f"{self.name}: uploading to {plain(location)}")
        response.close()
        return self._location(response, location)

    async def _commit(self, location: URL, digest: str, content: Content, offset: int, size: int) -> None:
        url = location.update_query({"digest": digest})
        headers = {"Content-Type": OCTETS, "Content-Length": str(size - offset)}
        if 0 < offset < size:
            headers["Content-Range"] = f"{offset}-{size - 1}"
        response = await self._send("PUT", url, headers, content=(content, offset, size))
        if response.status in (404, 416):
            response.close()
            raise _Forgotten(f"{self.name}: the registry has forgotten the upload ({response.status})")
        if response.status not in (201, 204):
            raise await refusal(response, f"{self.name}: {digest}")
        stated = response.headers.get("Docker-Content-Digest", digest)
        response.close()
        if stated != digest:
            raise BlobCorrupt(f"{self.name}: {digest} was stored as {stated}")

    async def _after_break(self, digest: str, size: int) -> bool:
        """True if the blob has arrived after all, and only the answer was lost."""
        try:
            return await self._has(digest, size)
        except BackendTemporary:
            return False

    async def _progress(self, location: URL | None, size: int) -> tuple[URL | None, int]:
        """Where to go on with a broken upload; None: from the beginning.

        Raises:
            BackendTemporary: The registry does not answer now, and may know it later.
        """
        if location is None:
            return None, 0
        try:
            response = await self._send("GET", location)
        except BackendTemporary:
            raise
        except ErofsdError:
            return None, 0
        if response.status in _AWAY:
            raise await refusal(response, f"{self.name}: asking for an upload")
        response.close()
        match = re.fullmatch(r"(?:bytes=)?0-(\d+)", response.headers.get("Range", ""))
        # "0-0" is what an empty upload says, too.
        if response.status != 204 or match is None or not 0 < int(match[1]) < size:
            return None, 0
        return self._location(response, location), int(match[1]) + 1

    async def _put_manifest(self, body: bytes, media_type: str, selector: str, digest: str) -> bool:
        url = self._url(f"/manifests/{selector}")
        response = await self._send("PUT", url, {"Content-Type": media_type}, content=(body, 0, len(body)))
        if response.status not in (200, 201, 202):
            raise await refusal(response, f"{self.name}: {selector}")
        response.close()
        stated = response.headers.get("Docker-Content-Digest", digest)
        if stated != digest:
            raise BlobCorrupt(f"{self.name}: {selector} was stored as {stated}, not {digest}")
        return "OCI-Subject" in response.headers

    async def _send(
        self,
        method: str,
        url: URL,
        headers: dict[str, str] | None = None,
        *,
        content: tuple[Content, int, int] = (b"", 0, 0),
        tell: Tell | None = None,
    ) -> ClientResponse:
        """Send one request with a body; redirects are answers.

        Raises:
            BackendTemporary: Also where the other side stops taking bytes, or does not answer.
        """
        data, start, stop = content
        origin = self._url("").origin()

        async def attempt(authorization: str | None) -> ClientResponse:
            secret = {"Authorization": authorization} if authorization and url.origin() == origin else {}
            sent = {**(headers or {}), **secret}
            if isinstance(data, bytes):
                body = data[start:stop] if method != "GET" else None
                return await self._client.send(method, url, sent, body=body, answer_s=COMMIT_S)
            async with asyncio.timeout(self._inactivity_s) as alarm:
                pieces = self._pieces(data, start, stop, alarm, tell)
                return await self._client.send(method, url, sent, body=pieces, answer_s=COMMIT_S)

        try:
            return await self._authorized(attempt, lambda: url)
        except TimeoutError as exc:
            raise BackendTemporary(f"{plain(url)}: takes no more bytes") from exc

    async def _pieces(
        self, path: Path, start: int, stop: int, alarm: asyncio.Timeout, tell: Tell | None
    ) -> AsyncIterator[bytes]:
        """The bytes of a file. *alarm* goes off when one of them waits too long to be taken."""
        loop = asyncio.get_running_loop()
        with path.open("rb") as file:
            file.seek(start)
            while start < stop:
                piece = await asyncio.to_thread(file.read, min(PIECE_SIZE, stop - start))
                if not piece:
                    raise OSError(f"{path} became shorter")
                alarm.reschedule(loop.time() + self._inactivity_s)
                yield piece
                start += len(piece)
                if tell is not None:
                    tell(len(piece))
        alarm.reschedule(loop.time() + COMMIT_S)

    def _location(self, response: ClientResponse, known: URL | None = None) -> URL:
        """Where the upload goes on.

        Raises:
            SourceError: The registry does not say, or says what is no place.
        """
        text = response.headers.get("Location")
        if text is None:
            if known is not None:
                return known
            raise SourceError(f"{self.name}: the registry began an upload and did not say where")
        try:
            location = response.url.join(URL(text, encoded=True))
        except ValueError as exc:
            raise SourceError(f"{self.name}: the registry sends uploads to what is no URL") from exc
        if location.authority == response.url.authority:
            location = location.with_scheme(response.url.scheme)  # behind a proxy they often get it wrong
        elif response.url.scheme == "https" and location.scheme != "https":
            raise SourceError(f"{self.name}: the registry sends uploads away from TLS, to {plain(location)}")
        return location


class _Forgotten(BackendTemporary):
    """The registry does not know the upload any more: a new one may do better."""


# --- layouts ---


class LayoutTarget:
    """An OCI image layout, made where there is none; an ImageTarget."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.uploaded_bytes = 0

    @property
    def name(self) -> str:
        """``oci:DIR``."""
        return f"oci:{self._path}"

    async def provide(self, digest: str, size: int, repositories: Sequence[str] = ()) -> bool:
        """See ImageTarget."""
        path = self._blob(digest)
        return path.is_file() and path.stat().st_size == size

    async def push_blob(self, digest: str, size: int, content: Content, tell: Tell) -> None:
        """See ImageTarget."""
        await asyncio.to_thread(store, content, self._blob(digest))
        self.uploaded_bytes += size
        tell(size)

    async def push_manifest(self, body: bytes, media_type: str, tag: str | None) -> bool:
        """See ImageTarget. Without *tag* the manifest is only stored: an index or a subject names it."""
        await asyncio.to_thread(self._push_manifest, body, media_type, tag)
        return False

    async def fetch_document(self, selector: str | None) -> Document:
        """Only by tag: what this target needs to know of itself."""
        raise BlobNotFound(f"{self.name}: has no {selector}")

    async def aclose(self) -> None:
        """Nothing is open."""

    def _blob(self, digest: str) -> Path:
        algorithm, _, name = digest.partition(":")
        return self._path / "blobs" / algorithm / name

    def _push_manifest(self, body: bytes, media_type: str, tag: str | None) -> None:
        digest = digest_of(body)
        store(body, self._blob(digest))
        if not (self._path / "oci-layout").exists():
            store(b'{"imageLayoutVersion":"1.0.0"}', self._path / "oci-layout")
        index = self._index()
        entry: dict[str, Any] = {"mediaType": media_type, "digest": digest, "size": len(body)}
        if tag is not None:
            entry["annotations"] = {REF_NAME: tag}
        elif "subject" not in json.loads(body):
            return
        kept = [m for m in index["manifests"] if _tag_of(m) != tag or (not tag and m["digest"] != digest)]
        index["manifests"] = [*kept, entry]
        store(json.dumps(index, separators=(",", ":")).encode(), self._path / "index.json", replace=True)

    def _index(self) -> dict[str, Any]:
        path = self._path / "index.json"
        try:
            body = path.read_bytes()
        except FileNotFoundError:
            return {"schemaVersion": 2, "manifests": []}
        except OSError as exc:
            raise translate(exc, str(path)) from exc
        try:
            index = json.loads(body[: INDEX_MAX + 1])
            if not isinstance(index["manifests"], list):
                raise TypeError("manifests is no list")
        except (ValueError, TypeError, KeyError, RecursionError) as exc:
            raise CorruptImage(f"{path}: not the index of a layout: {exc}") from exc
        found: dict[str, Any] = index
        return found


def _tag_of(descriptor: dict[str, Any]) -> str | None:
    tag = (descriptor.get("annotations") or {}).get(REF_NAME)
    return tag if isinstance(tag, str) else None


def store(content: Content, path: Path, *, replace: bool = False) -> None:
    """Put *content* at *path*: all of it or nothing, on disk when this returns. Blocks.

    A file of the same file system is linked rather than copied: blobs do not change.

    Args:
        replace: Also where there is something already; otherwise that is the same, by its name.

    Raises:
        SourceError: It cannot be written.
    """
    if path.exists() and not replace and path.stat().st_size == _length(content):
        return
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, temporary = tempfile.mkstemp(prefix=".incomplete-", dir=path.parent)
        with os.fdopen(fd, "wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            elif not _linked(content, temporary):
                with content.open("rb") as source:
                    shutil.copyfileobj(source, file, 1 << 20)
        os.chmod(temporary, 0o644)
        _sync(temporary)  # by name: it may be another file now
        os.replace(temporary, path)
        temporary = None
        _sync(path.parent)
    except OSError as exc:
        raise translate(exc, str(path)) from exc
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _length(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _linked(source: Path, temporary: str) -> bool:
    other = f"{temporary}.link"
    try:
        os.link(source, other)
    except OSError:  # another file system, or one without links
        return False
    os.replace(other, temporary)
    return True


def _sync(path: str | Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
