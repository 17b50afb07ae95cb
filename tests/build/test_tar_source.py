from __future__ import annotations

import base64
import gzip
import io
import os
import random
import shutil
import struct
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from erofsd.build import tarheader
from erofsd.build.acl import format_acl, parse_acl
from erofsd.build.tarheader import MalformedHeader
from erofsd.build.tarstream import TarSource
from erofsd.errors import CorruptImage, UnsupportedImage
from erofsd.images.tree import Node
from tests.build.packed import describe_entries, tar_entries
from tests.build.tars import END, file, gnu_long, header, number, pax, records
from tests.images.sourcetree import describe_directory, make_tree, without

SPARSE_SIZE = 3_000_000


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("source") / "top"
    top.mkdir()
    make_tree(top)
    (top / "sock").unlink()  # tar leaves sockets out
    deep = top / ("d" * 200) / ("e" * 200)
    deep.mkdir(parents=True)
    (deep / ("f" * 255)).write_text("far down")
    (deep / os.fsdecode(b"not \xff\xfe utf-8\nnor one line")).symlink_to("t" * 300)
    os.setxattr(deep, "user.lines and NUL", b"one\ntwo\0three=\n")
    os.setxattr(deep, "user.empty", b"")
    return top


def gnu_tar(tree: Path, *options: str) -> bytes:
    command = ["tar", "-c", "--sort=name", *options, "-C", str(tree), "."]
    return subprocess.run(command, check=True, capture_output=True).stdout


def test_gnu_tars_pax_archives_say_all_that_the_tree_has(tree: Path) -> None:
    data = gnu_tar(tree, "--format=posix", "--xattrs", "--xattrs-include=*")
    assert describe_entries(data) == without(describe_directory(tree), "nlink")


@pytest.mark.parametrize("format_", ["gnu", "oldgnu", "ustar"])
def test_gnu_tars_older_formats_say_all_that_they_can(tree: Path, tmp_path: Path, format_: str) -> None:
    def seconds(mtime: object) -> object:
        assert isinstance(mtime, int)
        return mtime // 10**9

    small = tree
    if format_ == "ustar":  # which has no room for long targets and large owners
        small = tmp_path / "small"
        shutil.copytree(tree / "many", small, symlinks=True)
    wanted = without(describe_directory(small), "nlink", "xattrs")
    found = without(describe_entries(gnu_tar(small, f"--format={format_}")), "xattrs")
    for each in (*wanted.values(), *found.values()):
        each["mtime"] = seconds(each["mtime"])
    assert found == wanted


@pytest.mark.parametrize(
    "options",
    [
        ("--format=gnu",),
        ("--format=posix", "--sparse-version=0.0"),
        ("--format=posix", "--sparse-version=0.1"),
        ("--format=posix", "--sparse-version=1.0"),
    ],
    ids=["gnu", "0.0", "0.1", "1.0"],
)
@pytest.mark.parametrize("extent_count", [0, 1, 4, 5, 30, 300])
def test_sparse_files_of_all_formats(tmp_path: Path, options: tuple[str, ...], extent_count: int) -> None:
    noise = random.Random(extent_count).randbytes(5000)
    path = tmp_path / ("holes" * 30)
    with path.open("wb") as out:
        for i in range(extent_count):
            out.seek(i * 20_000 + 4096)
            out.write(noise[: 1 + i * 13 % 5000])
        out.truncate(extent_count * 20_000 + SPARSE_SIZE)
    (tmp_path / "z").write_text("what follows")
    entries = tar_entries(gnu_tar(tmp_path, "-S", *options))
    found = {entry.path: (entry, content) for entry, content in entries}
    entry, content = found[path.name.encode()]
    assert content == path.read_bytes()
    assert entry.content
    assert entry.content.extents is not None
    assert sum(length for _, length in entry.content.extents) < 40_000 * extent_count + 1
    assert found[b"z"][1] == b"what follows"


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_pythons_archives(tree: Path, format_: int) -> None:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=format_) as archive:
        archive.add(tree / "many", "many")
        archive.add(tree / "dup", "dup")
    wanted = without(describe_directory(tree), "nlink", "xattrs", "mtime")
    found = without(describe_entries(raw.getvalue()), "xattrs", "mtime")
    assert found.items() <= wanted.items()
    assert len(found) > 400


