"""A registry that drops an upload half way: nothing is published, and a rerun sends only what is missing."""

from __future__ import annotations

import random
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.build import tars
from tests.build.ordinary import Layout, convert, erofsd, tree_tar
from tests.registry import RegistryServer
from tests.relay import Relay, relay

LAYERS = 6
LAYER_SIZE = 1_500_000  # of what does not compress
#: More than the three uploads at a time can hold, less than all.
CUT_AT = LAYER_SIZE * 4
OVERHEAD = 100_000  # bootstrap, config, manifest, requests


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """Six layers that are all as large."""
    made = Layout(tmp_path / "source")
    contents = [random.Random(n).randbytes(LAYER_SIZE) for n in range(LAYERS)]
    made.image("source", *(tree_tar(tars.file(b"%d" % n, data)) for n, data in enumerate(contents)))
    return made


@pytest.fixture
def wire(registry: RegistryServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Relay]:
    """The way to the registry, which nobody waits for when it is cut."""
    for module in ("push", "retry"):
        monkeypatch.setattr(f"erofsd.backends.{module}.pause_s", lambda *args: 0.0)
    with relay(registry.port) as made:
        yield made


def get(registry: RegistryServer, path: str) -> bytes | None:
    """What the registry itself has there."""
    try:
        with urllib.request.urlopen(f"{registry.url}/v2/{path}") as reply:
            return bytes(reply.read())
    except urllib.error.HTTPError as exc:
        if exc.code == 404:
            return None
        raise


def test_upload_that_is_dropped_publishes_nothing_and_a_rerun_sends_the_rest(
    layout: Layout, registry: RegistryServer, wire: Relay, tmp_path: Path
) -> None:
    repository, work = "convert/dropped", tmp_path / "work"
    command = (layout.ref("source"), f"{wire.host}/{repository}:lazy", "--work-dir", work)
    wire.cut_at = CUT_AT
    done = erofsd("convert", *command, check=False)
    assert done.returncode == 5
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "sha256:" in done.stderr
    assert wire.host in done.stderr
    assert get(registry, f"{repository}/tags/list") is None
    assert list((work / "uploads").iterdir())
    blobs = {path.name: path.stat().st_size for path in (work / "blobs").iterdir()}
    missing = {name for name in blobs if get(registry, f"{repository}/blobs/sha256:{name}") is None}
    assert len(blobs) == LAYERS
    assert 0 < len(missing) < LAYERS
    sent, wire.cut_at = wire.received, None
    outcome = convert(*command)
    assert outcome["layers_reused"] == LAYERS
    assert wire.received - sent < sum(blobs[name] for name in missing) + OVERHEAD
    assert outcome["uploaded_bytes"] < wire.received - sent
    assert not list((work / "uploads").iterdir())
    erofsd("check", f"{registry.host}/{repository}:lazy", "--against", layout.ref("source"))


@pytest.mark.parametrize("options", [("--to", "oci"), ("--format", "erofs")], ids=" ".join)
def test_images_of_one_layer_are_pushed_as_carefully(
    layout: Layout, registry: RegistryServer, wire: Relay, tmp_path: Path, options: tuple[str, ...]
) -> None:
    source = layout.ref("source")
    if options == ("--to", "oci"):
        convert(source, f"oci:{tmp_path}/lazy:x")
        source = f"oci:{tmp_path}/lazy:x"
    repository = f"convert/dropped-{options[1]}"
    command = (*options, source, f"{wire.host}/{repository}:x", "--work-dir", tmp_path / "work")
    wire.cut_at = CUT_AT
    done = erofsd("convert", *command, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (5, 1), done.stderr
    assert get(registry, f"{repository}/tags/list") is None
    wire.cut_at = None
    convert(*command)
    found = f"{registry.host}/{repository}:x"
    if options == ("--to", "oci"):
        convert(found, f"oci:{tmp_path}/again:x")
        found = f"oci:{tmp_path}/again:x"
    erofsd("check", found, "--against", layout.ref("source"))
