"""HTTP requests as every networked source makes them: connections, timeouts, redirects, what went wrong."""

from __future__ import annotations

import errno
import ipaddress
import re
import ssl
from collections.abc import AsyncIterable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cache
from pathlib import Path
from time import time
from typing import TYPE_CHECKING
from urllib.request import getproxies, proxy_bypass

import msgspec
from yarl import URL

import erofsd
from erofsd.backends.settings import SourceSettings
from erofsd.errors import (
    BackendDenied,
    BackendTemporary,
    BlobCorrupt,
    BlobNotFound,
    ConfigError,
    ErofsdError,
    SourceError,
)
from erofsd.lazy import load_lazily

if TYPE_CHECKING:
    import aiohttp
    from aiohttp import ClientResponse
else:
    # A tenth of a second, most of it for TLS contexts: commands on local files do without.
    aiohttp = load_lazily("aiohttp")

MAX_REDIRECTS = 5
REDIRECTS = frozenset((301, 302, 303, 307, 308))
IDLE_TIMEOUT_S = 55.0  # of a kept connection: below the 60 to 75 s after which common servers close theirs
READ_BUFFER_SIZE = 512 << 10  # bytes that may wait in a connection; smaller ones pause and resume too often
TARGETS_MAX = 1024  # remembered redirects
_ERROR_BODY_MAX = 8 << 10
_RETRY_AFTER_MAX_S = 3600.0


