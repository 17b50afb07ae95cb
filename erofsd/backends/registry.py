"""An OCI registry as a source: manifests by tag or digest, blobs by digest.

No request is made that a pull does not need: there is no ping of ``/v2/``, and authorization is sought when
the registry asks for it. Source: opencontainers/distribution-spec, "Pull".
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from yarl import URL

from erofsd.backends.auth import Authorizer
from erofsd.backends.blobid import split_blob_id
from erofsd.backends.documents import (
    INDEX_MAX,
    INDEX_TYPES,
    MANIFEST_TYPES,
    SCHEMA1_TYPES,
    Document,
    checked_document,
)
from erofsd.backends.http import Identity, fetch_size, stream_range
from erofsd.backends.reference import DOCKER_HUB, RegistryReference
from erofsd.backends.settings import SourceSettings
from erofsd.backends.transport import HttpClient, HttpLimits, TlsRefused, is_loopback, refusal, refuse_page
from erofsd.errors import SourceError, UnsupportedImage
from ondemand.ranges import Range

if TYPE_CHECKING:
    from aiohttp import ClientResponse

DOCKER_HUB_ENDPOINT = "registry-1.docker.io"
_ACCEPT = ", ".join((*MANIFEST_TYPES, *INDEX_TYPES, *SCHEMA1_TYPES))


class RegistryBackend:
    """One repository of a registry; an ImageSource.

    Args:
        reference: Only host and repository matter.
        scopes: What to ask a token server for; without any, to pull from this repository.
    """

    def __init__(
        self, reference: RegistryReference, settings: SourceSettings, scopes: Sequence[str] = ()
    ) -> None:
        host = reference.host
        registry = settings.registry(host)
        self._name = f"docker://{host}/{reference.repository}"
        self._client = HttpClient(HttpLimits.of(settings), ca=registry.ca)
        scopes = scopes or (f"repository:{reference.repository}:pull",)
        self._auth = Authorizer(self._client, host, scopes, registry, settings)
        endpoint = DOCKER_HUB_ENDPOINT if host == DOCKER_HUB else host
        self._scheme = "http" if registry.plain_http else "https"
        # On a loopback address the first answer decides between TLS and plain HTTP, as with docker.
        hostname = URL(f"https://{endpoint}").host or ""
        self._undecided = self._scheme == "https" and is_loopback(hostname) and registry.ca is None
        self._without_tls_allowed = registry.plain_http or is_loopback(hostname)
        self._root = f"://{endpoint}/v2/{reference.repository}"
        self._urls: dict[str, URL] = {}
        self._identities: dict[str, Identity] = {}

    @property
    def name(self) -> str:
        """``docker://host/repository``."""
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
        request = partial(self._request, self._blob_path(blob_id))
        return await fetch_size(self._client, request, self._identity(blob_id), f"{self._name}: {blob_id}")

    def stream(self, blob_id: str, want: Range) -> AsyncIterator[bytes]:
        """See Backend."""
        request = partial(self._request, self._blob_path(blob_id), "GET")
        return stream_range(self._client, request, want, self._identity(blob_id), f"{self._name}: {blob_id}")

    async def fetch_document(self, selector: str | None) -> Document:
        """See ImageSource; without *selector* it is ``latest``."""
        selector = selector or "latest"
        name = f"{self._name}{'@' if ':' in selector else ':'}{selector}"
        response = await self._request(f"/manifests/{selector}", "GET", {"Accept": _ACCEPT})
        if response.status != 200:
            raise await refusal(response, name)
        refuse_page(response, name)
        stated = response.headers.get("Docker-Content-Digest")
        media_type = response.content_type
        if (response.content_length or 0) > INDEX_MAX:
            response.close()
            raise UnsupportedImage(f"{name}: {response.content_length} bytes are too many for a manifest")
        try:
            body = await self._client.read(response, INDEX_MAX)
        except SourceError as exc:
            if type(exc) is SourceError:
                raise UnsupportedImage(f"{name}: too large for a manifest") from exc
            raise
        if ":" in selector:
            return checked_document(body, media_type, selector, name)
        return checked_document(body, media_type, stated, name)

    def expect(self, blob_id: str, size: int) -> None:
        """Say what size the blob must have; another one is refused from now on."""
        self._identity(blob_id).size = size

    async def aclose(self) -> None:
        """See Backend."""
        await self._client.aclose()

    async def _request(self, path: str, method: str, headers: Mapping[str, str]) -> ClientResponse:
        """Send a request for *path* below the repository, with whatever authorization it takes."""

        async def send(authorization: str | None) -> ClientResponse:
            return await self._client.follow(method, self._url(path), headers, authorization=authorization)

        return await self._authorized(send, lambda: self._url(path))

    async def _authorized(
        self, send: Callable[[str | None], Awaitable[ClientResponse]], where: Callable[[], URL]
    ) -> ClientResponse:
        """The answer to *send*, which is called again as TLS and authorization are found out.

        Args:
            send: Sends the request, with the given Authorization.
            where: URL of the request, as it is now known.
        """
        refusals = 0
        while True:
            scheme = self._scheme
            generation = self._auth.generation
            authorization = await self._auth.current()
            url = where()
            try:
                response = await send(authorization)
            except TlsRefused:
                if self._undecided:
                    self._settle("http")
                elif self._scheme == scheme:
                    raise
                continue
            if self._undecided:
                self._settle(scheme)
            challenge = response.headers.get("WWW-Authenticate")
            # A challenge of the host that a redirect led to is none of ours: it might ask for our password.
            ours = challenge is not None and response.url.origin() == url.origin()
            if response.status != 401 or not ours or challenge is None or refusals == 2:
                return response
            refusals += 1  # two are fair: what we sent may have been replaced while it was on its way
            response.close()
            secure = scheme == "https" or self._without_tls_allowed
            await self._auth.refused(challenge, generation, secure=secure)

    def _settle(self, scheme: str) -> None:
        self._undecided = False
        self._scheme = scheme
        self._urls.clear()

    def _url(self, path: str) -> URL:
        url = self._urls.get(path)
        if url is None:
            url = self._urls[path] = URL(f"{self._scheme}{self._root}{path}", encoded=True)
        return url

    def _blob_path(self, blob_id: str) -> str:
        algorithm, name = split_blob_id(blob_id, self._name)
        return f"/blobs/{algorithm or 'sha256'}:{name}"

    def _identity(self, blob_id: str) -> Identity:
        return self._identities.setdefault(blob_id, Identity())
