"""Sources that lie: the reader gets EIO within the deadline, never data; then the source recovers."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import rafs
from tests.daemon.conftest import Daemon
from tests.registry import Exchange, Origin

DEADLINE_S = 4.0

LIES: dict[str, Callable[[Exchange], None]] = {
    "flipped bit": lambda exchange: exchange.honest(flip=200),
    "truncated": lambda exchange: exchange.honest(cut=100),
    "html": lambda exchange: exchange.answer(200, b"<html>login here</html>", Content_Type="text/html"),
    "404": lambda exchange: exchange.answer(404, b"gone"),
    "401": lambda exchange: exchange.answer(401, b"who are you"),
    "500": lambda exchange: exchange.answer(500, b"oops"),
    "reset": lambda exchange: exchange.reset(),
    "hang": lambda exchange: exchange.hang(),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_an_error_in_time_and_its_end_the_end_of_it(
    make_daemon: Callable[..., Daemon], tmp_path: Path, origin: Origin, lie: str
) -> None:
    daemon = make_daemon(deadline=DEADLINE_S)
    files = {"a": bytes(range(256)) * 2000, "b": b"unharmed" * 1000}
    image = rafs.make_image(files, shared=["b"])
    boot = rafs.write_files(image, tmp_path)
    for blob_id, data in image.blobs.items():
        origin.objects[f"/{blob_id}"] = data
    mounted = daemon.mount(f"file:{boot}", "--blobs", origin.url)
    victim = next(b for b, data in image.blobs.items() if data != image.blobs[list(image.blobs)[1]])
    origin.always[f"/{victim}"] = LIES[lie]
    started = time.monotonic()
    with pytest.raises(OSError) as caught:
        (mounted / "a").read_bytes()
    elapsed_s = time.monotonic() - started
    assert caught.value.errno == errno.EIO
    assert elapsed_s < DEADLINE_S
    assert (mounted / "b").read_bytes() == files["b"]
    status = daemon.ls(mounted)
    assert status["errors"] >= 1
    for what in (victim, origin.url):
        assert what in status["last_error"], status["last_error"]
        assert what in daemon.log()
    del origin.always[f"/{victim}"]
    assert (mounted / "a").read_bytes() == files["a"]
    assert daemon.ls(mounted)["state"] == "complete"


def test_a_plain_image_that_changes_at_its_source_is_refused(
    make_daemon: Callable[..., Daemon], tmp_path: Path, origin: Origin
) -> None:
    import random
    import subprocess

    from tests.registry import need

    daemon = make_daemon(deadline=DEADLINE_S)
    source = tmp_path / "source"
    source.mkdir()
    content = random.Random(1).randbytes(8 << 20)
    (source / "big").write_bytes(content)
    path = tmp_path / "x.erofs"
    subprocess.run([need("mkfs.erofs"), "--quiet", path, source], check=True, capture_output=True)
    origin.objects["/x.erofs"] = path.read_bytes()
    origin.etags["/x.erofs"] = '"one"'
    mounted = daemon.mount(f"{origin.url}/x.erofs")
    with open(mounted / "big", "rb") as file:
        assert file.read(4096) == content[:4096]
        origin.etags["/x.erofs"] = '"two"'
        file.seek(7 << 20)
        with pytest.raises(OSError) as caught:
            file.read(4096)
        assert caught.value.errno == errno.EIO
        assert "changed" in daemon.ls(mounted)["last_error"]
        origin.etags["/x.erofs"] = '"one"'
        file.seek(7 << 20)
        assert file.read(4096) == content[7 << 20 :][:4096]