class TlsRefused(BackendTemporary):
    """The other side does not seem to speak TLS at all."""


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Bounds on connections; see SourceSettings for the meaning and the defaults."""

    connections: int
    connect_timeout_s: float
    inactivity_s: float

    @classmethod
    def of(cls, settings: SourceSettings) -> HttpLimits:
        """The limits that *settings* state."""
        return cls(settings.connections, settings.connect_timeout_s, settings.inactivity_s)


class HttpClient:
    """A pool of connections with one set of trusted certificates; counts what goes through it.

    Made anywhere, used on one event loop.

    Args:
        ca: PEM file of certificates to trust in addition to the system's.
    """

    def __init__(self, limits: HttpLimits, *, ca: Path | None = None) -> None:
        self._limits = limits
        self._ca = ca
        self._session: aiohttp.ClientSession | None = None
        self._closed = False
        self._proxies: dict[tuple[str, str | None], URL | None] = {}
        self._targets: dict[tuple[str, URL], URL] = {}  # where a redirect led the last time
        self.requests = 0
        self.transferred_bytes = 0

    async def send(
        self,
        method: str,
        url: URL,
        headers: Mapping[str, str],
        *,
        form: Mapping[str, str] | None = None,
        body: bytes | AsyncIterable[bytes] | None = None,
        answer_s: float | None = None,
    ) -> ClientResponse:
        """Send one request; return when the answer's headers are here. Redirects are answers.

        The caller closes or releases the response.

        Args:
            body: Sent as it is; for pieces *headers* state the length.
            answer_s: How long the other side may think once it has all of the request; None: as always.

        Raises:
            BackendTemporary: No answer; TlsRefused if TLS was the reason.
            SourceError: The other side cannot be trusted, or the URL cannot be.
        """
        if self._closed:
            raise SourceError(f"{plain(url)}: nobody uses this source any more")
        session = self._session or self._start()
        self.requests += 1
        try:
            # Not `async with`: the response outlives this call.
            return await session.request(
                method,
                url,
                headers=headers,
                data=form if form is not None else body,
                timeout=self._timeout(answer_s),
                allow_redirects=False,
                proxy=self._proxy(url),
                ssl=_tls(self._ca) if url.scheme == "https" else True,
            )
        except (aiohttp.ClientError, OSError, ValueError) as exc:
            raise translate(exc, url) from exc

    async def follow(
        self, method: str, url: URL, headers: Mapping[str, str], *, authorization: str | None = None
    ) -> ClientResponse:
        """As `send`, but go where the answers point to, the next time directly.

        Args:
            authorization: Sent to *url*'s own scheme, host and port only.

        Raises:
            SourceError: Also for a redirect loop and for one away from TLS.
        """
        start = url
        origin = url.origin()
        secret = {**headers, "Authorization": authorization} if authorization else headers
        if target := self._targets.get((method, start)):
            response = await self.send(method, target, secret if target.origin() == origin else headers)
            if response.status in (200, 206):
                return response
            response.close()  # most often a signature that has expired: ask for a new one
            if self._targets.get((method, start)) is target:
                del self._targets[method, start]
        for _ in range(MAX_REDIRECTS + 1):
            response = await self.send(method, url, secret if url.origin() == origin else headers)
            if response.status not in REDIRECTS:
                if url is not start and response.status in (200, 206):
                    self._remember(method, start, url)
                return response
            url = await _redirect_target(response, url)
        raise SourceError(f"{plain(start)}: more than {MAX_REDIRECTS} redirects, the last to {plain(url)}")

    async def read(self, response: ClientResponse, limit: int) -> bytes:
        """The whole body of *response*, which is closed afterwards.

        Raises:
            SourceError: It has more than *limit* bytes.
            BackendTemporary: It breaks off.
        """
        pieces: list[bytes] = []
        size = 0
        try:
            while piece := await response.content.readany():
                size += len(piece)
                self.transferred_bytes += len(piece)
                if size > limit:
                    raise SourceError(f"{plain(response.url)}: the answer has more than {limit} bytes")
                pieces.append(piece)
        except (aiohttp.ClientError, OSError) as exc:
            raise translate(exc, response.url) from exc
        finally:
            response.close()  # a no-op once the body is complete: the connection is back in the pool
        return b"".join(pieces)

    async def aclose(self) -> None:
        """Close all connections, for good."""
        self._closed = True
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _remember(self, method: str, start: URL, target: URL) -> None:
        if len(self._targets) >= TARGETS_MAX:
            self._targets.pop(next(iter(self._targets)))
        self._targets[method, start] = target

    def _start(self) -> aiohttp.ClientSession:
        limits = self._limits
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0, limit_per_host=limits.connections, keepalive_timeout=IDLE_TIMEOUT_S
            ),
            timeout=self._timeout(None),
            headers={"User-Agent": f"erofsd/{erofsd.__version__}", "Accept-Encoding": "identity"},
            skip_auto_headers=("Content-Type",),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            read_bufsize=READ_BUFFER_SIZE,
        )
        return self._session

    def _timeout(self, answer_s: float | None) -> aiohttp.ClientTimeout:
        limits = self._limits
        return aiohttp.ClientTimeout(
            total=None, sock_connect=limits.connect_timeout_s, sock_read=answer_s or limits.inactivity_s
        )

    def _proxy(self, url: URL) -> URL | None:
        """The proxy that the environment names for *url* (``https_proxy``, ``no_proxy`` and so on)."""
        key = (url.scheme, url.host)
        if key not in self._proxies:
            proxy = getproxies().get(url.scheme)
            host = url.host or ""
            bypassed = not proxy or is_loopback(host) or proxy_bypass(host)
            self._proxies[key] = None if bypassed or proxy is None else URL(proxy)
        return self._proxies[key]


@cache  # it takes some 20 ms and a MiB to load the system's certificates
def _tls(ca: Path | None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if ca is not None:
        try:
            context.load_verify_locations(cafile=ca)
        except (OSError, ssl.SSLError) as exc:
            raise ConfigError(f"{ca}: no certificates can be read from it: {exc}") from exc
    return context


async def _redirect_target(response: ClientResponse, url: URL) -> URL:
    location = response.headers.get("Location")
    # The connection is kept where the body is a line of HTML, as most are.
    if (response.content_length or 0) <= _ERROR_BODY_MAX:
        try:
            await response.content.read(_ERROR_BODY_MAX)
        except (aiohttp.ClientError, OSError):
            pass  # nobody wants that body
    response.close()
    if not location:
        raise SourceError(f"{plain(url)}: a redirect ({response.status}) to nowhere")
    try:
        target = url.join(URL(location, encoded=True))  # as it is: signed URLs break when quoted again
    except ValueError as exc:
        raise SourceError(f"{plain(url)}: a redirect to what is no URL") from exc
    if target.scheme not in ("http", "https") or not target.host:
        raise SourceError(f"{plain(url)}: a redirect to {plain(target)}, which is not HTTP")
    if url.scheme == "https" and target.scheme == "http":
        raise SourceError(
            f"{plain(url)}: a redirect away from TLS, to {plain(target)}",
            hint="what comes without TLS may be changed on the way: the server has to be told otherwise",
        )
    return target


def plain(url: URL) -> str:
    """*url* as it may be shown: without query (signatures) and password."""
    return str(url.with_query(None).with_fragment(None).with_user(None) if url.host else url)


def is_loopback(host: str) -> bool:
    """True for names and addresses that mean this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def translate(exc: Exception, url: URL) -> ErofsdError:
    """Our error for what aiohttp raised while talking to *url*."""
    where = plain(url)
    match exc:
        case aiohttp.ClientConnectorCertificateError():
            return SourceError(
                f"{where}: its certificate is not trusted: {exc.certificate_error}",
                hint=f'name its CA: [registry."{url.authority}"] ca = "/path/ca.pem"',
            )
        case aiohttp.ClientSSLError():
            return TlsRefused(
                f"{where}: no TLS connection: {exc}",
                hint=f'if it speaks plain HTTP: [registry."{url.authority}"] plain_http = true',
            )
        case aiohttp.ClientConnectorDNSError():
            return BackendTemporary(f"{where}: the host's name cannot be resolved: {exc.os_error}")
        case aiohttp.ClientConnectorError():
            reason = exc.os_error.strerror or str(exc.os_error)
            if url.scheme == "https" and exc.os_error.errno in (None, errno.ECONNRESET, errno.EPIPE):
                return TlsRefused(f"{where}: the connection broke off before it was secure: {reason}")
            return BackendTemporary(f"{where}: cannot connect: {reason}")
        case aiohttp.ConnectionTimeoutError():
            kind = TlsRefused if url.scheme == "https" else BackendTemporary
            return kind(f"{where}: no connection in time")
        case aiohttp.SocketTimeoutError():
            return BackendTemporary(f"{where}: fell silent")
        case aiohttp.ClientPayloadError():
            return BackendTemporary(f"{where}: the answer broke off")
        case aiohttp.ClientResponseError():
            return BackendTemporary(f"{where}: the answer is not HTTP: {exc.message}")
        case aiohttp.ServerDisconnectedError():
            return BackendTemporary(f"{where}: the connection was closed without an answer")
        case aiohttp.InvalidURL() | ValueError():
            return SourceError(f"{where}: cannot be asked for: {exc}")
        case OSError():
            return BackendTemporary(f"{where}: connection lost: {exc.strerror or exc}")
    return BackendTemporary(f"{where}: {exc}")