@pytest.mark.skipif(shutil.which("bsdtar") is None, reason="no bsdtar")
@pytest.mark.parametrize("format_", ["pax", "ustar", "gnutar"])
def test_bsdtars_archives(tree: Path, format_: str) -> None:
    command = ["bsdtar", "-c", f"--format={format_}", "-f", "-", "-C", str(tree), "many", "mixed"]
    found = describe_entries(subprocess.run(command, check=True, capture_output=True).stdout)
    wanted = describe_directory(tree)
    for path, description in found.items():
        assert description["sha256"] == wanted[path]["sha256"]
        if format_ == "pax":
            assert description == without(wanted, "nlink")[path]


@pytest.mark.parametrize("name", ["all-entry-type.tar", "all-entry-type-macos.tar"])
def test_nydus_samples(testdata: Path, name: str) -> None:
    data = (testdata / "nydus-texture" / "tar" / name).read_bytes()
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        wanted = {m.name.removeprefix("./").encode(): m for m in archive.getmembers()}
    found = {entry.path: entry for entry, _ in tar_entries(data)}
    assert len(found) > 5
    for path, entry in found.items():
        member = wanted[path or b"."]
        mode = 0o777 if member.issym() else member.mode
        assert (entry.node.mode, entry.node.uid, entry.node.size) == (mode, member.uid, member.size)
        assert (entry.link is not None) == member.islnk()
        assert (entry.node.type == "dir") == member.isdir()


def test_multi_member_samples_are_read_to_their_end(testdata: Path) -> None:
    for name in ("bgzip.tar.gz", "zran-single-stream.tar.gz", "zran-zero-file.tar.gz"):
        data = (testdata / "nydus-texture" / "zran" / name).read_bytes()
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            files = {m.name: m for m in archive.getmembers() if m.isfile()}
            wanted = {n.encode(): archive.extractfile(m).read() for n, m in files.items()}  # type: ignore[union-attr]
        assert {e.path: content for e, content in tar_entries(data) if e.content} == wanted


def only(data: bytes) -> Node:
    [(entry, _)] = tar_entries(data + END)
    return entry.node


def test_numbers_in_base_256() -> None:
    node = only(header(b"x", uid=3_000_000_000, gid=2**31, mtime=-5))
    assert (node.uid, node.gid, node.mtime) == (3_000_000_000, 2**31, -5 * 10**9)
    node = only(header(b"x", mtime=8**11 + 7))
    assert node.mtime == (8**11 + 7) * 10**9


@pytest.mark.parametrize("blank", [b"\0" * 8, b" " * 8, b"       \0"])
def test_blank_device_numbers_of_fifos(blank: bytes) -> None:
    node = only(header(b"x", b"6", patch=[(329, blank), (337, blank)]))
    assert (node.type, node.rdev) == ("fifo", 0)
    node = only(header(b"x", b"3", patch=[(329, blank), (337, number(3, 8))]))
    assert (node.type, node.rdev) == ("chr", os.makedev(0, 3))


def test_numbers_padded_with_spaces() -> None:
    node = only(header(b"x", patch=[(100, b"   755 \0"), (108, b"  10    "), (136, b"       1234\0")]))
    assert (node.mode, node.uid, node.mtime) == (0o755, 8, 0o1234 * 10**9)


@pytest.mark.parametrize(
    ("time", "mtime"),
    [
        (b"1600000000.123456789", 1_600_000_000_123_456_789),
        (b"1600000000.5", 1_600_000_000_500_000_000),
        (b"1600000000.1234567899999", 1_600_000_000_123_456_789),
        (b"1600000000.", 1_600_000_000_000_000_000),
        (b"-1.5", -1_500_000_000),
        (b"0", 0),
    ],
)
def test_pax_times_are_exact(time: bytes, mtime: int) -> None:
    assert only(pax((b"mtime", time)) + header(b"x")).mtime == mtime


