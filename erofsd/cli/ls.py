"""``erofsd ls``: what is mounted, and how much of it is here."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from erofsd.cli.options import Subparsers, add_json, add_socket, add_verb, connect, run_async

if TYPE_CHECKING:
    from erofsd.api import MountInfo

STATE_COLOURS = {"complete": "green", "failed": "red"}


def add_parser(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = add_verb(
        subparsers,
        "ls",
        "list what is mounted: engine, state, fetched of total, waits, errors",
        "erofsd ls\nerofsd ls --json | jq -r '.[] | select(.state != \"complete\") | .dir'",
    )
    add_socket(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """List the mounts."""
    from erofsd.cli.output import print_json

    mounts = run_async(_fetch(args))
    if args.json:
        print_json(mounts)
    elif mounts:
        _print(mounts)
    return 0


async def _fetch(args: argparse.Namespace) -> list[MountInfo]:
    async with connect(args) as client:
        return await client.mounts()


def _print(mounts: list[MountInfo]) -> None:
    from erofsd.cli.output import colour, human, printable, table

    header = ("DIR", "REF", "ENGINE", "STATE", "VERIFIED", "FETCHED", "OF", "%", "WAITS", "ERRORS")
    rows = [
        (
            m.dir or "-",
            m.ref,
            m.engine,
            m.state,
            m.verified,
            human(m.fetched_bytes),
            human(m.total_bytes),
            f"{100 * m.fetched_bytes / m.total_bytes:.0f}" if m.total_bytes else "100",
            str(m.waits),
            str(m.errors),
        )
        for m in mounts
    ]
    head, *lines = table(header, rows, right=range(5, 10)).splitlines()
    print(head)
    for mount, line in zip(mounts, lines, strict=True):
        print(colour(line, STATE_COLOURS[mount.state]) if mount.state in STATE_COLOURS else line)
        if mount.last_error:
            print(colour(f"  last error: {printable(mount.last_error)}", "red"))
