"""Images of Debian packages, there and back again: ordinary image, RAFS, mounted tree, ordinary image.

What they should be is what GNU tar makes of their layers; what they are is what the kernel says of the
mounted tree, and what GNU tar makes of the layer that comes back.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.build.apart import run_apart
from tests.build.debian import (
    Image,
    layer_tar,
    links_between_layers,
    make_awkward,
    make_changes,
    package_parts,
    part_of,
    unpack,
)
from tests.build.ordinary import Layout, erofsd
from tests.build.packed import link_groups_of
from tests.daemon.conftest import BASE, Daemon
from tests.images.sourcetree import Description, describe_directory
from tests.registry import RegistryServer, need
from tests.relay import relay

MB = 10**6
#: Bytes of content, and layers of packages.
SIZES = {"30 MB": (30 * MB, 3), "200 MB": (200 * MB, 4), "1 GB": (1000 * MB, 5)}
MEMORY_MAX = 400 << 20  # of a conversion; promised up to 400,000 entries


@dataclass
class Tree:
    """All but the root of a directory, which containerd makes itself; and which names are one file."""

    entries: dict[bytes, Description]
    links: object

    @classmethod
    def of(cls, top: Path) -> Tree:
        entries = describe_directory(top)
        del entries[b"/"]
        return cls(entries, link_groups_of(top))


@dataclass
class Debian:
    """An ordinary image, and what was converted from it.

    Attributes:
        layout: Has it as ``source``, and as ``changed`` with another line in a file of its top layer.
        tree: What the kernel says of what GNU tar makes of it.
        stored_size: Bytes of all layers.
        converted: In a registry.
        memory: Peak resident bytes of the conversion.
    """

    layout: Layout
    tree: Tree
    stored_size: int
    converted: str
    outcome: dict[str, Any]
    memory: int


@pytest.fixture(scope="module")
def image(request: pytest.FixtureRequest, registry: RegistryServer) -> Iterator[Debian]:
    """The image of a size in SIZES."""
    if os.geteuid():
        pytest.skip("making and unpacking devices needs root")
    for program in ("tar", "gzip", "zstd"):
        need(program)
    directory = Path(tempfile.mkdtemp(prefix="erofsd-test-", dir=BASE))
    try:
        layout, stored_size = make_layout(directory, *SIZES[request.param], huge=request.param == "30 MB")
        unpack(layout.path, layout.manifest("source"), directory / "reference")
        tree = Tree.of(directory / "reference")
        converted = f"{registry.host}/debian/{request.param.replace(' ', '-').lower()}:lazy"
        outcome, memory = convert_apart(layout.ref("source"), converted)
        yield Debian(layout, tree, stored_size, converted, outcome, memory)
    finally:
        shutil.rmtree(directory)


def make_layout(directory: Path, size: int, count: int, *, huge: bool) -> tuple[Layout, int]:
    """Layers of packages with what is awkward in the lowest, and a layer of changes on top of them."""
    layout = Layout(directory / "layout")
    image = Image(layout)
    make_awkward(directory / "awkward", huge=huge)
    parts = package_parts(size, count, _made(directory / "downloads"))
    assert sum(part.size for part in parts) >= size * 9 // 10
    for n, part in enumerate(parts):
        more = [part_of(directory / "awkward")] if n == 0 else []
        image.add(layer_tar([part, *more], directory), zstd=n == 1)
    below = Image(layout, list(image.layers), list(image.diff_ids))
    for tag, each, line in (("source", image, "option = old"), ("changed", below, "option = new")):
        make_changes(directory / tag, line)
        front = links_between_layers(directory / "awkward")
        each.add(layer_tar([part_of(directory / tag)], directory, front))
        each.tag(tag)
    return layout, image.stored_size


def _made(path: Path) -> Path:
    path.mkdir()
    return path


def convert_apart(*argv: object) -> tuple[dict[str, Any], int]:
    """Run ``erofsd convert`` as a program; what it says, and its peak of resident bytes."""
    said, memory = run_apart("convert", "--json", *argv)
    return json.loads(said), memory


def assert_same(top: Path, wanted: Tree) -> None:
    """*top* is the same; says which entries differ, not all that there are."""
    found = Tree.of(top)
    ours, theirs = found.entries, wanted.entries
    assert (sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())) == ([], [])
    wrong = [(path, ours[path], theirs[path]) for path in ours if ours[path] != theirs[path]]
    assert not wrong, f"{len(wrong)} differ, first: {wrong[0]}"
    assert found.links == wanted.links


@pytest.mark.timeout(300)
@pytest.mark.parametrize("image", list(SIZES), indirect=True)
def test_debian_image_survives_the_way_there_and_back(image: Debian, daemon: Daemon) -> None:
    assert image.outcome["checked"]
    assert image.outcome["warnings"] == []
    assert image.memory < MEMORY_MAX
    mounted = daemon.mount(image.converted)
    assert_same(mounted, image.tree)
    erofsd("check", image.converted, "--against", mounted)
    assert daemon.ls(mounted)["state"] == "complete"
    assert daemon.ls(mounted)["errors"] == 0
    back = daemon.directory / "back"
    options = ["--no-check"] if image.stored_size > 200 * MB else []  # GNU tar does that here
    outcome, memory = convert_apart("--to", "oci", image.converted, f"oci:{back}:plain", *options)
    assert outcome["warnings"] == []
    assert memory < MEMORY_MAX
    reader = Layout.__new__(Layout)
    reader.path = back
    unpack(back, reader.manifest("plain"), daemon.directory / "unpacked")
    assert_same(daemon.directory / "unpacked", image.tree)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("image", ["1 GB"], indirect=True)
def test_changed_line_sends_less_than_a_hundredth_of_the_image(
    image: Debian, registry: RegistryServer, daemon: Daemon
) -> None:
    with relay(registry.port) as wire:
        changed = f"{wire.host}/debian/changed:lazy"
        dictionary = image.converted.replace(registry.host, wire.host)
        outcome, _ = convert_apart(image.layout.ref("changed"), changed, "--chunk-dict", dictionary)
        assert wire.received < image.stored_size // 100
        assert 0 < outcome["uploaded_bytes"] < wire.received
    assert outcome["checked"]
    mounted = daemon.mount(f"{registry.host}/debian/changed:lazy")
    changed_lines = (mounted / "odd/new/settings").read_text().splitlines()
    assert [line for line in changed_lines if not line.startswith("option_")] == ["option = new"]
