"""REF, in all its spellings."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from erofsd.backends.reference import (
    ArchiveReference,
    FileReference,
    HttpReference,
    LayoutReference,
    PathReference,
    RegistryReference,
    S3Reference,
    parse_reference,
)
from erofsd.errors import UsageError

D = "sha256:" + "ab" * 32

REGISTRY = [
    ("python", "docker.io", "library/python", "latest", None),
    ("python:3.12", "docker.io", "library/python", "3.12", None),
    ("docker://python:3.12", "docker.io", "library/python", "3.12", None),
    ("user/app", "docker.io", "user/app", "latest", None),
    ("index.docker.io/nginx", "docker.io", "library/nginx", "latest", None),
    ("localhost/app", "localhost", "app", "latest", None),
    ("localhost:5000/x", "localhost:5000", "x", "latest", None),
    ("127.0.0.1:5000/a/b/c:t", "127.0.0.1:5000", "a/b/c", "t", None),
    ("[::1]:5000/x:y", "[::1]:5000", "x", "y", None),
    ("quay.io/a/b@" + D, "quay.io", "a/b", None, D),
    ("quay.io/a/b:t@" + D, "quay.io", "a/b", "t", D),
    ("docker://ghcr.io/a__b/c-d.e:V1_2-3.x", "ghcr.io", "a__b/c-d.e", "V1_2-3.x", None),
]


@pytest.mark.parametrize(("text", "host", "repository", "tag", "digest"), REGISTRY)
def test_registry_references_follow_docker(
    text: str, host: str, repository: str, tag: str | None, digest: str | None
) -> None:
    assert parse_reference(text) == RegistryReference(host, repository, tag, digest)


def test_digest_outranks_tag() -> None:
    reference = parse_reference(f"quay.io/a/b:t@{D}")
    assert isinstance(reference, RegistryReference)
    assert reference.selector == D
    assert str(reference) == f"docker://quay.io/a/b:t@{D}"


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("oci:/x/y", LayoutReference(Path("/x/y"), None)),
        ("oci:/x/y:tag", LayoutReference(Path("/x/y"), "tag")),
        ("oci:/x/y:docker.io/a/b:tag", LayoutReference(Path("/x/y"), "docker.io/a/b:tag")),
        ("oci-archive:/x.tar:t", ArchiveReference("oci-archive", Path("/x.tar"), "t")),
        ("docker-archive:/x.tar", ArchiveReference("docker-archive", Path("/x.tar"), None)),
        ("file:/b/boot", FileReference(Path("/b/boot"))),
        ("/b/../x.erofs", PathReference(Path("/x.erofs"))),
        ("https://h/x.erofs?sig=a%2Fb#top", HttpReference("https://h/x.erofs?sig=a%2Fb")),
        ("http://h:1/x", HttpReference("http://h:1/x")),
        ("s3://bucket/a/key", S3Reference("bucket", "a/key")),
    ],
)
def test_other_references(text: str, reference: object) -> None:
    assert parse_reference(text) == reference


def test_relative_paths_are_made_absolute() -> None:
    here = Path(os.getcwd())
    assert parse_reference("./x.erofs") == PathReference(here / "x.erofs")
    assert parse_reference("../x") == PathReference(here.parent / "x")
    assert parse_reference("oci:dir:t") == LayoutReference(here / "dir", "t")
    assert parse_reference("file:boot") == FileReference(here / "boot")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "not an image reference"),
        ("a\nb", "not an image reference"),
        (" python", "not an image reference"),
        ("Python:3", "repository name"),
        ("python:", "tag"),
        ("python:a b", "tag"),
        ("python@sha256:12", "digest"),
        ("quay.io/", "repository name"),
        ("quay.io/a//b", "repository name"),
        ("-x.io/a", "host"),
        ("ftp://h/x", "ftp://"),
        ("oci:", "no path"),
        ("file:", "no file"),
        ("s3://bucket", "BUCKET/KEY"),
        ("https:///x", "host"),
        ("https://user:secret@h/x", "password"),
        ("dir:/x", "dir:"),
        ("containers-storage:x", "containers-storage:"),
        ("quay.io/" + "a" * 300, "repository name"),
    ],
)
def test_what_cannot_be_is_refused_by_name(text: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem) as caught:
        parse_reference(text)
    assert "secret" not in str(caught.value)


def test_upper_case_gets_the_lower_case_name_as_a_hint() -> None:
    with pytest.raises(UsageError) as caught:
        parse_reference("Python")
    assert "python" in caught.value.hint


@given(st.one_of(st.text(), st.text("aA0.:/@-_[]%", max_size=30), st.from_regex(r"[a-z.:/@-]{1,40}")))
def test_any_text_parses_or_is_refused_and_the_canonical_form_is_stable(text: str) -> None:
    try:
        reference = parse_reference(text)
    except UsageError:
        return
    assert parse_reference(str(reference)) == reference
