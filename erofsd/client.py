"""Client of the daemon's API over its Unix socket.

While a worker restarts, the keeper holds the listening socket: a call that comes then waits. A call that
was under way when the worker was killed sees its connection break; all calls are idempotent, so it is
made again until `patience_s` is over.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import aiohttp
import msgspec

from erofsd.api import (
    DAEMON_PATH,
    MOUNTS_PATH,
    PREFETCH_PATH,
    DaemonInfo,
    ErrorReply,
    MountInfo,
    MountRequest,
    PrefetchProgress,
    PrefetchRequest,
)
from erofsd.errors import ErofsdError

T = TypeVar("T")

PATIENCE_S = 30.0
RETRY_PAUSE_S = 0.05
LINE_MAX = 1 << 20


class DaemonUnreachable(ErofsdError):
    """Nobody answers on the socket."""


class DaemonRefused(ErofsdError):
    """The daemon answered with an error; carries its exit code."""

    def __init__(self, reply: ErrorReply) -> None:
        super().__init__(reply.error, hint=reply.hint)
        self.exit_code = reply.exit_code or 1


class Client:
    """Talks to the daemon behind *socket*. Use as an async context manager.

    Args:
        patience_s: How long a call whose connection broke is made again.
    """

    def __init__(self, socket: Path, *, patience_s: float = PATIENCE_S) -> None:
        self._socket = socket
        self._patience_s = patience_s
        self._session: aiohttp.ClientSession | None = None
        self._connections = 0

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            "http://erofsd",
            connector=aiohttp.UnixConnector(str(self._socket), force_close=True),
            # The daemon keeps its own deadlines; a mount that fills much metadata may take long.
            timeout=aiohttp.ClientTimeout(total=None),
            read_bufsize=LINE_MAX,
            trace_configs=[self._count_connections()],
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def daemon(self) -> DaemonInfo:
        """What answers there."""
        return await self._call("GET", DAEMON_PATH, DaemonInfo)

    async def mounts(self) -> list[MountInfo]:
        """Everything that is mounted, by directory."""
        return await self._call("GET", MOUNTS_PATH, list[MountInfo])

    async def mount(self, request: MountRequest) -> MountInfo:
        """Mount an image; returns when it can be read. The same again is success."""
        return await self._call("POST", MOUNTS_PATH, MountInfo, request)

    async def unmount(self, directory: str) -> None:
        """Unmount *directory* (absolute)."""
        before = self._connections
        try:
            await self._send("DELETE", MOUNTS_PATH, query={"dir": directory})
        except DaemonRefused:
            # The call whose connection broke may have done it, and left nothing for this one to do.
            made_again = self._connections > before + 1
            if not made_again or any(mount.dir == directory for mount in await self.mounts()):
                raise

    async def prefetch(self, request: PrefetchRequest) -> AsyncIterator[PrefetchProgress]:
        """Fill now; yields progress, lastly an item with *done*.

        Raises:
            DaemonRefused: Also for a failure in the middle.
        """
        retry = _Retry(self)
        while True:
            try:
                async with self._http.post(PREFETCH_PATH, data=msgspec.json.encode(request)) as response:
                    await _raise_for_error(response)
                    async for line in response.content:
                        progress = msgspec.json.decode(line, type=PrefetchProgress)
                        if progress.error:
                            raise DaemonRefused(
                                ErrorReply(
                                    error=progress.error, hint=progress.hint, exit_code=progress.exit_code
                                )
                            )
                        yield progress
                        if progress.done:
                            return
                raise aiohttp.ServerDisconnectedError("the answer ended early")
            except (aiohttp.ClientError, OSError, msgspec.DecodeError) as exc:
                await retry.pause(exc)

    async def _call(self, method: str, path: str, answer: type[T], body: msgspec.Struct | None = None) -> T:
        content = await self._send(method, path, body=body)
        try:
            return msgspec.json.decode(content, type=answer)
        except msgspec.DecodeError as exc:
            raise ErofsdError(
                f"{self._socket}: cannot understand the answer to {method} {path}: {exc}",
                hint="client and daemon should be of one version",
            ) from exc

    async def _send(
        self,
        method: str,
        path: str,
        *,
        body: msgspec.Struct | None = None,
        query: dict[str, str] | None = None,
    ) -> bytes:
        data = None if body is None else msgspec.json.encode(body)
        retry = _Retry(self)
        while True:
            try:
                async with self._http.request(method, path, data=data, params=query) as response:
                    await _raise_for_error(response)
                    return await response.read()
            except (aiohttp.ClientError, OSError) as exc:
                await retry.pause(exc)

    def _count_connections(self) -> aiohttp.TraceConfig:
        # aiohttp makes some calls again by itself and tells nobody: each attempt is a new connection here.
        async def count(*_: object) -> None:
            self._connections += 1

        trace = aiohttp.TraceConfig()
        trace.on_connection_create_start.append(count)
        return trace

    @property
    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("Client is used outside of its context")
        return self._session

    @property
    def socket(self) -> Path:
        """Where the daemon is expected."""
        return self._socket

    @property
    def patience_s(self) -> float:
        """How long a call whose connection broke is made again."""
        return self._patience_s


class _Retry:
    """Decides after each failure of one call whether to make it again."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._began: float | None = None

    async def pause(self, exc: Exception) -> None:
        """Return when the call is to be made again.

        Raises:
            DaemonUnreachable: There is nobody to make it to.
        """
        socket = self._client.socket
        cause = exc.os_error if isinstance(exc, aiohttp.ClientConnectorError) else exc
        match cause:
            case PermissionError():
                raise DaemonUnreachable(
                    f"{socket}: permission denied", hint="the socket is root's: try again with sudo"
                ) from exc
            case FileNotFoundError() | ConnectionRefusedError() | NotADirectoryError():
                # The keeper and the worker both hold the listener: if it is gone, so are both.
                raise DaemonUnreachable(
                    f"no daemon answers on {socket}",
                    hint="start one with `erofsd serve`, or name its socket with --socket or EROFSD_SOCKET",
                ) from exc
        now = asyncio.get_running_loop().time()
        self._began = now if self._began is None else self._began
        if now - self._began > self._client.patience_s:
            raise DaemonUnreachable(
                f"the daemon on {socket} broke off every call for {self._client.patience_s:g} s: {exc}",
                hint="its log on stderr says why the worker keeps ending",
            ) from exc
        await asyncio.sleep(RETRY_PAUSE_S)


async def _raise_for_error(response: aiohttp.ClientResponse) -> None:
    if response.status < 400:
        return
    content = await response.read()
    try:
        reply = msgspec.json.decode(content, type=ErrorReply)
    except msgspec.DecodeError:
        text = content.decode("utf-8", "replace").strip()[:200]
        reply = ErrorReply(error=f"the daemon answered {response.status}: {text or response.reason}")
    raise DaemonRefused(reply)
