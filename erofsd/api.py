"""What client and daemon say to each other over the Unix socket: one definition for both sides.

Requests are JSON; a refused one is answered with an `ErrorReply` and a status of 400 or above. All
requests are idempotent, so a client may send one again after a connection broke.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

State = Literal["lazy", "complete", "failed"]
Prefetch = Literal["none", "hints", "all"]

DAEMON_PATH = "/v1/daemon"
MOUNTS_PATH = "/v1/mounts"
PREFETCH_PATH = "/v1/prefetch"


class ErrorReply(Struct, frozen=True, kw_only=True):
    """Why a request was refused; *exit_code* is what a command ends with that met it."""

    error: str
    hint: str = ""
    exit_code: int = 1


class DaemonInfo(Struct, frozen=True, kw_only=True):
    """Answer to ``GET /v1/daemon``.

    Attributes:
        pid: Of the worker.
        deadline: Seconds after which a read that cannot be served ends in EIO.
    """

    version: str
    pid: int
    keeper_pid: int
    engines: list[str] = []
    state_dir: str = ""
    deadline: float = 0.0


class MountInfo(Struct, frozen=True, kw_only=True):
    """One mounted image, as ``GET /v1/mounts`` and ``erofsd ls --json`` show it.

    Attributes:
        dir: None for an image that is registered (``--prepare``) and not mounted.
        command: What mounts a registered image.
        total_bytes: Stored (compressed) bytes of the distinct chunks that the image references.
        fetched_bytes: Those of them that are present; equal to *total_bytes* means complete.
        transferred_bytes: What came over the network for this image, metadata included.
        waits: Misses so far: times a reader had to wait.
        errors: Misses that ended in EIO.
        digest: Of the manifest or bootstrap that was mounted; empty where the source has none.
        mounted_at: Seconds since 1970.
        last_error: The newest failure, naming blob, chunk and source; empty if there was none.
        source: The backend that chunks come from.
    """

    dir: str | None
    ref: str
    engine: str
    state: State
    verified: str
    fetched_bytes: int
    total_bytes: int
    transferred_bytes: int
    waits: int
    errors: int
    image: str = ""
    digest: str = ""
    format: str = ""
    mounted_at: float = 0.0
    last_error: str = ""
    source: str = ""
    command: str = ""


class MountRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of ``POST /v1/mounts``. *dir* is absolute, and so is every local path in *ref* and *blobs*.

    Attributes:
        prepare: Register the image and mount nothing; *dir* is empty.
    """

    ref: str
    dir: str
    engine: str = "auto"
    blobs: list[str] | None = None
    prefetch: Prefetch = "hints"
    plain_http: bool = False
    prepare: bool = False


class PrefetchRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of ``POST /v1/prefetch``.

    Attributes:
        target: Absolute directory of a mount, or a reference.
        files: Absolute paths inside the image, files or directories, as latin-1: one character a byte, since
            names need not be UTF-8. None for all of the image.
    """

    target: str
    files: list[str] | None = None


class PrefetchProgress(Struct, frozen=True, kw_only=True):
    """One line of the answer to ``POST /v1/prefetch``; the last one has *done* or *error*."""

    fetched_bytes: int = 0
    total_bytes: int = 0
    done: bool = False
    error: str = ""
    hint: str = ""
    exit_code: int = 0
