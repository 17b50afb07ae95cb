from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erofsd.build.layers import Layer, LayerEntry, merge
from erofsd.build.source import make_node
from erofsd.build.tarstream import TarSource
from erofsd.errors import CorruptImage
from erofsd.images.tree import Node, walk
from tests.build.applier import Item, Refused, apply
from tests.build.packed import Image, link_groups, link_groups_of
from tests.build.tars import END, file, header, pax

NAMES = ("a", "b", "c")
TARGETS = ("a", "b/c", "../a", "/c", "/a/b", "../../b", ".", "a/../c", "../../../a", "/../b", "")


def entry(item: Item) -> LayerEntry:
    """What a source makes of a tar header."""
    path = os.path.normpath("/" + item.path).encode()[1:]
    is_link = item.type == "link"
    node = make_node(
        "reg" if is_link else item.type, item.mode, 0, 0, item.mtime,
        target=item.data.encode() if item.type == "lnk" else b"",
        xattrs={key.encode(): value for key, value in item.xattrs.items()},
    )  # fmt: skip
    node.inline = item.data.encode() if item.type == "reg" else None
    return LayerEntry(path, node, os.path.normpath("/" + item.data).encode()[1:] if is_link else None)


def merged(layers: list[list[Item]], warnings: list[str] | None = None) -> Node:
    said = [] if warnings is None else warnings
    made = [
        Layer(f"layer {i}", [entry(item) for item in items], whiteouts=True) for i, items in enumerate(layers)
    ]
    return merge(made, warn=said.append)


def describe_nodes(root: Node) -> Iterator[tuple[bytes, object]]:
    for path, node in walk(root):
        if path:
            mode = 0o777 if node.type == "lnk" else node.mode
            content = node.target if node.type == "lnk" else node.inline or b""
            made_up = node.type == "dir" and not node.mtime  # a parent that no entry stated
            yield path, (node.type, mode, content, None if made_up else node.mtime, dict(node.xattrs))


def describe_path(path: Path) -> object:
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        return ("lnk", 0o777, os.fsencode(os.readlink(path)), status.st_mtime_ns, {})
    kind = {stat.S_IFREG: "reg", stat.S_IFDIR: "dir", stat.S_IFIFO: "fifo"}[stat.S_IFMT(status.st_mode)]
    xattrs = {os.fsencode(name): os.getxattr(path, name) for name in os.listxattr(path)}
    content = path.read_bytes() if kind == "reg" else b""
    return (kind, stat.S_IMODE(status.st_mode), content, status.st_mtime_ns, xattrs)


def paths() -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(NAMES), min_size=1, max_size=4).map("/".join)


@st.composite
def items(draw: st.DrawFn) -> Item:
    path = draw(paths())
    kind = draw(st.sampled_from(["reg", "reg", "dir", "dir", "lnk", "link", "fifo", "whiteout", "opaque"]))
    mtime = draw(st.integers(1, 9)) * 10**9
    mode = draw(st.sampled_from([0o644, 0o755, 0o4711, 0o700]))
    xattrs = draw(st.sampled_from([{}, {}, {"user.a": b"1"}, {"user.b": b"2\n"}]))
    match kind:
        case "whiteout":
            head, _, tail = path.rpartition("/")
            return Item(f"{head}/.wh.{tail}")
        case "opaque":
            return Item(f"{path}/.wh..wh..opq")
        case "lnk":
            return Item(path, "lnk", draw(st.sampled_from([t for t in TARGETS if t])), mtime=mtime)
        case "link":
            return Item(path, "link", draw(paths()), mode, mtime)
        case "fifo":
            return Item(path, "fifo", mode=mode, mtime=mtime)
        case "dir":
            return Item(path, "dir", mode=mode, mtime=mtime, xattrs=xattrs)
        case _:
            return Item(path, "reg", draw(st.sampled_from(["", "x", "yy"])), mode, mtime, xattrs)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(items(), min_size=1, max_size=8), min_size=1, max_size=4))
