"""The API's client against a small server on a real Unix socket: retries, refusals, nobody there."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from aiohttp import web

from erofsd.api import MountInfo, MountRequest, PrefetchRequest
from erofsd.cli import main
from erofsd.client import Client, DaemonRefused, DaemonUnreachable

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

MOUNT = MountInfo(
    dir="/mnt/a",
    ref="docker://example.org/a:b",
    engine="fanotify",
    state="lazy",
    verified="blake3",
    fetched_bytes=1 << 20,
    total_bytes=4 << 20,
    transferred_bytes=1 << 20,
    waits=7,
    errors=0,
)


@asynccontextmanager
async def serving(path: Path, handler: Handler) -> AsyncIterator[None]:
    """A server on *path* that answers everything with *handler*."""
    app = web.Application()
    app.router.add_route("*", "/{any:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.UnixSite(runner, str(path)).start()
    try:
        yield
    finally:
        await runner.cleanup()


def json(value: object, status: int = 200) -> web.Response:
    """A JSON answer."""
    return web.Response(body=msgspec.json.encode(value), status=status)


async def break_off(request: web.Request) -> web.StreamResponse:
    """Drop the connection without an answer, as a killed worker does."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def test_call_whose_connection_breaks_is_made_again(tmp_path: Path) -> None:
    seen = []

    async def handler(request: web.Request) -> web.StreamResponse:
        seen.append(await request.read())
        return json(MOUNT) if len(seen) == 3 else await break_off(request)

    async with serving(tmp_path / "s", handler), Client(tmp_path / "s") as client:
        assert await client.mount(MountRequest(ref="a", dir="/a")) == MOUNT
    assert len(seen) == 3
    assert len(set(seen)) == 1


async def test_unmount_that_was_done_before_its_answer_got_lost_is_done(tmp_path: Path) -> None:
    seen = []

    async def handler(request: web.Request) -> web.StreamResponse:
        if request.method == "GET":
            return json([])
        seen.append(request.query["dir"])
        return json({"error": "not mounted"}, 409) if len(seen) == 2 else await break_off(request)

    async with serving(tmp_path / "s", handler), Client(tmp_path / "s") as client:
        await client.unmount("/a b")
    assert seen == ["/a b", "/a b"]


async def test_unmount_of_what_is_not_mounted_is_refused(tmp_path: Path) -> None:
    async def handler(_request: web.Request) -> web.StreamResponse:
        return json({"error": "not mounted"}, 409)

    async with serving(tmp_path / "s", handler), Client(tmp_path / "s") as client:
        with pytest.raises(DaemonRefused, match="not mounted"):
            await client.unmount("/a")


async def test_daemon_that_only_breaks_off_is_given_up(tmp_path: Path) -> None:
    async with serving(tmp_path / "s", break_off), Client(tmp_path / "s", patience_s=0.2) as client:
        with pytest.raises(DaemonUnreachable, match="broke off every call"):
            await client.daemon()


async def test_call_waits_while_nobody_accepts_yet(tmp_path: Path) -> None:
    # The keeper holds the listening socket while the worker restarts.
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    async with Client(tmp_path / "s") as client, asyncio.TaskGroup() as group:
        call = group.create_task(client.mounts())
        await asyncio.sleep(0)
        assert not call.done()
        app = web.Application()

        async def handler(_request: web.Request) -> web.Response:
            return json([MOUNT])

        app.router.add_get("/v1/mounts", handler)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.SockSite(runner, listener).start()
        assert await call == [MOUNT]
    await runner.cleanup()


async def test_error_keeps_its_text_hint_and_exit_code(tmp_path: Path) -> None:
    async def handler(_request: web.Request) -> web.StreamResponse:
        return json({"error": "no such image", "hint": "look again", "exit_code": 5}, 502)

    async with serving(tmp_path / "s", handler), Client(tmp_path / "s") as client:
        with pytest.raises(DaemonRefused) as info:
            await client.mounts()
    assert (str(info.value), info.value.hint, info.value.exit_code) == ("no such image", "look again", 5)


async def test_error_that_is_no_json_is_shown_as_it_is(tmp_path: Path) -> None:
    async def handler(_request: web.Request) -> web.StreamResponse:
        return web.Response(status=500, text="Internal trouble")

    async with serving(tmp_path / "s", handler), Client(tmp_path / "s") as client:
        with pytest.raises(DaemonRefused, match="answered 500: Internal trouble"):
            await client.mounts()


async def stream(request: web.Request, *lines: object) -> web.StreamResponse:
    """Answer with *lines*, one JSON document each."""
    response = web.StreamResponse()
    await response.prepare(request)
    for line in lines:
        await response.write(msgspec.json.encode(line) + b"\n")
    return response


