"""A small read-only OCI registry over an image layout directory, on a loopback port of its own.

It speaks the part of the distribution specification that a pull needs (manifests, blobs, single ranges), and
counts what it sends: the demonstration's figures come from the far side of the wire.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

PIECE = 256 << 10
REF_NAME = "org.opencontainers.image.ref.name"


@dataclass(slots=True)
class Traffic:
    """What went out, HTTP headers not counted."""

    requests: int = 0
    bytes: int = 0


@dataclass(slots=True)
class LayoutRegistry:
    """A running registry.

    Attributes:
        address: ``127.0.0.1:PORT``.
    """

    address: str
    traffic: Traffic


@asynccontextmanager
async def serve_layout(layout: Path) -> AsyncIterator[LayoutRegistry]:
    """Serve every image of *layout* under every repository name, until the context ends."""
    traffic = Traffic()
    runner = web.AppRunner(make_app(layout, traffic), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        yield LayoutRegistry(f"{host}:{port}", traffic)
    finally:
        await runner.cleanup()


def make_app(layout: Path, traffic: Traffic) -> web.Application:
    """The application that serves *layout* and counts into *traffic*."""

    async def base(_request: web.Request) -> web.Response:
        return web.json_response({}, headers={"Docker-Distribution-Api-Version": "registry/2.0"})

    async def manifest(request: web.Request) -> web.StreamResponse:
        described = _find_manifest(layout, request.match_info["reference"])
        if described is None:
            return _not_found("MANIFEST_UNKNOWN", request.match_info["reference"])
        digest, media_type = described
        return await _send(request, layout, digest, media_type, traffic)

    async def blob(request: web.Request) -> web.StreamResponse:
        return await _send(request, layout, request.match_info["digest"], "application/octet-stream", traffic)

    app = web.Application()
    app.router.add_get("/v2/", base)
    app.router.add_get("/v2/{name:.+}/manifests/{reference}", manifest)
    app.router.add_get("/v2/{name:.+}/blobs/{digest}", blob)
    return app


def _find_manifest(layout: Path, reference: str) -> tuple[str, str] | None:
    """Digest and media type of what *reference* (a tag or digest) names."""
    for entry in json.loads((layout / "index.json").read_bytes())["manifests"]:
        if reference in (entry["digest"], entry.get("annotations", {}).get(REF_NAME)):
            return entry["digest"], entry["mediaType"]
    path = _blob_path(layout, reference)
    if path is None:  # a manifest below an index is a blob like any other
        return None
    try:
        return reference, json.loads(path.read_bytes())["mediaType"]
    except (ValueError, KeyError, TypeError):
        return None


def _blob_path(layout: Path, digest: str) -> Path | None:
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        return None
    path = layout / "blobs" / "sha256" / digest.removeprefix("sha256:")
    return path if path.is_file() else None


async def _send(
    request: web.Request, layout: Path, digest: str, media_type: str, traffic: Traffic
) -> web.StreamResponse:
    path = _blob_path(layout, digest)
    if path is None:
        return _not_found("BLOB_UNKNOWN", digest)
    with path.open("rb") as blob:
        size = os.fstat(blob.fileno()).st_size
        try:
            wanted = request.http_range
        except ValueError:
            wanted = slice(size, size)
        start, stop, _ = wanted.indices(size)
        partial = wanted.start is not None or wanted.stop is not None
        if partial and start >= stop:
            return web.Response(status=416, headers={"Content-Range": f"bytes */{size}"})
        headers = {"Accept-Ranges": "bytes", "Docker-Content-Digest": digest, "Content-Type": media_type}
        if partial:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        response = web.StreamResponse(status=206 if partial else 200, headers=headers)
        response.content_length = stop - start
        await response.prepare(request)
        traffic.requests += 1
        if request.method == "HEAD":
            return response
        while start < stop:
            piece = os.pread(blob.fileno(), min(PIECE, stop - start), start)
            await response.write(piece)
            traffic.bytes += len(piece)
            start += len(piece)
    await response.write_eof()
    return response


def _not_found(code: str, what: str) -> web.Response:
    return web.json_response({"errors": [{"code": code, "message": f"unknown: {what}"}]}, status=404)
