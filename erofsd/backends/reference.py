"""REF, the word on the command line that names an image: which source, and what to ask it for.

Sources: skopeo's containers-transports(5) for ``oci:``, ``oci-archive:``, ``docker-archive:``;
distribution/reference, "Grammar", for registry references and their defaults.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from yarl import URL

from erofsd.errors import UsageError

DOCKER_HUB = "docker.io"

_PATH = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"\w[\w.-]{0,127}", re.ASCII)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
_HOST = re.compile(
    r"(?:\[[0-9a-fA-F:.]+\]|[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?(?:\.[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?)*)"
    r"(?::[0-9]{1,5})?"
)
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")
_REPOSITORY_MAX = 255  # host included; distribution/reference, NameTotalLengthMax

KNOWN = "docker://host/repo:tag, oci:DIR[:tag], file:BOOTSTRAP, https://…, or a path that begins with / or ."
# Skopeo's other transports; as bare references they would silently mean a repository of that name.
_NOT_OURS = ("dir:", "docker-daemon:", "containers-storage:", "ostree:", "sif:", "tarball:")


@dataclass(frozen=True, slots=True)
class RegistryReference:
    """An image in a registry.

    Attributes:
        host: ``host`` or ``host:port`` as written; ``docker.io`` where it was left out.
        repository: Without host; with ``library/`` where docker adds it.
        tag: Ignored by registries where there is a digest.
        digest: ``sha256:…``.
    """

    host: str
    repository: str
    tag: str | None
    digest: str | None

    @property
    def selector(self) -> str:
        """What to ask the registry for: the digest if there is one."""
        return self.digest or self.tag or "latest"

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"docker://{self.host}/{self.repository}{tag}{digest}"


@dataclass(frozen=True, slots=True)
class LayoutReference:
    """An image in an OCI image layout; without a tag the only one there."""

    path: Path
    tag: str | None

    def __str__(self) -> str:
        return f"oci:{self.path}" + (f":{self.tag}" if self.tag else "")


@dataclass(frozen=True, slots=True)
class ArchiveReference:
    """An image in a tar archive: something to convert, not to mount."""

    kind: Literal["oci-archive", "docker-archive"]
    path: Path
    tag: str | None

    def __str__(self) -> str:
        return f"{self.kind}:{self.path}" + (f":{self.tag}" if self.tag else "")


@dataclass(frozen=True, slots=True)
class FileReference:
    """A bootstrap, a Nydus blob that holds one, or an EROFS image, in a file of its own."""

    path: Path

    def __str__(self) -> str:
        return f"file:{self.path}"


@dataclass(frozen=True, slots=True)
class PathReference:
    """What begins with ``/`` or ``.``: an EROFS image, or for some verbs a directory or a tar."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, slots=True)
class HttpReference:
    """A single image behind a URL."""

    url: str

    def __str__(self) -> str:
        return self.url


@dataclass(frozen=True, slots=True)
class S3Reference:
    """A single image in an S3 bucket."""

    bucket: str
    key: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"


Reference: TypeAlias = (
    RegistryReference
    | LayoutReference
    | ArchiveReference
    | FileReference
    | PathReference
    | HttpReference
    | S3Reference
)


def parse_reference(text: str) -> Reference:
    """What *text* names. ``str()`` of the answer is its canonical form and parses to the same.

    Relative paths are taken from the working directory. Nothing is looked up anywhere.

    Raises:
        UsageError: Names what is wrong with it.
    """
    if not text or not text.isprintable() or text != text.strip():
        raise UsageError(f"not an image reference: {text!r}", hint=KNOWN)
    if text[0] in "/.":
        return PathReference(_absolute(text))
    if match := _SCHEME.match(text):
        return _parse_url(text, match.group(1).lower())
    prefix, _, rest = text.partition(":")
    match prefix:
        case "oci":
            path, tag = _path_and_tag(text, rest)
            return LayoutReference(path, tag)
        case "oci-archive" | "docker-archive":
            path, tag = _path_and_tag(text, rest)
            return ArchiveReference("oci-archive" if prefix == "oci-archive" else "docker-archive", path, tag)
        case "file":
            if not rest:
                raise UsageError(f"{text}: no file is named")
            return FileReference(_absolute(rest))
    if text.startswith(_NOT_OURS):
        raise UsageError(
            f"{text}: erofsd does not read {prefix}:", hint=f"copy it with skopeo; known: {KNOWN}"
        )
    return parse_registry_reference(text)


def parse_registry_reference(text: str) -> RegistryReference:
    """*text*, without ``docker://``, by docker's rules: ``python`` is ``docker.io/library/python:latest``.

    Raises:
        UsageError: Names the part that is wrong.
    """
    rest, at, digest = text.partition("@")
    if at and not _DIGEST.fullmatch(digest):
        raise UsageError(f"{text}: not a digest: {digest!r}", hint="sha256: and 64 hexadecimal digits")
    first, slash, remainder = rest.partition("/")
    if slash and (first == "localhost" or any(c in first for c in ".:[") or first != first.lower()):
        host, rest = first, remainder
        if not _HOST.fullmatch(host):
            raise UsageError(f"{text}: not a registry host: {host!r}")
    else:
        host = DOCKER_HUB
    repository, colon, tag = rest.partition(":")
    if colon and not _TAG.fullmatch(tag):
        raise UsageError(f"{text}: not a tag: {tag!r}")
    if not _PATH.fullmatch(repository) or len(host) + 1 + len(repository) > _REPOSITORY_MAX:
        lower = repository.lower()
        hint = f"repository names are lower case: {lower}" if lower != repository else KNOWN
        raise UsageError(f"{text}: not a repository name: {repository!r}", hint=hint)
    if host in ("index.docker.io", "registry-1.docker.io"):
        host = DOCKER_HUB
    if host == DOCKER_HUB and "/" not in repository:
        repository = f"library/{repository}"
    return RegistryReference(host, repository, tag or (None if digest else "latest"), digest or None)


def _parse_url(text: str, scheme: str) -> Reference:
    rest = text.partition("://")[2]
    match scheme:
        case "docker":
            return parse_registry_reference(rest)
        case "http" | "https":
            return HttpReference(_checked_url(text))
        case "s3":
            bucket, _, key = rest.partition("/")
            if not bucket or not key:
                raise UsageError(f"{text}: s3://BUCKET/KEY names an object")
            return S3Reference(bucket, key)
        case "file" if rest.startswith("/"):
            return FileReference(_absolute(rest))
    raise UsageError(f"{text}: erofsd does not know {scheme}://", hint=KNOWN)


def _checked_url(text: str) -> str:
    try:
        url = URL(text)
    except ValueError as exc:
        raise UsageError(f"{text}: not a URL: {exc}") from exc
    if not url.host:
        raise UsageError(f"{text}: no host in this URL")
    if url.user or url.password:
        raise UsageError("a URL with a password in it would show up in logs and listings")
    return text.partition("#")[0]  # not rewritten: some URLs are signed as they are


def _path_and_tag(text: str, rest: str) -> tuple[Path, str | None]:
    # As in skopeo the first colon ends the path, so that a tag may be a whole reference with a colon.
    path, _, tag = rest.partition(":")
    if not path:
        raise UsageError(f"{text}: no path is named")
    return _absolute(path), tag or None


def _absolute(path: str) -> Path:
    return Path(os.path.abspath(path))
