"""Registries: TLS or not, who we are, tokens, and manifests that are not what they say."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import stat
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from erofsd.backends import auth, credentials
from erofsd.backends.auth import Challenge, parse_challenges
from erofsd.backends.documents import INDEX_MAX
from erofsd.backends.measured import MeasuredBackend, streaming
from erofsd.backends.registry import RegistryBackend
from erofsd.backends.settings import RegistrySettings, SourceSettings
from erofsd.errors import (
    BackendDenied,
    BackendTemporary,
    BlobCorrupt,
    BlobNotFound,
    ConfigError,
    SourceError,
    UnsupportedImage,
)
from ondemand.ranges import Range
from tests.registry import PASSWORD, USERNAME, Exchange, Lie, Origin, RegistryServer, need, wait_until

from .conftest import BLOB_ID, BODY, registry_backend

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
BLOB_PATH = f"/v2/app/blobs/sha256:{BLOB_ID}"


def settings(host: str = "", docker: Path | None = None, **registry: object) -> SourceSettings:
    return SourceSettings(
        registries={host: RegistrySettings(**registry)} if host else {},  # type: ignore[arg-type]
        docker_config=docker or Path("/nonexistent"),
        inactivity_s=0.3,
    )


async def read(backend: MeasuredBackend) -> bytes:
    async with streaming(backend, BLOB_ID, Range(0, 100)) as pieces:
        return b"".join([piece async for piece in pieces])


# --- a real registry ---


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RegistryServer]:
    server = RegistryServer(tmp_path_factory.mktemp("secured"), password=True, tls=True).start()
    server.push_blob("app", BODY)
    yield server
    server.stop()


async def test_private_ca_and_password_from_the_configuration(secured: RegistryServer) -> None:
    backend = registry_backend(
        secured.host, "app", settings(secured.host, ca=secured.ca, username=USERNAME, password=PASSWORD)
    )
    assert await read(backend) == BODY[:100]
    assert backend.requests == 2  # unasked no password is sent
    assert await read(backend) == BODY[:100]
    assert backend.requests == 3
    await backend.aclose()


async def test_untrusted_certificate_is_final_and_the_hint_names_the_key(secured: RegistryServer) -> None:
    backend = registry_backend(secured.host, "app", settings())
    with pytest.raises(SourceError, match="not trusted") as caught:
        await read(backend)
    assert type(caught.value) is SourceError
    assert f'[registry."{secured.host}"] ca =' in caught.value.hint
    await backend.aclose()


async def test_wrong_password_is_denied(secured: RegistryServer) -> None:
    backend = registry_backend(
        secured.host, "app", settings(secured.host, ca=secured.ca, username=USERNAME, password="wrong")
    )
    with pytest.raises(BackendDenied, match="401"):
        await read(backend)
    await backend.aclose()


async def test_no_password_is_denied_with_a_hint(secured: RegistryServer) -> None:
    backend = registry_backend(secured.host, "app", settings(secured.host, ca=secured.ca))
    with pytest.raises(BackendDenied) as caught:
        await read(backend)
    assert caught.value.hint == f"docker login {secured.host}"
    await backend.aclose()


async def test_unreadable_ca_names_the_file(secured: RegistryServer) -> None:
    backend = registry_backend(secured.host, "app", settings(secured.host, ca=Path("/nonexistent.pem")))
    with pytest.raises(ConfigError, match=r"/nonexistent\.pem"):
        await read(backend)


@pytest.fixture
def pushed_by_skopeo(registry: RegistryServer, testdata: Path) -> str:
    """A repository of the shared registry with the image ``zstd``."""
    source = f"oci:{testdata / 'nydusify' / 'layout'}:zstd"
    target = f"docker://{registry.host}/skopeo:zstd"
    options = ("--insecure-policy", "copy", "-q", "--preserve-digests", "--dest-tls-verify=false")
    subprocess.run([need("skopeo"), *options, source, target], check=True)
    return "skopeo"


async def test_image_that_skopeo_pushed_is_found(registry: RegistryServer, pushed_by_skopeo: str) -> None:
    backend = registry_backend(registry.host, pushed_by_skopeo, settings())
    document = await backend.fetch_document("zstd")
    assert document.digest == "sha256:d165c42ed4b4078444f686e30b9911212ac6369150cdb7c7900db30f29434742"
    assert (await backend.fetch_document(document.digest)).body == document.body
    await backend.aclose()


async def test_registry_that_comes_back_is_used_again(tmp_path: Path) -> None:
    server = RegistryServer(tmp_path).start()
    server.push_blob("app", BODY)
    backend = registry_backend(server.host, "app", settings())
    assert await read(backend) == BODY[:100]
    server.stop()
    with pytest.raises(BackendTemporary):
        await read(backend)
    server.start()
    assert await read(backend) == BODY[:100]
    await backend.aclose()
    server.stop()


# --- plain HTTP, and who may speak it ---


async def test_plain_http_elsewhere_only_when_asked() -> None:
    elsewhere = "registry.example:5000"
    for wanted, scheme in ((False, "https"), (True, "http")):
        backend = registry_backend(elsewhere, "app", settings(elsewhere, plain_http=wanted))
        assert str(backend._url("/x")) == f"{scheme}://{elsewhere}/v2/app/x"
        assert not backend._undecided
    everywhere = SourceSettings(plain_http=True)
    assert registry_backend(elsewhere, "app", everywhere)._scheme == "http"


async def test_loopback_is_asked_for_tls_once_and_then_spoken_plain_to(origin: Origin) -> None:
    origin.objects[BLOB_PATH] = BODY
    backend = registry_backend(origin.host, "app", settings())
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(read(backend)) for _ in range(10)]
    assert [t.result() for t in tasks] == [BODY[:100]] * 10
    assert len([p for _, p, _ in origin.seen if p == BLOB_PATH]) == 10
    await backend.aclose()


# --- tokens ---


class TokenServer:
    """Makes an Origin ask for tokens, and give them out at /token."""

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.given: list[str] = []
        self.valid: set[str] = set()
        self.answer: dict[str, object] = {}
        self.challenge = (
            f'Bearer realm="{origin.url}/token",service="the, service",scope="repository:app:pull"'
        )
        origin.objects[BLOB_PATH] = BODY
        origin.always[BLOB_PATH] = self.blob
        origin.always["/token"] = self.token

    def blob(self, x: Exchange) -> None:
        if x.headers.get("Authorization", "") in {f"Bearer {t}" for t in self.valid}:
            x.honest()
        else:
            x.answer(401, b"{}", WWW_Authenticate=self.challenge)

    def token(self, x: Exchange) -> None:
        token = f"token{len(self.given)}"
        self.given.append(token)
        self.valid = {token}
        x.answer(200, json.dumps({"token": token, **self.answer}).encode(), Content_Type="application/json")

    def asked(self) -> list[tuple[str, dict[str, str]]]:
        return [(p, h) for _, p, h in self.origin.seen if p.startswith("/token")]


@pytest.fixture
def tokens(origin: Origin) -> TokenServer:
    return TokenServer(origin)


@pytest.fixture
async def backend(origin: Origin) -> AsyncIterator[RegistryBackend]:
    made = registry_backend(origin.host, "app", settings())
    yield made
    await made.aclose()


async def test_token_is_asked_for_as_the_challenge_says(
    backend: RegistryBackend, tokens: TokenServer
) -> None:
    assert await read(backend) == BODY[:100]
    [(path, headers)] = tokens.asked()
    assert path == "/token?scope=repository:app:pull&service=the,+service"
    assert "Authorization" not in headers


async def test_one_token_serves_all_readers(backend: RegistryBackend, tokens: TokenServer) -> None:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(read(backend)) for _ in range(20)]
    assert [t.result() for t in tasks] == [BODY[:100]] * 20
    assert len(tokens.given) == 1


async def test_revoked_token_is_replaced(backend: RegistryBackend, tokens: TokenServer) -> None:
    await read(backend)
    tokens.valid.clear()
    assert await read(backend) == BODY[:100]
    assert len(tokens.given) == 2


async def test_token_is_renewed_before_it_expires(
    backend: RegistryBackend, tokens: TokenServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens.answer = {"expires_in": 300}
    await read(backend)
    now = time.monotonic()
    for later_s, given in ((279, 1), (281, 2), (300, 2)):
        monkeypatch.setattr(auth, "monotonic", lambda later_s=later_s: now + later_s)
        assert await read(backend) == BODY[:100]
        assert len(tokens.given) == given
    assert len([p for _, p, _ in tokens.origin.seen if p == BLOB_PATH]) == 5  # one 401 only, at the start


async def test_old_token_serves_while_the_token_server_is_unwell(
    backend: RegistryBackend, tokens: TokenServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens.answer = {"expires_in": 300}
    await read(backend)
    tokens.origin.always["/token"] = lambda x: x.answer(500)
    now = time.monotonic()
    monkeypatch.setattr(auth, "monotonic", lambda: now + 290)
    assert await read(backend) == BODY[:100]
    monkeypatch.setattr(auth, "monotonic", lambda: now + 301)
    with pytest.raises(BackendTemporary):
        await read(backend)


async def test_password_goes_to_the_token_server_only(origin: Origin, tokens: TokenServer) -> None:
    backend = registry_backend(origin.host, "app", settings(origin.host, username="u", password="p"))
    assert await read(backend) == BODY[:100]
    await backend.aclose()
    basic = "Basic " + base64.b64encode(b"u:p").decode()
    with_password = [p for _, p, h in origin.seen if h.get("Authorization") == basic]
    assert len(with_password) == 1
    assert with_password[0].startswith("/token")


async def test_identity_token_is_exchanged(origin: Origin, tokens: TokenServer, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"auths": {origin.host: {"identitytoken": "idt"}}}))
    backend = registry_backend(origin.host, "app", settings(docker=tmp_path))
    assert await read(backend) == BODY[:100]
    await backend.aclose()
    assert [m for m, p, _ in origin.seen if p == "/token"] == ["POST"]


def gives(body: bytes, status: int = 200, **headers: str) -> Lie:
    return lambda x: x.answer(status, body, **headers)


@pytest.mark.parametrize(
    ("lie", "error"),
    [
        (gives(b"<html>", Content_Type="text/html"), BackendTemporary),
        (gives(b"not json"), BackendTemporary),
        (gives(b"[]"), BackendTemporary),
        (gives(b"{}"), BackendTemporary),
        (gives(b'{"token": null}'), BackendTemporary),
        (gives(b'{"token": "a\\r\\nX-Evil: 1"}'), BackendTemporary),
        (gives(b'{"token": "' + b"x" * 100_000 + b'"}'), SourceError),
        (gives(b"", 401), BackendDenied),
        (gives(b"", 403), BackendDenied),
        (gives(b"", 500), BackendTemporary),
        (gives(b"", 302, Location="http://elsewhere.invalid/"), SourceError),
        (Exchange.hang, BackendTemporary),
    ],
)
async def test_lies_of_the_token_server_are_errors_and_not_kept(
    backend: RegistryBackend, tokens: TokenServer, lie: Lie, error: type[Exception]
) -> None:
    tokens.origin.lie("/token", lie)
    with pytest.raises(error) as caught:
        await read(backend)
    assert type(caught.value) is error
    assert await read(backend) == BODY[:100]


@pytest.mark.parametrize("lifetime", [0, -5, "soon", "NaN", 1e300, "3600", None])
async def test_strange_lifetimes_are_survived(
    backend: RegistryBackend, tokens: TokenServer, lifetime: object
) -> None:
    tokens.answer = {"expires_in": lifetime}
    assert await read(backend) == await read(backend) == BODY[:100]
    assert len(tokens.given) == 1


@pytest.mark.parametrize(
    "challenge",
    [
        "Digest nonce=1",
        'Bearer realm="file:///etc/passwd"',
        "Bearer",
        'Bearer realm="http://["',
        "\x7f\x7f",
    ],
)
async def test_challenges_that_lead_nowhere_are_denied(
    backend: RegistryBackend, tokens: TokenServer, challenge: str
) -> None:
    tokens.challenge = challenge
    with pytest.raises(BackendDenied):
        await read(backend)


async def test_token_that_is_never_accepted_is_denied_soon(
    backend: RegistryBackend, tokens: TokenServer
) -> None:
    tokens.origin.always[BLOB_PATH] = lambda x: x.answer(401, WWW_Authenticate=tokens.challenge)
    with pytest.raises(BackendDenied, match="401"):
        await read(backend)
    assert len(tokens.given) <= 2


async def test_authorization_does_not_follow_a_redirect_to_another_host(
    backend: RegistryBackend, tokens: TokenServer
) -> None:
    other = tokens.origin.url.replace("127.0.0.1", "localhost")
    tokens.origin.objects["/cdn"] = BODY
    honest = tokens.blob

    def redirect(x: Exchange) -> None:
        if x.headers.get("Authorization"):
            x.answer(307, Location=f"{other}/cdn")
        else:
            honest(x)

    tokens.origin.always[BLOB_PATH] = redirect
    for _ in range(2):
        assert await read(backend) == BODY[:100]
    at_cdn = [h for _, p, h in tokens.origin.seen if p == "/cdn"]
    assert len(at_cdn) == 2
    assert all("Authorization" not in h for h in at_cdn)


async def test_challenge_from_behind_a_redirect_is_none_of_ours(origin: Origin) -> None:
    other = origin.url.replace("127.0.0.1", "localhost")
    origin.always[BLOB_PATH] = lambda x: x.answer(307, Location=f"{other}/cdn")
    origin.always["/cdn"] = lambda x: x.answer(401, WWW_Authenticate=f'Bearer realm="{other}/token"')
    backend = registry_backend(origin.host, "app", settings(origin.host, username="u", password="p"))
    with pytest.raises(BackendDenied):
        await read(backend)
    await backend.aclose()
    assert not [p for _, p, _ in origin.seen if p.startswith("/token")]


async def test_password_does_not_go_over_plain_http_to_a_foreign_realm(
    origin: Origin, tokens: TokenServer
) -> None:
    tokens.challenge = 'Bearer realm="http://auth.example/token"'
    backend = registry_backend(origin.host, "app", settings(origin.host, username="u", password="p"))
    with pytest.raises(BackendDenied, match="without TLS"):
        await read(backend)
    await backend.aclose()


@pytest.mark.parametrize(
    ("header", "challenges"),
    [
        ('Basic realm="x"', [("basic", {"realm": "x"})]),
        (
            'Basic realm="a", Bearer realm="b",service=c',
            [("basic", {"realm": "a"}), ("bearer", {"realm": "b", "service": "c"})],
        ),
        ('BEARER  Realm = "a\\"b" , scope="x y,z"', [("bearer", {"realm": 'a"b', "scope": "x y,z"})]),
        ("Negotiate", [("negotiate", {})]),
        ("", []),
        ("???", []),
    ],
)
def test_challenges_are_parsed(header: str, challenges: list[tuple[str, dict[str, str]]]) -> None:
    assert parse_challenges(header) == [Challenge(*c) for c in challenges]


# --- credentials ---


def docker_config(directory: Path, **content: object) -> Path:
    (directory / "config.json").write_text(json.dumps(content))
    return directory


async def find(host: str, docker: Path) -> tuple[str, str] | None:
    found = await credentials.find_credentials(host, RegistrySettings(), settings(docker=docker))
    return (found.username, found.password) if found else None


@pytest.mark.parametrize("key", ["h:5000", "https://h:5000", "http://h:5000/v1/"])
async def test_credentials_are_found_under_all_spellings(tmp_path: Path, key: str) -> None:
    entry = {"auth": base64.b64encode(b"u:p:q").decode()}
    docker = docker_config(tmp_path, auths={"other": {"auth": "eDp5"}, key: entry})
    assert await find("h:5000", docker) == ("u", "p:q")
    assert await find("g:5000", docker) is None


async def test_docker_hub_has_its_own_key(tmp_path: Path) -> None:
    docker = docker_config(
        tmp_path, auths={"https://index.docker.io/v1/": {"username": "u", "password": "p"}}
    )
    assert await find("docker.io", docker) == ("u", "p")


@pytest.mark.parametrize(
    "content", ['{"auths": 3}', "{", '{"auths": {"h": {"auth": "!"}}}', '{"auths": {"h": {"auth": "eA=="}}}']
)
async def test_broken_config_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        await find("h", tmp_path)


async def test_environment_says_where_the_config_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docker_config(tmp_path, auths={"h": {"username": "u", "password": "p"}})
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    found = await credentials.find_credentials("h", RegistrySettings(), SourceSettings())
    assert found == credentials.Credentials("u", "p")
    assert "p'" not in repr(found)


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A credential helper named ``docker-credential-fake``, to be written."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    monkeypatch.setenv("PATH", f"{bin_}:{os.environ['PATH']}")
    return bin_ / "docker-credential-fake"


def write_helper(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize("how", [{"credHelpers": {"h": "fake"}}, {"credsStore": "fake", "auths": {"h": {}}}])
async def test_helper_is_asked_for_the_host(tmp_path: Path, helper: Path, how: dict[str, object]) -> None:
    write_helper(helper, 'read h; echo "{\\"Username\\": \\"$1\\", \\"Secret\\": \\"for $h\\"}"')
    assert await find("h", docker_config(tmp_path, **how)) == ("get", "for h")


async def test_helper_without_an_entry_is_no_error(tmp_path: Path, helper: Path) -> None:
    write_helper(helper, "echo credentials not found in native keychain; exit 1")
    config = {"credsStore": "fake", "auths": {"h": {"username": "u", "password": "p"}}}
    assert await find("h", docker_config(tmp_path, **config)) == ("u", "p")


async def test_helper_that_hangs_is_killed_and_temporary(
    tmp_path: Path, helper: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_helper(helper, f"echo $$ > {tmp_path}/pid; exec sleep 60")
    monkeypatch.setattr(credentials, "HELPER_TIMEOUT_S", 0.2)
    with pytest.raises(BackendTemporary, match="docker-credential-fake"):
        await find("h", docker_config(tmp_path, credsStore="fake"))
    pid = int((tmp_path / "pid").read_text())
    await asyncio.to_thread(wait_until, lambda: not Path(f"/proc/{pid}").exists(), "end of the helper")


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("echo oops; exit 3", BackendDenied),
        ("echo not json", BackendDenied),
        ("exec 0<&-; cat /dev/null; exit 1", BackendDenied),
    ],
)
async def test_helper_that_fails_is_named(
    tmp_path: Path, helper: Path, script: str, error: type[Exception]
) -> None:
    write_helper(helper, script)
    with pytest.raises(error, match="docker-credential-fake"):
        await find("h", docker_config(tmp_path, credsStore="fake"))


async def test_helper_that_is_not_there_or_not_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendDenied, match="docker-credential-nowhere"):
        await find("h", docker_config(tmp_path, credHelpers={"h": "nowhere"}))
    with pytest.raises(ConfigError, match="helper"):
        await find("h", docker_config(tmp_path, credHelpers={"h": "../../bin/sh"}))


# --- manifests ---


def manifest_lie(body: bytes, **headers: str) -> Lie:
    return lambda x: x.answer(200, body, **{"Content_Type": MANIFEST_TYPE, **headers})


async def test_manifest_whose_digest_header_lies_is_refused(backend: RegistryBackend, origin: Origin) -> None:
    origin.always["/v2/app/manifests/t"] = manifest_lie(b"{}", Docker_Content_Digest="sha256:" + "0" * 64)
    with pytest.raises(BlobCorrupt, match="digest"):
        await backend.fetch_document("t")
    origin.always["/v2/app/manifests/t"] = manifest_lie(b"{}", Docker_Content_Digest="md5:0")
    with pytest.raises(BlobCorrupt, match="not a digest"):
        await backend.fetch_document("t")


async def test_manifest_by_digest_must_have_it(backend: RegistryBackend, origin: Origin) -> None:
    wanted = "sha256:" + hashlib.sha256(b"{ }").hexdigest()
    # The header that agrees with the question proves nothing.
    origin.always[f"/v2/app/manifests/{wanted}"] = manifest_lie(b"{}", Docker_Content_Digest=wanted)
    with pytest.raises(BlobCorrupt, match="digest"):
        await backend.fetch_document(wanted)


async def test_huge_manifest_is_refused_without_reading_it_all(
    backend: RegistryBackend, origin: Origin
) -> None:
    def announced(x: Exchange) -> None:
        x.head(200, 1 << 40, Content_Type=MANIFEST_TYPE)
        x.close()

    def endless(x: Exchange) -> None:
        x.head(200, None, Content_Type=MANIFEST_TYPE, Connection="close")
        while True:
            x.handler.wfile.write(b" " * (1 << 16))

    for lie in (announced, endless, manifest_lie(b" " * (5 << 20))):
        origin.always["/v2/app/manifests/t"] = lie
        with pytest.raises(UnsupportedImage, match="manifest"):
            await backend.fetch_document("t")
    assert backend.transferred_bytes < 2 * INDEX_MAX + (6 << 20)


async def test_manifest_that_is_not_there_is_not_found(backend: RegistryBackend, origin: Origin) -> None:
    error = {"errors": [{"code": "MANIFEST_UNKNOWN", "message": "manifest unknown"}]}
    origin.always["/v2/app/manifests/t"] = gives(json.dumps(error).encode(), 404)
    with pytest.raises(BlobNotFound, match=r"app:t: .*404: manifest unknown"):
        await backend.fetch_document("t")


async def test_web_page_is_no_manifest(backend: RegistryBackend, origin: Origin) -> None:
    origin.always["/v2/app/manifests/t"] = manifest_lie(b"<html>", Content_Type="text/html")
    with pytest.raises(BackendTemporary, match="web page"):
        await backend.fetch_document("t")