async def test_prefetch_reports_progress_and_survives_a_break(tmp_path: Path) -> None:
    calls = 0

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal calls
        calls += 1
        response = await stream(request, {"fetched_bytes": calls, "total_bytes": 9})
        if calls == 1:
            return await break_off(request)
        await response.write(msgspec.json.encode({"done": True}) + b"\n")
        return response

    async with serving(tmp_path / "s", handler), Client(tmp_path / "s") as client:
        seen = [p async for p in client.prefetch(PrefetchRequest(target="/a"))]
    assert [p.fetched_bytes for p in seen if p.total_bytes] == [1, 2]
    assert seen[-1].done


async def test_prefetch_that_fails_in_the_middle_says_why(tmp_path: Path) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return await stream(
            request,
            {"fetched_bytes": 1, "total_bytes": 2},
            {"error": "bad chunk", "hint": "h", "exit_code": 4},
        )

    async with serving(tmp_path / "s", handler), Client(tmp_path / "s") as client:
        with pytest.raises(DaemonRefused, match="bad chunk") as info:
            async for _ in client.prefetch(PrefetchRequest(target="/a")):
                pass
    assert info.value.exit_code == 4


@pytest.mark.parametrize(
    "argv", [["ls"], ["umount", "/x"], ["prefetch", "/x"], ["mount", "example.org/x", "/x"]]
)
def test_without_a_daemon_the_socket_is_named(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EROFSD_SOCKET", str(tmp_path / "api.sock"))
    assert main(argv) == 1
    text = capsys.readouterr().err
    assert str(tmp_path / "api.sock") in text
    assert ("--standalone" in text) == (argv[0] == "mount")


def test_socket_that_nobody_listens_on_is_no_daemon(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "s"))
    assert main(["ls", "--socket", str(tmp_path / "s")]) == 1
    assert "no daemon answers" in capsys.readouterr().err


async def run_verb(*argv: str) -> int:
    """A command beside the server of the test, which needs this loop."""
    return await asyncio.to_thread(main, argv)


async def test_ls_prints_a_table_for_people_and_an_array_for_scripts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = msgspec.structs.replace(
        MOUNT, dir="/mnt/b\x1b[31m", state="failed", last_error="blob x: chunk 3: 404"
    )

    async def handler(_request: web.Request) -> web.StreamResponse:
        return json([MOUNT, failed])

    path = str(tmp_path / "s")
    async with serving(tmp_path / "s", handler):
        assert await run_verb("ls", "--socket", path) == 0
        text = capsys.readouterr().out
        assert await run_verb("ls", "--socket", path, "--json") == 0
        printed = msgspec.json.decode(capsys.readouterr().out)
    assert text.splitlines()[0].split() == [
        *("DIR", "REF", "ENGINE", "STATE", "VERIFIED", "FETCHED", "OF", "%", "WAITS", "ERRORS")
    ]
    assert "1.0 MiB" in text
    assert "last error: blob x: chunk 3: 404" in text
    assert "\x1b" not in text
    wanted = "dir ref engine state verified fetched_bytes total_bytes transferred_bytes waits errors"
    assert set(wanted.split()) <= printed[0].keys()
    assert [m["state"] for m in printed] == ["lazy", "failed"]


async def test_mount_sends_absolute_paths_and_says_what_is_mounted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = []

    async def handler(request: web.Request) -> web.StreamResponse:
        requests.append(msgspec.json.decode(await request.read(), type=MountRequest))
        return json(MOUNT)

    monkeypatch.chdir(tmp_path)
    async with serving(tmp_path / "s", handler):
        argv = ["mount", "file:boot", "dir", "--blobs", "blobs", "--prefetch", "all", "--socket", "s"]
        assert await run_verb(*argv) == 0
    assert requests == [
        MountRequest(
            ref=f"file:{tmp_path}/boot", dir=f"{tmp_path}/dir", blobs=[f"{tmp_path}/blobs"], prefetch="all"
        )
    ]
    assert capsys.readouterr().out.startswith("docker://example.org/a:b on /mnt/a (")


async def test_command_ends_with_the_exit_code_of_the_daemon(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def handler(_request: web.Request) -> web.StreamResponse:
        return json({"error": "example.org/x: 401", "hint": "log in", "exit_code": 5}, 502)

    async with serving(tmp_path / "s", handler):
        assert await run_verb("mount", "example.org/x", "/x", "--socket", str(tmp_path / "s")) == 5
    assert capsys.readouterr().err == "erofsd: example.org/x: 401\n  hint: log in\n"


async def test_prefetch_prints_what_is_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return await stream(request, {"fetched_bytes": 2048, "total_bytes": 2048}, {"done": True})

    async with serving(tmp_path / "s", handler):
        assert await run_verb("prefetch", "/mnt/a", "--socket", str(tmp_path / "s")) == 0
        assert capsys.readouterr().out == "/mnt/a: 2.0 KiB of 2.0 KiB here\n"
        assert await run_verb("prefetch", "/mnt/a", "--socket", str(tmp_path / "s"), "--json") == 0
        assert msgspec.json.decode(capsys.readouterr().out) == {"fetched_bytes": 2048, "total_bytes": 2048}
