"""Converting images: what comes out is the same tree, and looks as Nydus' tools want it."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.build import tars
from tests.build.ordinary import (
    AMD64,
    Layout,
    convert,
    erofsd,
    facts,
    tree_tar,
)
from tests.registry import Origin, RegistryServer, need

NYDUS = "containerd.io/snapshot/nydus-"

BASE = tree_tar(
    tars.header(b"etc/", b"5", mode=0o755),
    tars.file(b"etc/hosts", b"127.0.0.1 localhost\n"),
    tars.file(b"etc/gone", b"x" * 5000),
    tars.header(b"etc/hard", b"1", target=b"etc/hosts"),
    tars.header(b"dev/", b"5", mode=0o755),
    tars.header(b"dev/null", b"3", mode=0o666, device=(1, 3)),
    tars.pax((b"SCHILY.xattr.user.note", b"a\0b\n\xff"), (b"mtime", b"1600000000.123456789")),
    tars.file(b"etc/noted", b"noted"),
    tars.file(b"big", random.Random(1).randbytes(3_000_000)),
)
TOP = tree_tar(
    tars.header(b"etc/.wh.gone"),
    tars.file(b"etc/new", b"new\n"),
    tars.header(b"usr/lib", b"2", target=b"/etc"),
    tars.file("usr/ümlaut".encode("latin-1"), b"not UTF-8"),
)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """A layout with one image of two layers, ``source``."""
    made = Layout(tmp_path / "source")
    made.image("source", BASE, TOP)
    return made


def images_in(path: Path) -> Layout:
    """The layout at *path*, to be read."""
    layout = Layout.__new__(Layout)
    layout.path = path
    return layout


# --- the same tree ---


def test_real_image_converts_to_the_tree_that_nydus_made_of_it(
    testdata: Path, registry: RegistryServer, nydusify: str, tmp_path: Path
) -> None:
    outcome = convert(f"{nydusify}:source", f"{registry.host}/convert/real:lazy")
    assert outcome["checked"]
    expected = [json.loads(line) for line in (testdata / "nydusify" / "facts.jsonl").open()]
    assert facts(f"{registry.host}/convert/real:lazy") == {fact["path"]: fact for fact in expected}
    erofsd("check", f"{registry.host}/convert/real:lazy", "--against", f"{nydusify}:source")
    erofsd("check", f"{registry.host}/convert/real:lazy", "--against", f"{nydusify}:zstd")


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--compression", "lz4_block", "--chunk-size", "64K", "--digest", "sha256"),
        ("--compression", "gzip", "--chunk-size", "4K"),
        ("--compression", "none"),
        ("--batch-size", "256K", "--level", "9"),
        ("--format", "erofs"),
    ],
    ids=lambda options: " ".join(options) or "defaults",
)
def test_there_and_back_again_is_the_same(layout: Layout, tmp_path: Path, options: tuple[str, ...]) -> None:
    out = tmp_path / "out"
    convert(layout.ref("source"), f"oci:{out}:lazy", *options)
    erofsd("check", f"oci:{out}:lazy", "--against", layout.ref("source"))
    convert("--to", "oci", f"oci:{out}:lazy", f"oci:{out}:plain")
    erofsd("check", f"oci:{out}:lazy", "--against", f"oci:{out}:plain")
    first, second = (images_in(out).manifest(tag) for tag in ("lazy", "plain"))
    configs = [json.loads(images_in(out).read(m["config"]["digest"])) for m in (first, second)]
    original = json.loads(layout.read(layout.manifest("source")["config"]["digest"]))
    for config in configs:
        assert {k: v for k, v in config.items() if k not in ("rootfs", "history")} == {
            k: v for k, v in original.items() if k not in ("rootfs", "history")
        }
    convert("--to", "oci", f"oci:{out}:lazy", f"oci:{out}:again")
    assert images_in(out).manifest("again") == second


def test_layer_of_an_ordinary_image_is_what_other_tools_read(layout: Layout, tmp_path: Path) -> None:
    convert(layout.ref("source"), f"oci:{tmp_path}/out:lazy")
    convert("--to", "oci", f"oci:{tmp_path}/out:lazy", f"oci:{tmp_path}/out:plain")
    out = images_in(tmp_path / "out")
    manifest = out.manifest("plain")
    (layer,) = manifest["layers"]
    tar = gzip.decompress(out.read(layer["digest"]))
    config = json.loads(out.read(manifest["config"]["digest"]))
    assert config["rootfs"]["diff_ids"] == [f"sha256:{hashlib.sha256(tar).hexdigest()}"]
    assert len([h for h in config["history"] if not h.get("empty_layer")]) == 1
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        members = {m.name: m for m in archive}
        assert archive.extractfile("etc/new").read() == b"new\n"  # type: ignore[union-attr]
    assert members["etc/noted"].mtime == 1600000000.123456789
    assert members["etc/hosts"].islnk() != members["etc/hard"].islnk()
    assert "etc/gone" not in members
    subprocess.run([need("tar"), "-xf", "-", "-C", _made(tmp_path / "x")], input=tar, check=True)
    assert (tmp_path / "x" / "etc" / "hard").samefile(tmp_path / "x" / "etc" / "hosts")


def _made(path: Path) -> Path:
    path.mkdir()
    return path


# --- what it looks like ---


def test_manifest_and_config_are_as_nydus_tools_want_them(layout: Layout, tmp_path: Path) -> None:
    convert(layout.ref("source"), f"oci:{tmp_path}/out:lazy")
    out = images_in(tmp_path / "out")
    manifest = out.manifest("lazy")
    *data, bootstrap = manifest["layers"]
    assert len(data) == 2
    for layer in data:
        assert layer["mediaType"] == "application/vnd.oci.image.layer.nydus.blob.v1"
        assert layer["annotations"] == {f"{NYDUS}blob": "true"}
        assert hashlib.sha256(out.read(layer["digest"])).hexdigest() == layer["digest"][7:]
    assert bootstrap["mediaType"] == "application/vnd.oci.image.layer.v1.tar+gzip"
    assert bootstrap["annotations"] == {f"{NYDUS}bootstrap": "true", f"{NYDUS}fs-version": "6"}
    tar = gzip.decompress(out.read(bootstrap["digest"]))
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        names = [(m.name, m.mode, m.isdir()) for m in archive]
    metas = sorted(f"image/{layer['digest'][7:]}.blob.meta" for layer in data)
    assert names == [
        ("image", 0o755, True),
        ("image/image.boot", 0o444, False),
        *((n, 0o444, False) for n in metas),
    ]
    config = json.loads(out.read(manifest["config"]["digest"]))
    diff_id = f"sha256:{hashlib.sha256(tar).hexdigest()}"
    assert config["rootfs"]["diff_ids"] == [*(layer["digest"] for layer in data), diff_id]
    assert config["history"][-1] == {"created_by": "Nydus Converter", "comment": "Nydus Bootstrap Layer"}
    source = layout.manifest("source")
    assert config["config"] == json.loads(layout.read(source["config"]["digest"]))["config"]
    digest = next(m["digest"] for m in layout.manifests)
    assert manifest["annotations"][f"{NYDUS}source-digest"] == digest


def test_same_image_gives_the_same_bytes_whatever_the_number_of_threads(
    layout: Layout, tmp_path: Path
) -> None:
    digests = {
        convert(layout.ref("source"), f"oci:{tmp_path}/out{jobs}:x", "--jobs", jobs)["digest"]
        for jobs in (1, 2, 5)
    }
    assert len(digests) == 1


def test_index_is_converted_for_every_linux_platform(layout: Layout, tmp_path: Path) -> None:
    amd = layout.image(None, BASE, platform=AMD64)
    arm_platform = {"architecture": "arm64", "os": "linux", "variant": "v8"}
    arm = layout.image(
        None, BASE, TOP, config={"architecture": "arm64", "variant": "v8"}, platform=arm_platform
    )
    windows = layout.image(
        None, BASE, config={"os": "windows"}, platform={"architecture": "amd64", "os": "windows"}
    )
    attestation = layout.image(
        None,
        layers=[layout.blob(b"{}", "application/vnd.in-toto+json")],
        platform={"architecture": "unknown", "os": "unknown"},
        annotations={"vnd.docker.reference.type": "attestation-manifest"},
    )
    layout.index("all", amd, arm, windows, attestation, annotations={"kept": "yes"})
    out = images_in(tmp_path / "out")
    outcome = convert(layout.ref("all"), f"oci:{out.path}:all")
    assert outcome["platforms"] == ["linux/amd64", "linux/arm64/v8"]
    index = out.manifest("all")
    assert [m["platform"] for m in index["manifests"]] == [AMD64, arm_platform]
    assert index["annotations"] == {"kept": "yes"}
    erofsd("check", f"oci:{out.path}:all", "--against", layout.ref("all"))
    one = convert(layout.ref("all"), f"oci:{out.path}:one", "--platform", "linux/arm64")
    assert one["platforms"] == ["linux/arm64/v8"]
    assert "layers" in out.manifest("one")
    back = convert("--to", "oci", f"oci:{out.path}:all", f"oci:{out.path}:back")
    assert len(out.manifest("back")["manifests"]) == len(back["platforms"]) == 2
    refused = erofsd(
        "convert", layout.ref("all"), f"oci:{out.path}:x", "--platform", "linux/s390x", check=False
    )
    assert refused.returncode == 4
    assert "linux/arm64/v8" in refused.stderr


# --- sources ---


def test_archives_are_read_in_place(layout: Layout, tmp_path: Path) -> None:
    skopeo = need("skopeo")
    for kind, tag in (("oci-archive", ""), ("docker-archive", ":some/name:tag")):
        archive = tmp_path / f"{kind}.tar"
        copied = f"{kind}:{archive}{tag}"
        subprocess.run([skopeo, "copy", "-q", layout.ref("source"), copied], check=True)
        convert(f"{kind}:{archive}", f"oci:{tmp_path}/out:{kind}")
        erofsd("check", f"oci:{tmp_path}/out:{kind}", "--against", layout.ref("source"))


def test_docker_schema_2_is_converted(layout: Layout, registry: RegistryServer, tmp_path: Path) -> None:
    destination = f"docker://{registry.host}/convert/docker:2"
    subprocess.run(
        [
            need("skopeo"),
            "copy",
            "-q",
            "--dest-tls-verify=false",
            "--format",
            "v2s2",
            layout.ref("source"),
            destination,
        ],
        check=True,
    )
    convert(destination, f"oci:{tmp_path}/out:x")
    erofsd("check", f"oci:{tmp_path}/out:x", "--against", layout.ref("source"))


def test_foreign_layer_comes_from_where_the_manifest_says(
    layout: Layout, origin: Origin, tmp_path: Path
) -> None:
    body = gzip.compress(BASE, 1, mtime=0)
    origin.objects["/layer"] = body
    foreign = {
        "mediaType": "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
        "digest": f"sha256:{hashlib.sha256(body).hexdigest()}",
        "size": len(body),
        "urls": [f"{origin.url}/nothing", f"{origin.url}/layer"],
    }
    layout.image("foreign", layers=[foreign, layout.layer(TOP)])
    convert(layout.ref("foreign"), f"oci:{tmp_path}/out:x")
    erofsd("check", f"oci:{tmp_path}/out:x", "--against", layout.ref("source"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"config": {"os": "windows"}}, "windows"),
        ({"encrypted": True}, "encrypted"),
        ({"type": "application/vnd.cncf.helm.chart.content.v1.tar+gzip"}, "helm"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(
    layout: Layout, tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    layer = layout.layer(BASE)
    if change.get("encrypted"):
        layer["mediaType"] += "+encrypted"
    layer["mediaType"] = change.get("type", layer["mediaType"])
    layout.image("odd", layers=[layer], config=change.get("config"))
    done = erofsd("convert", layout.ref("odd"), f"oci:{tmp_path}/out:x", check=False)
    assert (done.returncode, named in done.stderr) == (4, True)
    assert not (tmp_path / "out").exists()


def test_nydus_image_and_schema_1_are_refused(layout: Layout, nydusify: str, tmp_path: Path) -> None:
    done = erofsd("convert", f"{nydusify}:zstd", f"oci:{tmp_path}/out:x", check=False)
    assert (done.returncode, "Nydus" in done.stderr) == (4, True)
    layout.document(
        "old", {"schemaVersion": 1, "mediaType": "application/vnd.docker.distribution.manifest.v1+prettyjws"}
    )
    done = erofsd("convert", layout.ref("old"), f"oci:{tmp_path}/out:x", check=False)
    assert (done.returncode, "schema 1" in done.stderr) == (4, True)


# --- bad input ---


def test_layer_that_is_another_one_is_refused_and_nothing_is_published(
    layout: Layout, tmp_path: Path
) -> None:
    base, _ = layout.manifest("source")["layers"]
    other = gzip.compress(BASE.replace(b"localhost", b"evil.host"), 1, mtime=0)
    path = layout.path / "blobs" / "sha256" / base["digest"][7:]
    path.write_bytes(other.ljust(base["size"], b"\0")[: base["size"]])
    done = erofsd("convert", layout.ref("source"), f"oci:{tmp_path}/out:x", check=False)
    assert (done.returncode, base["digest"] in done.stderr) == (4, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cut", [1, 700, 20_000])
def test_truncated_layer_is_one_clear_error(layout: Layout, tmp_path: Path, cut: int) -> None:
    whole = gzip.compress(BASE, 1, mtime=0)
    stream = layout.blob(whole[:-cut], "application/vnd.oci.image.layer.v1.tar+gzip")
    tar = layout.layer(BASE[: -len(tars.END) - 100 - cut])
    for tag, layer in (("packing", stream), ("tar", tar)):
        layout.image(tag, layers=[layout.layer(TOP), layer])
        done = erofsd("convert", layout.ref(tag), f"oci:{tmp_path}/out:x", check=False)
        assert done.returncode == 4
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert layer["digest"] in done.stderr
        assert not (tmp_path / "out").exists()


def test_path_that_leaves_the_root_is_refused(layout: Layout, tmp_path: Path) -> None:
    layout.image("escape", tree_tar(tars.file(b"../../etc/passwd", b"x")))
    layout.image(
        "escape-link",
        tree_tar(tars.header(b"out", b"2", target=b"../.."), tars.file(b"out/passwd", b"x")),
    )
    layout.image(
        "escape-layers",
        tree_tar(tars.header(b"a/out", b"2", target=b"../../etc")),
        tree_tar(tars.file(b"a/out/passwd", b"x")),
    )
    layout.image("escape-hard-link", tree_tar(tars.header(b"x", b"1", target=b"../etc/passwd")))
    for tag in ("escape", "escape-link", "escape-layers", "escape-hard-link"):
        done = erofsd("convert", layout.ref(tag), f"oci:{tmp_path}/out:x", check=False)
        assert done.returncode == 4, done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert "passwd" in done.stderr
        assert layout.manifest(tag)["layers"][-1]["digest"] in done.stderr
        assert not (tmp_path / "out").exists()


def test_absolute_paths_and_links_are_those_of_the_root(layout: Layout, tmp_path: Path) -> None:
    layout.image(
        "absolute",
        tree_tar(
            tars.file(b"/etc/passwd", b"ours"),
            tars.header(b"all", b"2", target=b"/"),
            tars.file(b"all/etc/shadow", b"ours, too"),
            tars.header(b"/hard", b"1", target=b"/etc/passwd"),
        ),
    )
    convert(layout.ref("absolute"), f"oci:{tmp_path}/out:x")
    found = facts(f"oci:{tmp_path}/out:x")
    assert set(found) == {"/", "/all", "/etc", "/etc/passwd", "/etc/shadow", "/hard"}
    assert found["/hard"]["sha256"] == found["/etc/passwd"]["sha256"]


@pytest.mark.parametrize("packing", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_truncated_tar_is_not_built(tmp_path: Path, packing: Callable[[bytes], bytes]) -> None:
    (tmp_path / "cut.tar").write_bytes(packing(BASE)[:-20_000])
    done = erofsd("build", tmp_path / "cut.tar", f"oci:{tmp_path}/out:x", check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (4, 1), done.stderr
    assert "cut.tar" in done.stderr
    assert not (tmp_path / "out").exists()


def test_destination_that_is_the_source_is_refused(layout: Layout) -> None:
    done = erofsd("convert", layout.ref("source"), layout.ref("source"), check=False)
    assert done.returncode == 2


# --- reuse ---


def test_finished_layers_are_remembered(layout: Layout, tmp_path: Path) -> None:
    work = ("--work-dir", tmp_path / "work")
    first = convert(layout.ref("source"), f"oci:{tmp_path}/one:x", *work)
    second = convert(layout.ref("source"), f"oci:{tmp_path}/two:x", *work)
    assert (first["layers"], first["layers_reused"], second["layers_reused"]) == (2, 0, 2)
    assert first["digest"] == second["digest"]
    third = convert(layout.ref("source"), f"oci:{tmp_path}/two:y", *work, "--level", "5")
    assert third["layers_reused"] == 0
    erofsd("check", f"oci:{tmp_path}/two:y", "--against", layout.ref("source"))


def test_image_with_one_layer_twice(layout: Layout, tmp_path: Path) -> None:
    layer = layout.layer(BASE)
    layout.image("twice", layers=[layer, layout.layer(TOP), layer])
    convert(layout.ref("twice"), f"oci:{tmp_path}/out:x")
    erofsd("check", f"oci:{tmp_path}/out:x", "--against", layout.ref("twice"))


def test_image_without_any_data(layout: Layout, tmp_path: Path) -> None:
    layout.image("empty", tree_tar(tars.header(b"dir/", b"5", mode=0o755)), tree_tar())
    convert(layout.ref("empty"), f"oci:{tmp_path}/out:x")
    erofsd("check", f"oci:{tmp_path}/out:x", "--against", layout.ref("empty"))
    assert len(images_in(tmp_path / "out").manifest("x")["layers"]) == 1


def test_chunks_of_a_dictionary_are_neither_stored_nor_sent_again(
    layout: Layout, registry: RegistryServer, tmp_path: Path
) -> None:
    changed = BASE.replace(b"127.0.0.1 localhost\n", b"127.0.0.2 localhost\n")
    layout.image("changed", changed, TOP)
    first = convert(layout.ref("source"), f"{registry.host}/convert/dict-a:1")
    dictionary = ("--chunk-dict", f"{registry.host}/convert/dict-a:1", "--chunk-size", "1M")
    second = convert(layout.ref("changed"), f"{registry.host}/convert/dict-b:1", *dictionary)
    assert second["blob_bytes"] < first["blob_bytes"] // 10
    assert second["present_bytes"] >= first["blob_bytes"] // 2  # mounted from the other repository
    erofsd("check", f"{registry.host}/convert/dict-b:1", "--against", layout.ref("changed"))
    # Elsewhere the dictionary's blobs have to go along.
    convert(layout.ref("changed"), f"oci:{tmp_path}/out:x", *dictionary)
    erofsd("check", f"oci:{tmp_path}/out:x", "--against", layout.ref("changed"))
    refused = erofsd(
        "convert",
        layout.ref("changed"),
        f"oci:{tmp_path}/out:y",
        "--chunk-dict",
        f"{registry.host}/convert/dict-a:1",
        "--chunk-size",
        "4K",
        check=False,
    )
    assert refused.returncode == 2


# --- publishing ---


def test_referrer_is_found_from_its_source(layout: Layout, registry: RegistryServer) -> None:
    registry.push_layout(layout.path, "source", "convert/referrer")
    repository = f"{registry.host}/convert/referrer"
    outcome = convert(f"{repository}:source", repository, "--referrer")
    manifest = json.loads(_get(registry, "convert/referrer", outcome["digest"]))
    source = _get(registry, "convert/referrer", "source")
    digest = f"sha256:{hashlib.sha256(source).hexdigest()}"
    assert manifest["subject"]["digest"] == digest
    assert manifest["subject"]["size"] == len(source)
    assert manifest["artifactType"] == "application/vnd.nydus.image.manifest.v1+json"
    # This registry keeps no list of referrers: the tag stands for it.
    index = json.loads(_get(registry, "convert/referrer", digest.replace(":", "-")))
    assert [m["digest"] for m in index["manifests"]] == [outcome["digest"]]
    again = convert(f"{repository}:source", f"{repository}:named", "--referrer", "--level", "5")
    index = json.loads(_get(registry, "convert/referrer", digest.replace(":", "-")))
    assert [m["digest"] for m in index["manifests"]] == [outcome["digest"], again["digest"]]
    erofsd("check", f"{repository}@{outcome['digest']}", "--against", f"{repository}:source")
    elsewhere = erofsd(
        "convert", f"{repository}:source", f"{registry.host}/other:x", "--referrer", check=False
    )
    assert elsewhere.returncode == 2


def _get(registry: RegistryServer, repository: str, selector: str) -> bytes:
    done = subprocess.run(
        [
            need("skopeo"),
            "inspect",
            "--raw",
            "--tls-verify=false",
            f"docker://{registry.host}/{repository}{'@' if ':' in selector else ':'}{selector}",
        ],
        capture_output=True,
        check=True,
    )
    return done.stdout


def test_converted_image_is_copied_by_skopeo(
    layout: Layout, registry: RegistryServer, tmp_path: Path
) -> None:
    convert(layout.ref("source"), f"{registry.host}/convert/copied:x")
    subprocess.run(
        [
            need("skopeo"),
            "copy",
            "-q",
            "--preserve-digests",
            "--src-tls-verify=false",
            f"docker://{registry.host}/convert/copied:x",
            f"oci:{tmp_path}/copy:x",
        ],
        check=True,
    )
    erofsd("check", f"oci:{tmp_path}/copy:x", "--against", layout.ref("source"))


def test_loose_image(layout: Layout, tmp_path: Path) -> None:
    convert(layout.ref("source"), f"file:{tmp_path}/x.boot", "--blobs", tmp_path / "blobs")
    erofsd(
        "check", f"file:{tmp_path}/x.boot", "--blobs", tmp_path / "blobs", "--against", layout.ref("source")
    )
    done = erofsd("convert", layout.ref("source"), f"file:{tmp_path}/y.boot", check=False)
    assert (done.returncode, "--blobs" in done.stderr) == (2, True)
    plain = tmp_path / "x.erofs"
    convert(layout.ref("source"), f"file:{plain}", "--format", "erofs")
    erofsd("check", plain, "--against", layout.ref("source"))
    subprocess.run([need("fsck.erofs"), str(plain)], check=True, capture_output=True)
