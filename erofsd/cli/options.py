"""Options and arguments that several verbs share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from erofsd.client import Client
    from erofsd.config import Config

T = TypeVar("T")

SOCKET_VARIABLE = "EROFSD_SOCKET"

Subparsers = argparse._SubParsersAction  # argparse has no public name for what add_subparsers() returns


def add_verb(
    subparsers: Subparsers[argparse.ArgumentParser], name: str, summary: str, examples: str
) -> argparse.ArgumentParser:
    """A verb's own parser: *summary* is its line in ``erofsd --help``, *examples* end its own help."""
    return subparsers.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog="examples:\n" + "".join(f"  {line}\n" for line in examples.strip().splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_socket(parser: argparse.ArgumentParser) -> None:
    """``--socket``, for verbs that talk to the daemon."""
    parser.add_argument(
        "--socket",
        type=Path,
        metavar="PATH",
        help=f"socket of the daemon (default: ${SOCKET_VARIABLE}, the configured one, /run/erofsd/api.sock)",
    )


def add_config(parser: argparse.ArgumentParser) -> None:
    """``--config``, for verbs that reach a source."""
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="configuration (default: /etc/erofsd/config.toml)"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json``, for verbs that print."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def add_source(parser: argparse.ArgumentParser) -> None:
    """REF and where its blobs are."""
    parser.add_argument(
        "ref",
        metavar="REF",
        help="[docker://]HOST/REPO:TAG, oci:DIR[:TAG], file:BOOTSTRAP, https://…, or a path, / or . first",
    )
    parser.add_argument(
        "--blobs",
        metavar="WHERE",
        action="append",
        help="directory or URL that data blobs are in; may be repeated",
    )
    parser.add_argument(
        "--plain-http", action="store_true", help="speak HTTP without TLS to the registry of REF"
    )


def socket_path(args: argparse.Namespace) -> Path:
    """Where the daemon is: the option, else the environment, else the configuration, else the default.

    Raises:
        ConfigError: The configuration was named by an option, and is wrong.
    """
    from erofsd import config
    from erofsd.errors import ConfigError

    if chosen := args.socket or os.environ.get(SOCKET_VARIABLE):
        return Path(chosen)
    named: Path | None = getattr(args, "config", None)
    try:
        return config.load_config(named).socket
    except ConfigError:
        # The machine's own file may be none of this user's business, and has passwords in it.
        if named is not None:
            raise
        return config.DEFAULT_SOCKET


def connect(args: argparse.Namespace) -> Client:
    """A client of the daemon that *args* mean."""
    from erofsd.client import Client

    return Client(socket_path(args))


def run_async(coroutine: Coroutine[None, None, T]) -> T:
    """The result of *coroutine*, run on an event loop of its own."""
    import asyncio

    return asyncio.run(coroutine)


def load_config(args: argparse.Namespace) -> Config:
    """The configuration that *args* mean."""
    from erofsd.config import load_config

    return load_config(args.config)


def absolute(path: str) -> str:
    """*path* from the root, as another process with another working directory must be told it."""
    return os.path.abspath(path)


def absolute_ref(ref: str) -> str:
    """*ref* as it is, but for a local path in it, which is made absolute.

    Raises:
        UsageError: It is no reference.
    """
    from erofsd.backends import reference

    parsed = reference.parse_reference(ref)
    local = (
        reference.LayoutReference,
        reference.ArchiveReference,
        reference.FileReference,
        reference.PathReference,
    )
    return str(parsed) if isinstance(parsed, local) else ref


def absolute_blobs(blobs: list[str] | None) -> list[str] | None:
    """Each place of *blobs* that is a local path made absolute."""
    return blobs and [where if "://" in where else absolute(where) for where in blobs]