def test_pax_records_replace_what_the_header_says() -> None:
    name, target = "ñ".encode() * 120, b"t" * 3000
    records_ = pax((b"path", name), (b"linkpath", target), (b"uid", b"70000000"), (b"gid", b"1"))
    [(entry, _)] = tar_entries(records_ + header(b"short", b"2", target=b"short", uid=5) + END)
    assert (entry.path, entry.node.target, entry.node.uid, entry.node.gid) == (name, target, 70_000_000, 1)
    [(entry, content)] = tar_entries(pax((b"size", b"1000")) + header(b"x") + b"y" * 1000 + bytes(24) + END)
    assert content == b"y" * 1000


def test_global_records_hold_until_they_are_replaced() -> None:
    data = pax((b"mtime", b"7"), (b"uid", b"3"), (b"comment", b"x"), flag=b"g")
    data += file(b"a", b"1") + pax((b"uid", b"4")) + file(b"b", b"2")
    data += pax((b"uid", b"5"), flag=b"g") + file(b"c", b"3") + pax((b"uid", b"")) + file(b"d", b"4", uid=9)
    nodes = {entry.path: entry.node for entry, _ in tar_entries(data + END)}
    assert [nodes[name].uid for name in (b"a", b"b", b"c", b"d")] == [3, 4, 5, 9]
    assert {node.mtime for node in nodes.values()} == {7 * 10**9}


def test_xattr_values_may_hold_anything() -> None:
    value = b"one\ntwo\0three=\n12 a=b\n"
    odd = b"LIBARCHIVE.xattr.user.with%3Dequals%20sign"
    data = pax(
        (b"SCHILY.xattr.user.lines", value),
        (b"SCHILY.xattr.user.empty", b""),
        (b"SCHILY.xattr.security.capability", bytes(range(20))),
        (odd, base64.b64encode(value).rstrip(b"=")),
        (b"LIBARCHIVE.xattr.user.lines", base64.b64encode(b"the other one")),
    )
    assert only(data + header(b"x")).xattrs == {
        b"user.lines": value,
        b"user.empty": b"",
        b"security.capability": bytes(range(20)),
        b"user.with=equals sign": value,
    }


def test_access_control_lists_in_text() -> None:
    rules = [(1, 6, -1), (2, 4, 1000), (4, 4, -1), (8, 5, 7), (8, 7, 50), (0x10, 4, -1), (0x20, 0, -1)]
    wanted = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *rule) for rule in rules)
    bsdtar = b"user::rw-,group::r--,other::---,user:joe:r--:1000,group:50:rwx,group:g:r-x:7,mask::r--"
    star = b"default:u::rw-\ng::r--\no:---\nu:1000:r--\ng:50:rwx\ng:7:r-x\nm:r--\n"
    access, default = b"SCHILY.acl.access", b"SCHILY.acl.default"
    assert only(pax((access, bsdtar), (default, star)) + header(b"x")).xattrs == {
        b"system.posix_acl_access": wanted,
        b"system.posix_acl_default": wanted,
    }
    assert only(pax((access, b"user::rw-,group::r--,other::r--")) + header(b"x")).xattrs == {}
    # What nobody can tell the number of is kept for a warning.
    assert only(pax((access, b"user:joe:rw-")) + header(b"x")).xattrs == {access: b"user:joe:rw-"}
    both = pax((access, b"user:joe:rw-"), (b"SCHILY.xattr.system.posix_acl_access", wanted))
    assert only(both + header(b"x")).xattrs == {b"system.posix_acl_access": wanted}
    assert format_acl(wanted) == (
        b"user::rw-,user:1000:r--,group::r--,group:7:r-x,group:50:rwx,mask::r--,other::---"
    )
    assert parse_acl(format_acl(wanted)) == wanted
    for wrong in (b"", wanted[:-1], b"\3" + wanted[1:], wanted + struct.pack("<HHi", 3, 0, -1)):
        assert format_acl(wrong) == b""


def test_links_have_the_mode_of_links_whatever_is_stated() -> None:
    assert only(header(b"x", b"2", mode=0o4644, target=b"y")).mode == 0o777


