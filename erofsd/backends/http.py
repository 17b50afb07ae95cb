"""Ranges of objects over HTTP: the core that all networked sources share, and plain web servers as a source.

An answer to a range request can lie in many ways, and what lies below (for plain EROFS) does not verify it.
So it is believed only if it says which bytes it holds and of what size the object is, and if that agrees with
what was asked for and with every earlier answer.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from yarl import URL

from erofsd.backends.blobid import split_blob_id
from erofsd.backends.transport import HttpClient, plain, refusal, refuse_page, translate
from erofsd.errors import BackendTemporary, BlobCorrupt, BlobNotFound, SourceError
from erofsd.lazy import load_lazily
from ondemand.ranges import Range

if TYPE_CHECKING:
    import aiohttp
    from aiohttp import ClientResponse
else:
    aiohttp = load_lazily("aiohttp")

# Of a server without ranges at most this much is read to get at the end of an object.
WHOLE_OBJECT_MAX = 8 << 20

_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", re.IGNORECASE)
_PIN = re.compile(r'size=(\d{1,19})(?: etag=("[^"]*"))?(?: modified=(.+))?')


@dataclass(slots=True)
class Identity:
    """What is known of an object: an answer that says otherwise is about another one.

    Attributes:
        size: In bytes; None until somebody said.
        etag: A strong entity tag, quotes included.
        modified: ``Last-Modified``, which stands in where there is no strong tag.
    """

    size: int | None = None
    etag: str | None = None
    modified: str | None = None

    @classmethod
    def from_pin(cls, pin: str) -> Identity:
        """The inverse of `pin`.

        Raises:
            ValueError: *pin* is none of ours.
        """
        if not (match := _PIN.fullmatch(pin)):
            raise ValueError(f"not a pin of an HTTP object: {pin!r}")
        return cls(int(match[1]), match[2], match[3])

    @property
    def pin(self) -> str:
        """One line that names this very version of the object."""
        etag = f" etag={self.etag}" if self.etag else ""
        modified = f" modified={self.modified}" if self.modified and not self.etag else ""
        return f"size={self.size}{etag}{modified}"

    def learn(self, response: ClientResponse, size: int | None) -> None:
        """Take from the first answer which version of the object there is."""
        self.size = size
        etag = response.headers.get("ETag", "")
        if etag.startswith('"') and etag.endswith('"'):
            self.etag = etag
        else:
            self.modified = response.headers.get("Last-Modified")

    def check(self, response: ClientResponse, size: int | None, what: str) -> None:
        """Compare *response*, which says that the object has *size* bytes, with what is known.

        Raises:
            BlobCorrupt: It is about another version of the object.
        """
        if self.size is None:
            self.size = size
        if size is not None and size != self.size:
            raise BlobCorrupt(f"{what}: changed at the source: it has {size} bytes now, and had {self.size}")
        if self.etag is not None and response.headers.get("ETag") != self.etag:
            now = response.headers.get("ETag", "none")
            raise BlobCorrupt(f"{what}: changed at the source: its ETag is {now} now, and was {self.etag}")
        if self.modified is not None and response.headers.get("Last-Modified") != self.modified:
            raise BlobCorrupt(f"{what}: changed at the source: modified after {self.modified}")


def range_header(want: Range) -> dict[str, str]:
    """Headers that ask for *want*."""
    return {"Range": f"bytes={want.start}-{want.stop - 1}"}


async def stream_range(
    client: HttpClient,
    request: Callable[[Mapping[str, str]], Awaitable[ClientResponse]],
    want: Range,
    identity: Identity,
    what: str,
) -> AsyncIterator[bytes]:
    """The bytes of *want* in pieces as they arrive: exactly those, or an error.

    Args:
        request: Sends a GET with the given headers.
        identity: Checked, and learnt from.
        what: Names the object in messages.

    Raises:
        As Backend.stream.
    """
    if not want:
        return
    response = await request(range_header(want))
    if response.status not in (200, 206):
        raise await refusal(response, what)
    try:
        skip, size = _examine(response, want, what)
        identity.check(response, size, what)
        left = len(want)
        readany = response.content.readany
        while left:
            piece = await readany()
            if not piece:
                raise BackendTemporary(f"{what}: {plain(response.url)} sent {left} bytes less than it said")
            client.transferred_bytes += len(piece)
            if skip:
                dropped = min(skip, len(piece))
                skip -= dropped
                piece = piece[dropped:]
            if len(piece) > left:
                piece = piece[:left]
            left -= len(piece)
            if piece:
                yield piece
    except (aiohttp.ClientError, OSError) as exc:
        raise translate(exc, response.url) from exc
    finally:
        response.close()  # drops the connection unless all of the body was read


def _examine(response: ClientResponse, want: Range, what: str) -> tuple[int, int | None]:
    """How many bytes to skip, and the size of the object, from an answer that may be believed."""
    where = plain(response.url)
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise SourceError(f"{what}: {where} compresses what it sends, though asked not to")
    if response.status == 206:
        return 0, _examine_partial(response, want, what)
    refuse_page(response, what)
    size = response.content_length
    if size is not None and size < want.stop:
        if response.content_type == "application/json":
            raise BackendTemporary(f"{what}: {where} answered with JSON, most likely an error, instead")
        raise BlobCorrupt(f"{what}: {where} has {size} bytes, and {want} was asked for")
    if want.start == 0 and size == want.stop:
        return 0, size
    if want.stop > WHOLE_OBJECT_MAX or (size or 0) > WHOLE_OBJECT_MAX:
        raise SourceError(
            f"{what}: {where} does not serve ranges",
            hint="lazy mounting needs a server that answers range requests with 206",
        )
    return want.start, size


def _examine_partial(response: ClientResponse, want: Range, what: str) -> int | None:
    stated = response.headers.get("Content-Range", "")
    match = _CONTENT_RANGE.fullmatch(stated.strip())
    if not match:
        raise BackendTemporary(f"{what}: {plain(response.url)} does not say which bytes it sends: {stated!r}")
    first, last = int(match[1]), int(match[2])
    size = None if match[3] == "*" else int(match[3])
    if size is not None and size < want.stop:
        raise BlobCorrupt(f"{what}: {plain(response.url)} has {size} bytes, and {want} was asked for")
    if (first, last + 1) != (want.start, want.stop):
        raise BackendTemporary(f"{what}: {plain(response.url)} sends {stated!r} when asked for {want}")
    if response.content_length not in (None, len(want)):
        raise BackendTemporary(
            f"{what}: {plain(response.url)} announces {response.content_length} bytes for {stated!r}"
        )
    return size


async def fetch_size(
    client: HttpClient,
    request: Callable[[str, Mapping[str, str]], Awaitable[ClientResponse]],
    identity: Identity,
    what: str,
) -> int:
    """Size of the object in bytes, from a HEAD or, where those are not answered, the first byte.

    Args:
        request: Sends a request with the given method and headers.

    Raises:
        As Backend.size.
    """
    response = await request("HEAD", {})
    if response.status == 200 and response.content_length is not None:
        refuse_page(response, what)
        response.close()
        identity.check(response, response.content_length, what)
        return response.content_length
    if response.status in (401, 404, 410):
        raise await refusal(response, what)
    response.close()
    # Signed URLs are often good for GET only, and some servers leave out the length.
    response = await request("GET", range_header(Range(0, 1)))
    if response.status == 416 and response.headers.get("Content-Range", "").replace(" ", "") == "bytes*/0":
        response.close()
        return 0
    if response.status not in (200, 206):
        raise await refusal(response, what)
    try:
        _, size = _examine(response, Range(0, 1), what)
    finally:
        response.close()
    if size is None:
        raise SourceError(f"{what}: {plain(response.url)} does not say how large it is")
    identity.check(response, size, what)
    return size


def url_id(url: str) -> str:
    """The blob id of a single object behind *url*: a name, nothing of its content."""
    return hashlib.sha256(url.encode()).hexdigest()


class HttpBackend:
    """Objects of a plain web server: single ones by URL, or all below a prefix by blob id.

    Args:
        client: Closed with this backend.
        objects: URLs of single objects by blob id.
        prefix: Where other blobs are: their URL is the prefix, a slash and the id.
        pins: What objects must still be (``Identity.pin``), by blob id.

    Raises:
        ValueError: A pin is none of ours.
    """

    def __init__(
        self,
        client: HttpClient,
        *,
        objects: Mapping[str, str] | None = None,
        prefix: str | None = None,
        pins: Mapping[str, str] | None = None,
    ) -> None:
        self._client = client
        self._urls = {k: URL(v, encoded=True) for k, v in (objects or {}).items()}
        self._prefix = prefix.rstrip("/") if prefix else None
        self._identities = {k: Identity.from_pin(v) for k, v in (pins or {}).items()}
        self._name = plain(URL(prefix or next(iter((objects or {}).values()), ""), encoded=True))

    @property
    def name(self) -> str:
        """The prefix, or the URL of the only object."""
        return self._name

    @property
    def transferred_bytes(self) -> int:
        """See MeasuredBackend."""
        return self._client.transferred_bytes

    @property
    def requests(self) -> int:
        """See MeasuredBackend."""
        return self._client.requests

    async def size(self, blob_id: str) -> int:
        """See Backend."""
        identity = self._identity(blob_id)
        return await fetch_size(self._client, partial(self._request, self._url(blob_id)), identity, blob_id)

    def stream(self, blob_id: str, want: Range) -> AsyncIterator[bytes]:
        """See Backend."""
        url = self._url(blob_id)
        request = partial(self._request, url, "GET")
        return stream_range(self._client, request, want, self._identity(blob_id), blob_id)

    async def pin(self, blob_id: str) -> str:
        """Find out which version of the object there is, and stay with it.

        Returns:
            Its size, and its strong ETag or else its time of modification if it has one.
        """
        response = await self._request(self._url(blob_id), "GET", range_header(Range(0, 1)))
        if response.status not in (200, 206):
            raise await refusal(response, self._name)
        try:
            _, size = _examine(response, Range(0, 1), self._name)
        finally:
            response.close()
        if size is None:
            raise SourceError(f"{self._name}: the server does not say how large it is")
        identity = self._identities[blob_id] = Identity()
        identity.learn(response, size)
        return identity.pin

    async def aclose(self) -> None:
        """See Backend."""
        await self._client.aclose()

    async def _request(self, url: URL, method: str, headers: Mapping[str, str]) -> ClientResponse:
        return await self._client.follow(method, url, headers)

    def _url(self, blob_id: str) -> URL:
        url = self._urls.get(blob_id)
        if url is None:
            if self._prefix is None:
                raise BlobNotFound(f"{self._name}: has no blob {blob_id}")
            split_blob_id(blob_id, self._name)
            url = self._urls[blob_id] = URL(f"{self._prefix}/{blob_id}", encoded=True)
        return url

    def _identity(self, blob_id: str) -> Identity:
        return self._identities.setdefault(blob_id, Identity())
