"""The HTTP/JSON API on the Unix socket."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

import msgspec
import structlog
from aiohttp import web

from erofsd import __version__
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

T = TypeVar("T", bound=msgspec.Struct)

#: HTTP status for an exit code: scripts read the code, browsers and proxies the status.
STATUS = {1: 409, 2: 400, 3: 501, 4: 422, 5: 502}

BODY_MAX = 64 << 20  # a file list of a whole image

log = structlog.get_logger("erofsd.control")


class Service(Protocol):
    """What the API offers, without HTTP."""

    def info(self) -> DaemonInfo: ...

    def mounts(self) -> list[MountInfo]: ...

    async def mount(self, request: MountRequest) -> MountInfo: ...

    async def umount(self, directory: str) -> None: ...

    async def prefetch(
        self, request: PrefetchRequest, progress: Callable[[int, int], Awaitable[None]]
    ) -> None: ...

    def metrics(self) -> bytes: ...


def _json(data: object, status: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(data), status=status, content_type="application/json")


def reply(exc: ErofsdError) -> ErrorReply:
    """*exc* as the other side of the socket sees it."""
    return ErrorReply(error=str(exc), hint=exc.hint, exit_code=exc.exit_code)


@web.middleware
async def _translate(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Our errors become ErrorReply; what we broke is logged whole and becomes one too."""
    try:
        return await handler(request)
    except ErofsdError as exc:
        return _json(reply(exc), STATUS.get(exc.exit_code, 409))
    except web.HTTPException as exc:
        return _json(
            ErrorReply(error=f"{request.method} {request.path}: {exc.reason}", exit_code=2), exc.status
        )
    except ConnectionResetError:
        return web.Response()  # nobody listens any more
    except Exception as exc:
        log.exception("request.crashed", method=request.method, path=request.path)
        return _json(
            ErrorReply(error=f"internal error: {exc!r}", hint="the daemon's log has the traceback"), 500
        )


async def _body(request: web.Request, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(await request.read(), type=kind)
    except msgspec.MsgspecError as exc:
        raise web.HTTPBadRequest(reason=str(exc).replace("\n", " ")) from exc


def make_app(service: Service) -> web.Application:
    """The application that offers *service*."""

    async def daemon(_request: web.Request) -> web.Response:
        return _json(service.info())

    async def list_mounts(_request: web.Request) -> web.Response:
        return _json(service.mounts())

    async def mount(request: web.Request) -> web.Response:
        return _json(await service.mount(await _body(request, MountRequest)))

    async def umount(request: web.Request) -> web.Response:
        directory = request.query.get("dir")
        if not directory:
            raise web.HTTPBadRequest(reason="the query parameter dir is missing")
        await service.umount(directory)
        return web.Response(status=204)

    async def prefetch(request: web.Request) -> web.StreamResponse:
        body = await _body(request, PrefetchRequest)
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)

        async def line(progress: PrefetchProgress) -> None:
            await response.write(msgspec.json.encode(progress) + b"\n")

        async def report(fetched: int, total: int) -> None:
            await line(PrefetchProgress(fetched_bytes=fetched, total_bytes=total))

        try:
            await service.prefetch(body, report)
        except ErofsdError as exc:
            await line(PrefetchProgress(error=str(exc), hint=exc.hint, exit_code=exc.exit_code))
        else:
            await line(PrefetchProgress(done=True))
        await response.write_eof()
        return response

    async def metrics(_request: web.Request) -> web.Response:
        return web.Response(body=service.metrics(), headers={"Content-Type": "text/plain; version=0.0.4"})

    async def openapi(_request: web.Request) -> web.Response:
        return _json(describe())

    app = web.Application(middlewares=[_translate], client_max_size=BODY_MAX)
    app.router.add_get(DAEMON_PATH, daemon)
    app.router.add_get(MOUNTS_PATH, list_mounts)
    app.router.add_post(MOUNTS_PATH, mount)
    app.router.add_delete(MOUNTS_PATH, umount)
    app.router.add_post(PREFETCH_PATH, prefetch)
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/openapi.json", openapi)
    return app


async def serve(app: web.Application, listener: socket.socket) -> web.AppRunner:
    """Answer on *listener*; the runner is the caller's to clean up."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0, handle_signals=False)
    await runner.setup()
    await web.SockSite(runner, listener).start()
    return runner


def describe() -> dict[str, Any]:
    """The OpenAPI 3.1 description of this API."""
    structs = (DaemonInfo, MountInfo, MountRequest, PrefetchRequest, PrefetchProgress, ErrorReply)
    references, components = msgspec.json.schema_components(
        structs, ref_template="#/components/schemas/{name}"
    )
    schema = dict(zip((s.__name__ for s in structs), references, strict=True))
    refused = {
        "description": "Refused; the exit code is what the command line ends with.",
        "content": {"application/json": {"schema": schema["ErrorReply"]}},
    }

    def operation(
        summary: str,
        answer: Any = None,
        *,
        body: Any = None,
        media: str = "application/json",
        status: str = "200",
        parameters: list[Any] | None = None,
    ) -> dict[str, Any]:
        ok: dict[str, Any] = {"description": "Done."}
        if answer is not None:
            ok["content"] = {media: {"schema": answer}}
        described: dict[str, Any] = {"summary": summary, "responses": {status: ok, "default": refused}}
        if body is not None:
            described["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
        if parameters:
            described["parameters"] = parameters
        return described

    text = {"type": "string"}
    directory = {"name": "dir", "in": "query", "required": True, "schema": text}
    return {
        "openapi": "3.1.0",
        "info": {"title": "erofsd", "version": __version__},
        "paths": {
            DAEMON_PATH: {"get": operation("The daemon itself", schema["DaemonInfo"])},
            MOUNTS_PATH: {
                "get": operation("What is mounted", {"type": "array", "items": schema["MountInfo"]}),
                "post": operation("Mount an image lazily", schema["MountInfo"], body=schema["MountRequest"]),
                "delete": operation("Unmount a directory", status="204", parameters=[directory]),
            },
            PREFETCH_PATH: {
                "post": operation(
                    "Fill now; one JSON object a line until done or error",
                    schema["PrefetchProgress"],
                    body=schema["PrefetchRequest"],
                    media="application/x-ndjson",
                )
            },
            "/metrics": {"get": operation("Prometheus metrics", text, media="text/plain")},
            "/openapi.json": {"get": operation("This description", {"type": "object"})},
        },
        "components": {"schemas": components},
    }
