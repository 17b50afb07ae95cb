"""``erofsd umount``: unmount and let go."""

from __future__ import annotations

import argparse
import os

from erofsd.cli.options import Subparsers, absolute_ref, add_socket, add_verb, connect, run_async


def add_parser(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = add_verb(
        subparsers,
        "umount",
        "unmount an image; what was fetched stays for the next mount",
        "erofsd umount /mnt/app",
    )
    parser.add_argument(
        "dir",
        metavar="DIR",
        nargs="+",
        help="directory that an image is mounted on, or REF of a registered one",
    )
    add_socket(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Unmount each directory."""
    return run_async(_umount(args, [_target(each) for each in args.dir]))


def _target(word: str) -> str:
    """A directory made absolute, or a reference as `mount --prepare` was given it."""
    if os.path.exists(word) or word.startswith(("/", ".")):
        return os.path.realpath(word)
    return absolute_ref(word)


async def _umount(args: argparse.Namespace, directories: list[str]) -> int:
    async with connect(args) as client:
        for directory in directories:
            await client.unmount(directory)
    return 0