async def refusal(response: ClientResponse, what: str) -> ErofsdError:
    """Our error for an answer that is not the one hoped for; closes *response*.

    Args:
        what: What was asked for, for the message.
    """
    detail = await _explanation(response)
    status = response.status
    message = f"{what}: {plain(response.url)} answered {status}{detail}"
    match status:
        case 401:
            return BackendDenied(message, hint="log in to it (docker login), or check the name")
        case 403 | 407:
            return BackendDenied(message)
        case 404 | 410:
            return BlobNotFound(message)
        case 412 | 416:
            return BlobCorrupt(f"{message}: the object is not the one it was, or not the one the image means")
        case 408 | 425 | 429:
            return BackendTemporary(message, retry_after_s=_retry_after_s(response))
        case _ if status >= 500:
            return BackendTemporary(message, retry_after_s=_retry_after_s(response))
    return SourceError(message)


class _RegistryError(msgspec.Struct):
    code: str = ""
    message: str = ""


class _RegistryErrors(msgspec.Struct):
    errors: list[_RegistryError]


async def _explanation(response: ClientResponse) -> str:
    """What the body of an error says, if it is one line for humans; nothing else may hold the error up."""
    try:
        body = await response.content.read(_ERROR_BODY_MAX)
    except (aiohttp.ClientError, OSError):
        body = b""
    finally:
        response.close()
    try:
        # distribution-spec, "Error Codes"
        found = msgspec.json.decode(body, type=_RegistryErrors).errors
        text = "; ".join(e.message or e.code for e in found[:3])
    except (msgspec.MsgspecError, UnicodeDecodeError):
        text = ""
        if response.content_type == "text/plain":
            text = body.decode("utf-8", "replace").strip()
    text = re.sub(r"\s+", " ", "".join(c for c in text if c.isprintable() or c.isspace()))[:200]
    return f": {text}" if text else ""


def _retry_after_s(response: ClientResponse) -> float | None:
    """Source: RFC 9110, 10.2.3: seconds or a date."""
    value = response.headers.get("Retry-After", "")
    if value.isascii() and value.isdigit():
        return min(float(value[:9]), _RETRY_AFTER_MAX_S)
    try:
        return min(max(0.0, parsedate_to_datetime(value).timestamp() - time()), _RETRY_AFTER_MAX_S)
    except (ValueError, OverflowError):
        return None


def refuse_page(response: ClientResponse, what: str) -> None:
    """Refuse a page for humans where data were asked for: error pages often come with status 200.

    Raises:
        BackendTemporary: *response* is such a page; it is closed.
    """
    if response.content_type in ("text/html", "application/xhtml+xml"):
        response.close()
        raise BackendTemporary(
            f"{what}: {plain(response.url)} answered with a web page instead",
            hint="a proxy, a login page, or not the server that was meant",
        )
