"""``erofsd mount``: mount an image lazily."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from erofsd.cli.options import (
    Subparsers,
    absolute,
    absolute_blobs,
    absolute_ref,
    add_config,
    add_json,
    add_socket,
    add_source,
    add_verb,
    connect,
    load_config,
    run_async,
)
from erofsd.errors import NotPossibleHere, UsageError

if TYPE_CHECKING:
    from erofsd.api import MountRequest

ENGINES = ("auto", "cachefiles", "fanotify", "nbd")
PREFETCH = ("none", "hints", "all")

NOT_YET = {
    "nbd": "the nbd engine is not in this version of erofsd",
}


def add_parser(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = add_verb(
        subparsers,
        "mount",
        "mount an image lazily: it can be read at once, data comes when read",
        """
erofsd mount registry.example/app:nydus /mnt/app
erofsd mount oci:/images/layout:zstd /mnt/app --prefetch all
erofsd mount file:/images/app.boot /mnt/app --blobs /images/blobs
erofsd mount --standalone docker://127.0.0.1:5000/app:nydus /mnt/app
""",
    )
    add_source(parser)
    parser.add_argument("dir", metavar="DIR", nargs="?", help="directory to mount on")
    parser.add_argument(
        "--engine", choices=ENGINES, default="auto", help="kernel interface (default: auto, by probing)"
    )
    parser.add_argument(
        "--prefetch",
        choices=PREFETCH,
        default="hints",
        help="what to fetch before it is read (default: hints, what the image asks for)",
    )
    parser.add_argument(
        "--standalone",
        action="store_true",
        help="without a daemon: serve this one mount in the foreground until DIR is unmounted",
    )
    parser.add_argument(
        "--prepare", action="store_true", help="register the image only, print the mount(8) command for it"
    )
    add_socket(parser)
    add_config(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Mount; print what was mounted."""
    if args.prepare and (args.dir or args.standalone):
        raise UsageError("mount --prepare: mounts nothing, so neither DIR nor --standalone")
    if not args.prepare and not args.dir:
        raise UsageError("mount: DIR is missing", hint="erofsd mount REF DIR")
    if reason := NOT_YET.get(args.engine):
        raise NotPossibleHere(
            f"mount --engine {args.engine}: {reason}",
            hint="use --engine auto; `erofsd doctor` says what works on this machine",
        )
    return _standalone(args) if args.standalone else run_async(_mount(args))


async def _mount(args: argparse.Namespace) -> int:
    from erofsd.cli.output import human, print_json
    from erofsd.client import DaemonUnreachable

    request = _request(args)
    try:
        async with connect(args) as client:
            mounted = await client.mount(request)
    except DaemonUnreachable as exc:
        raise DaemonUnreachable(
            str(exc),
            hint=f"{exc.hint}; or serve this one mount without a daemon: add --standalone",
        ) from exc
    if args.json:
        print_json(mounted)
    elif args.prepare:
        print(mounted.command)
    else:
        how = f"{mounted.format}, {mounted.engine}, verified: {mounted.verified}"
        here = f"{human(mounted.fetched_bytes)} of {human(mounted.total_bytes)} here"
        print(f"{mounted.ref} on {mounted.dir} ({how}): {here}")
    return 0


def _standalone(args: argparse.Namespace) -> int:
    from erofsd.cli.machine import prepare_directories
    from erofsd.daemon import keeper
    from erofsd.logging import configure_logging

    config = load_config(args)
    prepare_directories(config.state_dir, config.state_dir / "api.sock")
    configure_logging(config.log_level)
    return keeper.standalone(config, _request(args))


def _request(args: argparse.Namespace) -> MountRequest:
    from erofsd.api import MountRequest

    return MountRequest(
        ref=absolute_ref(args.ref),
        dir=absolute(args.dir) if args.dir else "",
        engine=args.engine,
        blobs=absolute_blobs(args.blobs),
        prefetch=args.prefetch,
        plain_http=args.plain_http,
        prepare=args.prepare,
    )