def test_names_are_bytes_and_lose_what_means_nothing() -> None:
    names = {
        b"./a": b"a", b"/b": b"b", b"c//d/./e": b"c/d/e", b"f/../g": b"g", b"./": b"", b"//h": b"h",
        b"\xff\xfe\n": b"\xff\xfe\n", b"i/": b"i",
    }  # fmt: skip
    data = b"".join(header(name, b"5") for name in names)
    assert [entry.path for entry, _ in tar_entries(data + END)] == list(names.values())


def test_a_slash_makes_a_directory_in_the_oldest_format_only() -> None:
    assert only(header(b"d/", b"\0", magic=bytes(8))).type == "dir"
    assert only(header(b"d/", b"0")).type == "reg"
    assert only(header(b"d", b"\0", magic=bytes(8))).type == "reg"


def test_prefixes_of_ustar_and_star() -> None:
    [(entry, _)] = tar_entries(header(b"name", prefix=b"p" * 155) + END)
    assert entry.path == b"p" * 155 + b"/name"
    # star keeps times behind its prefix of 131 bytes
    patch = [(345, b"q" * 131), (476, b"00000000001\0" * 2), (508, b"tar\0")]
    [(entry, _)] = tar_entries(header(b"name", patch=patch) + END)
    assert entry.path == b"q" * 131 + b"/name"


def test_gnu_long_names_and_targets() -> None:
    data = gnu_long(b"n" * 3000) + gnu_long(b"t" * 4000, b"K") + header(b"short", b"2", target=b"short")
    [(entry, _)] = tar_entries(data + END)
    assert (entry.path, entry.node.target) == (b"n" * 3000, b"t" * 4000)


def test_headers_without_data_may_state_a_size() -> None:
    data = header(b"d", b"5", size=5000) + header(b"l", b"1", size=700, target=b"./x/") + file(b"x", b"abc")
    entries = tar_entries(data + END)
    assert [(entry.path, entry.link, content) for entry, content in entries] == [
        (b"d", None, b""), (b"l", b"x", b""), (b"x", None, b"abc"),
    ]  # fmt: skip


def test_volume_labels_are_no_entries() -> None:
    assert tar_entries(header(b"label", b"V") + END) == []


@pytest.mark.parametrize("flag", [b"M", b"A", b"Z", b"\xff"])
def test_unknown_types_are_refused_by_name(flag: bytes) -> None:
    with pytest.raises(UnsupportedImage, match=r"test\.tar: at byte 512: odd: entries of type"):
        tar_entries(header(b"first") + header(b"odd", flag) + END)


@pytest.mark.parametrize("name", [b"../x", b"/../x", b"a/../../x", b".."])
def test_names_that_lead_out_of_the_root_are_refused(name: bytes) -> None:
    with pytest.raises(CorruptImage, match=r"test\.tar: at byte 1024.*leads out of the root"):
        tar_entries(file(b"ok", b"1") + file(name, b"2") + END)
    with pytest.raises(CorruptImage, match=r"test\.tar: at byte 1024: l: the link's target.*out of the root"):
        tar_entries(file(b"ok", b"1") + header(b"l", b"1", target=name) + END)


def test_a_symbolic_link_may_point_anywhere() -> None:
    assert only(header(b"l", b"2", target=b"../../../etc")).target == b"../../../etc"


