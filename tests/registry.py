"""Real sources for tests: docker-registry and nginx; and an HTTP origin that lies as it is told to."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import trustme

USERNAME, PASSWORD = "tester", "opensesame"
# bcrypt, the only kind that docker-registry takes, of PASSWORD.
HTPASSWD = "tester:$2b$04$c8diO8.PwkaDF3AW025eXeYmJMmEyl8GFXZnmQFF0bl6XUMXU8sUK\n"
START_TIMEOUT_S = 20.0


def need(program: str) -> str:
    """The path of *program*; the test is skipped where there is none."""
    path = shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")
    if path is None:
        pytest.skip(f"no {program} here")
    return path


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float = START_TIMEOUT_S) -> Any:
    """The first true value of *condition*."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {timeout_s:g} s")
        time.sleep(0.01)
    return value


class RegistryServer:
    """A docker-registry on a loopback port of its own; what it stores outlives `stop`.

    Args:
        password: Ask for USERNAME and PASSWORD.
        tls: Certificates of 127.0.0.1 and localhost; the CA is in `ca`.
    """

    def __init__(self, directory: Path, *, password: bool = False, tls: bool = False) -> None:
        self.directory = directory
        self.password = password
        self.port = 0
        self.ca: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        directory.mkdir(parents=True, exist_ok=True)
        if tls:
            self.ca = directory / "ca.pem"
            authority = trustme.CA()
            authority.cert_pem.write_to_path(str(self.ca))
            certificate = authority.issue_cert("127.0.0.1", "localhost")
            certificate.private_key_pem.write_to_path(str(directory / "key.pem"))
            for n, pem in enumerate(certificate.cert_chain_pems):
                pem.write_to_path(str(directory / "cert.pem"), append=n > 0)

    @property
    def host(self) -> str:
        """``127.0.0.1:port``, as in references."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """Without a slash at the end."""
        return f"{'https' if self.ca else 'http'}://{self.host}"

    def start(self) -> RegistryServer:
        """Start, on the port it had before if it had one; return when it answers."""
        log = self.directory / "log"
        config = self.directory / "config.yml"
        config.write_text(json.dumps(self._config()))
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                [need("docker-registry"), "serve", str(config)], stdout=out, stderr=subprocess.STDOUT
            )
        match = wait_until(lambda: self._listening(log), "docker-registry")
        self.port = int(match[1])
        return self

    def stop(self) -> None:
        """Kill it; connections are reset."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def push_layout(self, layout: Path, tag: str, repository: str, as_tag: str | None = None) -> str:
        """Upload the image *tag* of an OCI layout verbatim, indexes with all their manifests.

        Returns:
            Its reference, without ``docker://``.
        """
        index = json.loads((layout / "index.json").read_bytes())
        descriptor = next(
            d
            for d in index["manifests"]
            if d.get("annotations", {}).get("org.opencontainers.image.ref.name") == tag
        )
        self._push_document(layout, descriptor, repository, as_tag or tag)
        return f"{self.host}/{repository}:{as_tag or tag}"

    def push_blob(self, repository: str, body: bytes) -> str:
        """Upload *body*; returns its digest."""
        digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
        location = self._request("POST", f"{self.url}/v2/{repository}/blobs/uploads/").headers["Location"]
        join = "&" if urlsplit(location).query else "?"
        octets = {"Content-Type": "application/octet-stream"}
        self._request("PUT", f"{location}{join}digest={digest}", body, octets)
        return digest

    def push_manifest(self, repository: str, tag: str, body: bytes, media_type: str) -> str:
        """Upload *body* as it is; returns the reference, without ``docker://``."""
        url = f"{self.url}/v2/{repository}/manifests/{tag}"
        self._request("PUT", url, body, {"Content-Type": media_type})
        return f"{self.host}/{repository}:{tag}"

    def _push_document(self, layout: Path, descriptor: dict[str, Any], repository: str, tag: str) -> None:
        body = _blob(layout, descriptor["digest"])
        document = json.loads(body)
        for inner in document.get("manifests", []):
            self._push_document(layout, inner, repository, inner["digest"])
        for blob in (document.get("config"), *document.get("layers", [])):
            if blob is not None:
                self.push_blob(repository, _blob(layout, blob["digest"]))
        self.push_manifest(repository, tag, body, descriptor["mediaType"])

    def _request(
        self, method: str, url: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> Any:
        request = urllib.request.Request(url, data=body, method=method, headers=headers or {})
        if self.password:
            secret = base64.b64encode(f"{USERNAME}:{PASSWORD}".encode()).decode()
            request.add_header("Authorization", f"Basic {secret}")
        context = ssl.create_default_context(cafile=str(self.ca)) if self.ca else None
        with urllib.request.urlopen(request, context=context) as response:
            return response

    def _listening(self, log: Path) -> re.Match[str] | None:
        text = log.read_text(errors="replace")
        if self._process is not None and self._process.poll() is not None:
            raise RuntimeError(f"docker-registry ended: {text[-2000:]}")
        return re.search(r"listening on 127\.0\.0\.1:(\d+)", text)

    def _config(self) -> dict[str, Any]:
        http: dict[str, Any] = {"addr": f"127.0.0.1:{self.port}"}
        if self.ca:
            http["tls"] = {
                "certificate": str(self.directory / "cert.pem"),
                "key": str(self.directory / "key.pem"),
            }
        config: dict[str, Any] = {
            "version": 0.1,
            "log": {"level": "info"},
            "storage": {"filesystem": {"rootdirectory": str(self.directory / "store")}},
            "http": http,
        }
        if self.password:
            (self.directory / "htpasswd").write_text(HTPASSWD)
            config["auth"] = {"htpasswd": {"realm": "test", "path": str(self.directory / "htpasswd")}}
        return config


def _blob(layout: Path, digest: str) -> bytes:
    algorithm, _, name = digest.partition(":")
    return (layout / "blobs" / algorithm / name).read_bytes()


@contextmanager
def nginx(directory: Path, root: Path) -> Iterator[str]:
    """An nginx that serves *root*; yields its URL, without a slash at the end."""
    directory.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = directory / "nginx.conf"
    temporary = "".join(
        f"{kind}_temp_path {directory}/tmp;\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config.write_text(
        f"daemon off; master_process off; worker_processes 1; pid {directory}/pid;\n"
        f"error_log {directory}/error.log;\n"
        "events { worker_connections 256; }\n"
        f"http {{ access_log off; sendfile on; keepalive_requests 100000; {temporary}\n"
        f"server {{ listen 127.0.0.1:{port}; root {root}; }} }}\n"
    )
    process = subprocess.Popen(
        [need("nginx"), "-p", str(directory), "-e", str(directory / "error.log"), "-c", str(config)],
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: _connects(port), "nginx")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _connects(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


# --- an origin that lies ---


@dataclass
class Exchange:
    """One request and the means to answer it in any way at all."""

    handler: BaseHTTPRequestHandler
    origin: Origin
    path: str

    @property
    def headers(self) -> Any:
        """Of the request."""
        return self.handler.headers

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        """A complete answer; underscores in header names stand for dashes."""
        self.head(status, len(body), **headers)
        if self.handler.command != "HEAD":
            self.handler.wfile.write(body)

    def head(self, status: int, length: int | None, **headers: str) -> None:
        """Status line and headers only."""
        self.handler.send_response(status)
        for name, value in headers.items():
            self.handler.send_header(name.replace("_", "-"), value)
        if length is not None:
            self.handler.send_header("Content-Length", str(length))
        self.handler.end_headers()

    def body(self) -> bytes:
        """What is stored under the path."""
        return self.origin.objects[self.path]

    def wanted(self) -> tuple[int, int] | None:
        """The half-open range that was asked for."""
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        return (int(match[1]), int(match[2]) + 1) if match else None

    def honest(self, cut: int | None = None, flip: int | None = None) -> None:
        """The right answer, or the right headers with a body that ends after *cut* bytes or has a bad one."""
        body = self.body()
        want = self.wanted()
        extra = {"ETag": self.origin.etags[self.path]} if self.path in self.origin.etags else {}
        if want is None:
            status, part = 200, body
        elif want[0] >= len(body):
            self.answer(416, Content_Range=f"bytes */{len(body)}")
            return
        else:
            status, part = 206, body[want[0] : want[1]]
            extra["Content_Range"] = f"bytes {want[0]}-{want[0] + len(part) - 1}/{len(body)}"
        self.head(status, len(part), Content_Type="application/octet-stream", **extra)
        if flip is not None:
            part = part[:flip] + bytes([part[flip] ^ 1]) + part[flip + 1 :]
        if self.handler.command != "HEAD":
            self.handler.wfile.write(part if cut is None else part[:cut])

    def reset(self) -> None:
        """Break the connection with an RST."""
        linger = (1).to_bytes(4, "little") + (0).to_bytes(4, "little")
        self.handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close()

    def close(self) -> None:
        """Break the connection."""
        self.handler.close_connection = True
        self.handler.wfile.flush()
        self.handler.connection.close()

    def hang(self) -> None:
        """Say nothing more until the test is over."""
        self.handler.wfile.flush()
        self.origin.over.wait(60)
        self.handler.close_connection = True


Lie = Callable[[Exchange], None]


@dataclass
class Origin:
    """An HTTP server in a thread, for objects by path; what it does instead is in *lies* and *always*.

    Attributes:
        lies: For each path the next answers, one a request; when there are none left it is honest.
        always: For each path what is answered when there are no lies.
        seen: Method, path, and headers of every request.
    """

    objects: dict[str, bytes] = field(default_factory=dict)
    etags: dict[str, str] = field(default_factory=dict)
    lies: dict[str, list[Lie]] = field(default_factory=dict)
    always: dict[str, Lie] = field(default_factory=dict)
    seen: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    @property
    def host(self) -> str:
        """``127.0.0.1:port``."""
        return urlsplit(self.url).netloc

    def lie(self, path: str, *lies: Lie) -> None:
        """Answer the next requests for *path* with *lies*."""
        self.lies.setdefault(path, []).extend(lies)

    def serve(self, exchange: Exchange) -> None:
        """Answer one request."""
        if lies := self.lies.get(exchange.path):
            lies.pop(0)(exchange)
        elif exchange.path in self.always:
            self.always[exchange.path](exchange)
        elif exchange.path in self.objects:
            exchange.honest()
        else:
            exchange.answer(404, b"no such thing", Content_Type="text/plain")


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that break off are what these tests are about


@contextmanager
def lying_origin() -> Iterator[Origin]:
    """An Origin on a loopback port of its own."""
    origin = Origin()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            self.request_body = self.rfile.read(length)
            origin.seen.append((self.command, self.path, dict(self.headers)))
            try:
                origin.serve(Exchange(self, origin, urlsplit(self.path).path))
            except (BrokenPipeError, ConnectionResetError, ValueError, OSError):
                self.close_connection = True

        do_HEAD = do_POST = do_PUT = do_GET

        def finish(self) -> None:
            try:
                super().finish()
            except (OSError, ValueError):
                pass  # the lie closed it

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = _QuietServer(("127.0.0.1", 0), Handler)
    origin.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield origin
    finally:
        origin.over.set()
        server.shutdown()
        server.server_close()
