"""Servers that do not do what they should: over HTTP proper, and seen through a registry's blobs."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable

import pytest

from erofsd.backends.http import HttpBackend, url_id
from erofsd.backends.measured import MeasuredBackend, streaming
from erofsd.backends.transport import MAX_REDIRECTS
from erofsd.errors import (
    BackendDenied,
    BackendTemporary,
    BlobCorrupt,
    BlobNotFound,
    ErofsdError,
    SourceError,
)
from ondemand.ranges import Range
from tests.registry import Exchange, Lie, Origin

from .conftest import BLOB_ID, BODY, client, registry_backend

WANT = Range(1000, 201_000)
HTML = b"<html><body>Please log in</body></html>"


@pytest.fixture(params=["http", "registry"])
def path(request: pytest.FixtureRequest, origin: Origin) -> str:
    """Where the origin has BODY, at the place where the backend will look."""
    where = f"/v2/app/blobs/sha256:{BLOB_ID}" if request.param == "registry" else f"/{BLOB_ID}"
    origin.objects[where] = BODY
    return where


@pytest.fixture
async def backend(path: str, origin: Origin) -> AsyncIterator[MeasuredBackend]:
    made: MeasuredBackend
    if path.startswith("/v2"):
        made = registry_backend(origin.host, "app")
    else:
        made = HttpBackend(client(), prefix=origin.url)
    yield made
    await made.aclose()


async def read(backend: MeasuredBackend, want: Range = WANT, blob_id: str = BLOB_ID) -> bytes:
    async with streaming(backend, blob_id, want) as pieces:
        return b"".join([piece async for piece in pieces])


def says(content_range: str, body: bytes = b"x" * len(WANT), **headers: str) -> Lie:
    return lambda x: x.answer(206, body, Content_Range=content_range, **headers)


def whole(x: Exchange) -> None:
    x.answer(200, x.body(), Content_Type="application/octet-stream")


def status(code: int, body: bytes = b"", **headers: str) -> Lie:
    return lambda x: x.answer(code, body, **headers)


def without_length(x: Exchange) -> None:
    x.handler.close_connection = True
    x.head(200, None, Content_Type="application/octet-stream", Connection="close")
    x.handler.wfile.write(x.body())
    x.close()


def cut(x: Exchange) -> None:
    x.honest(cut=70_000)
    x.close()


def cut_by_reset(x: Exchange) -> None:
    x.honest(cut=70_000)
    x.reset()


def hang_in_the_middle(x: Exchange) -> None:
    x.honest(cut=70_000)
    x.hang()


def garbage(x: Exchange) -> None:
    x.handler.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
    x.close()


LIES: list[tuple[str, Lie, type[ErofsdError]]] = [
    ("truncated", cut, BackendTemporary),
    ("reset in the middle", cut_by_reset, BackendTemporary),
    ("reset at once", Exchange.reset, BackendTemporary),
    ("closed at once", Exchange.close, BackendTemporary),
    ("no HTTP", garbage, BackendTemporary),
    ("hang before the answer", Exchange.hang, BackendTemporary),
    ("hang in the middle", hang_in_the_middle, BackendTemporary),
    ("web page", status(200, HTML, Content_Type="text/html; charset=utf-8"), BackendTemporary),
    ("JSON", status(200, b"{}", Content_Type="application/json"), BackendTemporary),
    ("short data", status(200, b"data", Content_Type="application/octet-stream"), BlobCorrupt),
    ("403", status(403), BackendDenied),
    ("404", status(404), BlobNotFound),
    ("410", status(410), BlobNotFound),
    ("416", status(416), BlobCorrupt),
    ("418", status(418), SourceError),
    ("429", status(429, Retry_After="7"), BackendTemporary),
    ("500", status(500, HTML, Content_Type="text/html"), BackendTemporary),
    ("503", status(503), BackendTemporary),
    ("no Content-Range", status(206, b"x" * len(WANT)), BackendTemporary),
    ("nonsense in Content-Range", says("bytes all/some"), BackendTemporary),
    ("another range", says(f"bytes 0-199999/{len(BODY)}"), BackendTemporary),
    ("a shorter range", says(f"bytes 1000-2000/{len(BODY)}", b"x" * 1001), BackendTemporary),
    ("a shorter object", says("bytes 1000-1999/2000", b"x" * 1000), BlobCorrupt),
    ("another length", says(f"bytes 1000-200999/{len(BODY)}", b"short"), BackendTemporary),
    ("compressed", says(f"bytes 1000-200999/{len(BODY)}", Content_Encoding="gzip"), SourceError),
    ("redirect to nowhere", status(302), SourceError),
    ("redirect to a file", status(302, Location="file:///etc/passwd"), SourceError),
    ("redirect to no URL", status(302, Location="http://[::"), SourceError),
]


@pytest.mark.parametrize(("lie", "error"), [t[1:] for t in LIES], ids=[t[0] for t in LIES])
async def test_lie_is_an_error_of_the_right_kind_and_the_next_request_is_served(
    backend: MeasuredBackend, origin: Origin, path: str, lie: Lie, error: type[ErofsdError]
) -> None:
    # aiohttp by itself asks once more where a connection ends before there is an answer.
    origin.lie(path, *[lie] * (2 if lie in (Exchange.reset, Exchange.close) else 1))
    began = time.monotonic()
    with pytest.raises(error) as caught:
        await read(backend)
    assert type(caught.value) is error
    assert BLOB_ID in str(caught.value)
    assert time.monotonic() - began < 5
    assert await read(backend) == BODY[WANT.start : WANT.stop]


async def test_flipped_bit_passes_through_since_verification_is_above(
    backend: MeasuredBackend, origin: Origin, path: str
) -> None:
    origin.lie(path, lambda x: x.honest(flip=123))
    found = await read(backend)
    assert [n for n, b in enumerate(found) if b != BODY[WANT.start + n]] == [123]


@pytest.mark.parametrize("lie", [whole, without_length])
async def test_small_object_without_ranges_is_cut_to_measure(
    backend: MeasuredBackend, origin: Origin, path: str, lie: Lie
) -> None:
    origin.always[path] = lie
    assert await read(backend) == BODY[WANT.start : WANT.stop]
    assert await read(backend, Range(0, len(BODY))) == BODY
    assert await read(backend, Range(len(BODY) - 1, len(BODY))) == BODY[-1:]


async def test_large_object_without_ranges_is_refused_unless_all_of_it_is_wanted(
    backend: MeasuredBackend, origin: Origin, path: str
) -> None:
    origin.objects[path] = large = bytes(9 << 20)
    origin.always[path] = whole
    with pytest.raises(SourceError, match="does not serve ranges"):
        await read(backend)
    assert await read(backend, Range(0, len(large))) == large


async def test_size_is_found_where_head_is_not_answered(
    backend: MeasuredBackend, origin: Origin, path: str
) -> None:
    for refusal in (403, 405, 501):
        origin.lie(path, status(refusal))
        assert await backend.size(BLOB_ID) == len(BODY)


async def test_change_of_size_is_noticed(backend: MeasuredBackend, origin: Origin, path: str) -> None:
    assert await read(backend) == BODY[WANT.start : WANT.stop]
    origin.objects[path] = BODY + b"x"
    with pytest.raises(BlobCorrupt, match="changed at the source"):
        await read(backend)


async def test_redirects_are_followed_once_and_remembered(
    backend: MeasuredBackend, origin: Origin, path: str
) -> None:
    origin.objects["/cdn"] = BODY
    origin.always[path] = status(307, Location=f"{origin.url}/cdn?sig=a%2Fb")
    for _ in range(3):
        assert await read(backend) == BODY[WANT.start : WANT.stop]
    assert [p for _, p, _ in origin.seen] == [path] + ["/cdn?sig=a%2Fb"] * 3


@pytest.mark.parametrize("refusal", [401, 403, 404])
async def test_expired_redirect_is_renewed(
    backend: MeasuredBackend, origin: Origin, path: str, refusal: int
) -> None:
    origin.objects["/cdn"] = BODY
    origin.always[path] = status(302, Location="/cdn")
    assert await read(backend) == BODY[WANT.start : WANT.stop]
    origin.lie("/cdn", status(refusal))
    assert await read(backend) == BODY[WANT.start : WANT.stop]
    assert [p for _, p, _ in origin.seen] == [path, "/cdn", "/cdn", path, "/cdn"]


async def test_redirect_loops_end(backend: MeasuredBackend, origin: Origin, path: str) -> None:
    origin.always[path] = status(302, Location=path)
    with pytest.raises(SourceError, match="redirects"):
        await read(backend)
    assert len(origin.seen) == MAX_REDIRECTS + 1


async def test_error_explains_itself_in_the_servers_words_but_on_one_line(
    backend: MeasuredBackend, origin: Origin, path: str
) -> None:
    text = b'{"errors": [{"code": "TOOMANYREQUESTS", "message": "pull \\n rate\\u001b[31m limit"}]}'
    origin.lie(path, status(429, text, Content_Type="application/json", Retry_After="7"))
    with pytest.raises(BackendTemporary, match=r"429: pull rate\[31m limit$") as caught:
        await read(backend)
    assert caught.value.retry_after_s == 7


async def test_secrets_in_urls_are_not_shown(origin: Origin) -> None:
    backend = HttpBackend(client(), objects={"x": f"{origin.url}/x?signature=geheim"})
    with pytest.raises(BlobNotFound) as caught:
        await read(backend, blob_id="x")
    await backend.aclose()
    assert "geheim" not in str(caught.value) + backend.name


@pytest.mark.parametrize("refused", [True, False])
async def test_nobody_there_is_temporary(refused: bool) -> None:
    url = "http://127.0.0.1:1" if refused else "http://no-such-host.invalid"
    backend = HttpBackend(client(), prefix=url)
    with pytest.raises(BackendTemporary):
        await read(backend)
    await backend.aclose()


Change = Callable[[Origin], None]


def other_etag(origin: Origin) -> None:
    origin.etags["/x.erofs"] = '"two"'


def no_etag(origin: Origin) -> None:
    origin.etags.clear()


def other_size(origin: Origin) -> None:
    origin.objects["/x.erofs"] += b"!"


@pytest.mark.parametrize("change", [other_etag, no_etag, other_size])
async def test_pinned_object_that_changes_is_refused(origin: Origin, change: Change) -> None:
    url = f"{origin.url}/x.erofs"
    origin.objects["/x.erofs"] = BODY
    origin.etags["/x.erofs"] = '"one"'
    key = url_id(url)
    backend = HttpBackend(client(), objects={key: url})
    pin = await backend.pin(key)
    assert pin == f'size={len(BODY)} etag="one"'
    assert await read(backend, blob_id=key) == BODY[WANT.start : WANT.stop]
    change(origin)
    later = HttpBackend(client(), objects={key: url}, pins={key: pin})
    for one in (backend, later):
        with pytest.raises(BlobCorrupt, match="changed at the source"):
            await read(one, blob_id=key)
        await one.aclose()


async def test_pin_without_a_strong_etag_is_the_time_of_modification(origin: Origin) -> None:
    url = f"{origin.url}/x"
    stamp = "Tue, 01 Sep 2026 10:00:00 GMT"
    origin.always["/x"] = lambda x: x.answer(
        206, b"a", Content_Range="bytes 0-0/1", ETag='W/"weak"', Last_Modified=stamp
    )
    backend = HttpBackend(client(), objects={"k": url})
    pin = await backend.pin("k")
    assert pin == f"size=1 modified={stamp}"
    assert await read(backend, Range(0, 1), "k") == b"a"
    await backend.aclose()
    later = HttpBackend(client(), objects={"k": url}, pins={"k": pin})
    assert await read(later, Range(0, 1), "k") == b"a"
    stamp = "Wed, 02 Sep 2026 10:00:00 GMT"
    with pytest.raises(BlobCorrupt, match="modified"):
        await read(later, Range(0, 1), "k")
    await later.aclose()


async def test_compression_is_asked_not_to_be_used(backend: MeasuredBackend, origin: Origin) -> None:
    await read(backend)
    _, _, headers = origin.seen[-1]
    assert headers["Accept-Encoding"] == "identity"
    assert headers["User-Agent"].startswith("erofsd/")