BAD = {
    "checksum": bytes(148) + b"0000000\0" + b"x" * 356,
    "not zeros": b"\1" * 512,
    "number": header(b"x", patch=[(124, b"12x45678901\0")]),
    "negative size": header(b"x", size=-1),
    "lone zeros": bytes(512) + header(b"x"),
    "pax length": header(b"p", b"x", 20) + b"9999 path=x\n".ljust(512, b"\0") + header(b"x"),
    "pax form": header(b"p", b"x", 20) + b"12 path-xxx\n".ljust(512, b"\0") + header(b"x"),
    "pax number": pax((b"uid", b"1x")) + header(b"x"),
    "pax time": pax((b"mtime", b"1.2.3")) + header(b"x"),
    "NUL in a path": pax((b"path", b"a\0b")) + header(b"x"),
    "base64": pax((b"LIBARCHIVE.xattr.user.x", b"!!")) + header(b"x"),
    "extended header at the end": pax((b"path", b"x")),
    "huge extended header": header(b"p", b"x", 1 << 30),
    "sparse version": pax((b"GNU.sparse.major", b"2"), (b"GNU.sparse.minor", b"0")) + header(b"x"),
    "sparse map without size": pax((b"GNU.sparse.map", b"0,1")) + file(b"x", b"1"),
    "sparse map of odd length": pax((b"GNU.sparse.map", b"0"), (b"GNU.sparse.size", b"9")) + file(b"x", b"1"),
    "sparse overlap": pax((b"GNU.sparse.map", b"0,2,1,1"), (b"GNU.sparse.size", b"9")) + file(b"x", b"123"),
    "sparse past the end": pax((b"GNU.sparse.map", b"8,2"), (b"GNU.sparse.size", b"9")) + file(b"x", b"12"),
    "sparse size": pax((b"GNU.sparse.map", b"0,2"), (b"GNU.sparse.size", b"9")) + file(b"x", b"123"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_archives_are_refused_with_their_offset(name: str) -> None:
    good = file(b"good", b"content")
    with pytest.raises(CorruptImage, match=r"test\.tar: at byte \d+: "):
        tar_entries(good + BAD[name] + END)


def small_tar() -> bytes:
    parts = [
        file(b"a", b"x" * 700),
        pax((b"path", b"p" * 600), (b"SCHILY.xattr.user.x", b"1")) + file(b"short", b"1"),
        header(b"d", b"5"),
        gnu_long(b"l" * 600) + header(b"short", b"2", target=b"a"),
        pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", b"9000"))
        + file(b"s", b"1\n600\n5\n".ljust(512, b"\0") + b"12345"),
    ]
    return b"".join(parts) + END


def test_an_archive_cut_off_anywhere_is_an_error() -> None:
    whole = small_tar()
    assert len(tar_entries(whole)) == 5
    lengths = [*range(0, len(whole) - 512, 512), *range(7, len(whole) - 1024, 331)]
    for length in lengths:
        with pytest.raises(CorruptImage, match=r"test\.tar: at byte \d+.*cut off") as caught:
            tar_entries(whole[:length])
        assert "\n" not in str(caught.value)


def test_the_end_of_a_layer_need_not_be_marked() -> None:
    whole = small_tar()
    assert len(tar_entries(whole[: -len(END)], lenient_end=True)) == 5
    assert tar_entries(b"", lenient_end=True) == []
    for length in (100, 700, 1024 + 300, len(whole) - 1024 - 512):
        with pytest.raises(CorruptImage, match="cut off"):
            tar_entries(whole[:length], lenient_end=True)


def test_what_follows_the_end_is_passed_over_but_read() -> None:
    data = file(b"a", b"1") + END + b"junk" * 1000
    assert [entry.path for entry, _ in tar_entries(data)] == [b"a"]
    packed = gzip.compress(file(b"a", b"1") + END + bytes(8192), mtime=0)
    assert len(tar_entries(packed)) == 1
    with pytest.raises(CorruptImage, match="cut off"):
        tar_entries(packed[:-3])


def test_content_that_nobody_reads_is_passed_over() -> None:
    data = file(b"a", b"x" * 100_000) + file(b"b", b"1") + END
    paths = [entry.path for entry in TarSource(io.BytesIO(data), "tar")]
    assert paths == [b"a", b"b"]


@given(st.binary(max_size=512))
def test_any_block_is_parsed_or_refused(raw: bytes) -> None:
    block = bytearray(raw.ljust(512, b"\0"))
    for checksum in (False, True):
        if checksum:
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
        try:
            tarheader.parse_header(bytes(block))
        except MalformedHeader:
            pass


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=20), st.binary(max_size=200)), max_size=10))
def test_pax_records_survive(pairs: list[tuple[bytes, bytes]]) -> None:
    pairs = [(key.translate(None, b"=\0") or b"k", value) for key, value in pairs]
    assert tarheader.parse_pax(records(*pairs)) == pairs


@given(st.binary(max_size=300))
def test_any_pax_data_is_parsed_or_refused(data: bytes) -> None:
    try:
        tarheader.apply_pax(tarheader.Header(ord("0"), b"", b"", 0, 0, 0, 0, 0), tarheader.parse_pax(data))
    except MalformedHeader:
        pass