def test_layers_merge_as_containerd_unpacks_them(layers: list[list[Item]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        top = Path(name, "root")
        top.mkdir()
        times: dict[Path, int] = {}
        try:
            for layer in layers:
                apply(top, layer, times)
        except Refused:
            with pytest.raises(CorruptImage):
                merged(layers)
            return
        root = merged(layers)
        found = dict(describe_nodes(root))
        wanted = {bytes(p.relative_to(top)): describe_path(p) for p in top.rglob("*")}
        for path, each in found.items():
            if each[3] is None:  # type: ignore[index]
                wanted[path] = (*wanted[path][:3], None, wanted[path][4])  # type: ignore[index]
        assert found == wanted
        assert link_groups(root) == link_groups_of(top)


def test_a_replaced_directory_loses_its_entries_and_a_repeated_one_keeps_them() -> None:
    lower = [
        Item("d", "dir", mode=0o700, xattrs={"user.a": b"1"}),
        Item("d/x"),
        Item("e", "dir"),
        Item("e/y"),
    ]
    upper = [Item("d", "dir", mode=0o711), Item("e", "reg"), Item("e", "dir")]
    root = merged([lower, upper])
    assert set(dict(walk(root))) == {b"", b"d", b"d/x", b"e"}
    assert (root.children[b"d"].mode, dict(root.children[b"d"].xattrs)) == (0o711, {})


def test_the_last_of_several_entries_wins() -> None:
    root = merged([[Item("x", data="1"), Item("x", "lnk", "y"), Item("x", data="2"), Item("x", "fifo")]])
    assert root.children[b"x"].type == "fifo"


def test_opaque_directories_keep_what_their_own_layer_brought_before_and_after() -> None:
    lower = [Item("d", "dir"), Item("d/old"), Item("d/sub", "dir"), Item("d/sub/old")]
    upper = [Item("d/before"), Item("d/sub/new"), Item("d/.wh..wh..opq"), Item("d/after")]
    assert set(dict(walk(merged([lower, upper])))) == {
        b"", b"d", b"d/before", b"d/sub", b"d/sub/new", b"d/after",
    }  # fmt: skip


def test_missing_parents_belong_to_root() -> None:
    node = dict(walk(merged([[Item("x/y/z")]])))[b"x/y"]
    assert (node.type, node.mode, node.uid, node.gid, node.mtime) == ("dir", 0o755, 0, 0, 0)


def test_hard_links_reach_into_lower_layers_and_other_directories() -> None:
    lower = [Item("d/file", data="1"), Item("d/soft", "lnk", "nowhere"), Item("pipe", "fifo")]
    upper = [Item("e/f", "link", "d/file"), Item("e/s", "link", "/d/soft"), Item("e/p", "link", "pipe")]
    root = merged([lower, upper, [Item("d/.wh.file")], [Item("g", "link", "e/f")]])
    assert link_groups(root) == {
        frozenset((b"e/f", b"g")), frozenset((b"d/soft", b"e/s")), frozenset((b"pipe", b"e/p")),
    }  # fmt: skip


@pytest.mark.parametrize("target", ["../outside", "../../outside", "/../../..", "a/../../../.."])
def test_links_among_parents_never_lead_out_of_the_root(target: str) -> None:
    layers = [[Item("d/out", "lnk", target), Item("d/out/evil", data="x")]]
    if target == "../outside" or target.startswith("/"):  # stays inside
        assert b"d/out/evil" not in dict(walk(merged(layers)))
        return
    with pytest.raises(CorruptImage, match=r"layer 0: d/out/evil: .*leads out of the root"):
        merged(layers)


@pytest.mark.parametrize(
    ("items_", "problem"),
    [
        ([Item("a", "lnk", "b"), Item("b", "lnk", "a"), Item("a/x")], "too many symbolic links"),
        ([Item("f"), Item("f/x")], "its parent 'f' is no directory"),
        ([Item("x", "link", "nowhere")], "a hard link to 'nowhere', which is not there"),
        ([Item("d", "dir"), Item("x", "link", "d")], "a hard link to 'd', which is a directory"),
        ([Item("x", "link", "/")], "which is not there"),
        ([Item("x"), Item("x", "link", "x")], "which is not there"),
        ([Item("d/.wh.")], "a whiteout of nothing"),
        ([Item("d/.wh...")], "a whiteout of nothing"),
    ],
)
def test_layers_that_do_not_fit_are_refused_with_the_entry(items_: list[Item], problem: str) -> None:
    with pytest.raises(CorruptImage, match=rf"layer 1: {items_[-1].path}: .*{problem}"):
        merged([[Item("first")], items_])


def test_a_tree_of_its_own_has_no_whiteouts_but_a_root() -> None:
    data = header(b"./", b"5", mode=0o711, uid=7) + file(b"a", b"1") + file(b".wh.a", b"2") + END
    image = Image()
    image.add_tar(data, whiteouts=False)
    root = image.merge()
    assert set(root.children) == {b"a", b".wh.a"}
    assert (root.mode, root.uid, root.mtime) == (0o711, 7, 1_600_000_000 * 10**9)
    layers = Image()
    layers.add_tar(data)
    root = layers.merge()
    assert set(root.children) == set()
    assert (root.mode, root.uid, root.mtime) == (0o755, 0, 0)


def test_what_erofs_cannot_hold_is_dropped_and_named() -> None:
    long = b"n" * 256
    data = b"".join((
        pax((b"path", long)) + file(b"short", b"1"),
        pax((b"path", long + b"/below")) + file(b"short", b"1"),
        pax((b"linkpath", long)) + header(b"hard", b"1", target=b"s"),
        pax((b"linkpath", b"t" * 4096)) + header(b"soft", b"2", target=b"s"),
        pax((b"linkpath", b"t" * 4095)) + header(b"fits", b"2", target=b"s"),
        header(b"nothing", b"2"),
        header(b"minor", b"3", device=(1, 1 << 20)),
        header(b"owner", uid=1 << 32),
        pax(
            (b"SCHILY.xattr.user.fine", b"1"), (b"SCHILY.xattr.com.apple.quarantine", b"1"),
            (b"SCHILY.xattr.user." + b"x" * 256, b"1"), (b"SCHILY.xattr.user.big", bytes(65536)),
        ) + file(b"x", b"1"),
        END,
    ))  # fmt: skip
    image = Image()
    image.add_tar(data)
    root = image.merge()
    assert set(root.children) == {b"fits", b"x"}
    assert dict(root.children[b"x"].xattrs) == {b"user.fine": b"1"}
    said = "\n".join(image.warnings)
    for name in (long.decode(), f"{long.decode()}/below", "hard", "soft", "nothing", "minor", "owner"):
        assert f": {name} is left out: " in said
    for name in ("com.apple.quarantine", "user." + "x" * 256, "user.big"):
        assert f"x: attribute {name} is left out: " in said
    assert len(image.warnings) == 10
    assert image.read(root)


def test_what_is_dropped_has_still_replaced_what_was_there() -> None:
    image = Image()
    image.add_tar(file(b"d/x", b"1") + file(b"d/y", b"2") + END)
    image.add_tar(header(b"d/x", uid=1 << 32) + header(b"z", b"1", target=b"d/x") + END)
    assert set(dict(walk(image.merge()))) == {b"", b"d", b"d/y"}


def test_content_of_whiteouts_is_not_stored() -> None:
    image = Image()
    assert image.add_tar(file(b".wh.x", b"content") + END).blob is None


def test_a_layers_blob_depends_on_nothing_but_the_layer() -> None:
    first, second = file(b"a", b"1" * 9000) + END, file(b"b", b"1" * 9000) + file(b"c", b"3" * 100) + END
    alone, together = Image(), Image()
    blob = alone.add_tar(second).blob
    together.add_tar(first)
    assert together.add_tar(second).blob == blob


def test_nydusifys_source_has_the_expected_tree(testdata: Path) -> None:
    layout = testdata / "nydusify" / "layout"

    def blob(digest: str) -> Path:
        return layout / "blobs" / "sha256" / digest.removeprefix("sha256:")

    index = json.loads((layout / "index.json").read_text())
    [digest] = [
        m["digest"] for m in index["manifests"]
        if m["annotations"]["org.opencontainers.image.ref.name"] == "source"
    ]  # fmt: skip
    image = Image()
    for layer in json.loads(blob(digest).read_text())["layers"]:
        with blob(layer["digest"]).open("rb") as packed:
            image.add(TarSource(packed, layer["digest"]), whiteouts=True)
    root = image.merge()
    assert not image.warnings
    facts = [json.loads(line) for line in (testdata / "nydusify" / "facts.jsonl").read_text().splitlines()]
    found = image.read(root)
    assert [path.decode("latin-1") for path in found] == sorted(
        (fact["path"] for fact in facts), key=lambda path: path.encode("latin-1").split(b"/")
    )
    for fact in facts:
        description = found[fact["path"].encode("latin-1")]
        target, xattrs = description["target"], description["xattrs"]
        assert isinstance(xattrs, dict)
        values = {
            **description,
            "uid": description["owner"][0],  # type: ignore[index]
            "gid": description["owner"][1],  # type: ignore[index]
            "target": target.decode("latin-1") if isinstance(target, bytes) else None,
            "xattrs": {name.decode(): value.hex() for name, value in xattrs.items()},
        }
        assert {key: values[key] for key in fact if key not in ("path", "group")} == {
            key: value for key, value in fact.items() if key not in ("path", "group")
        }
    groups: dict[str, set[bytes]] = {}
    for fact in facts:
        if "group" in fact:
            groups.setdefault(fact["group"], set()).add(fact["path"].encode("latin-1")[1:])
    assert link_groups(root) == {frozenset(group) for group in groups.values()}
