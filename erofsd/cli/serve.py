"""``erofsd serve``: the daemon, in the foreground."""

from __future__ import annotations

import argparse
from pathlib import Path

from erofsd.cli.options import Subparsers, absolute, add_config, add_socket, add_verb, load_config


def add_parser(subparsers: Subparsers[argparse.ArgumentParser]) -> None:
    """Register the verb."""
    parser = add_verb(
        subparsers,
        "serve",
        "run the daemon in the foreground",
        """
erofsd serve
erofsd serve --config ./config.toml --state-dir /srv/erofsd --log-level debug
""",
    )
    add_config(parser)
    add_socket(parser)
    parser.add_argument(
        "--state-dir",
        type=Path,
        metavar="DIR",
        help="blobs, bootstraps and mounts database (default: /var/lib/erofsd); ext4, XFS or btrfs",
    )
    parser.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        help="least severity to log (default: info)",
    )
    parser.add_argument(
        "--keep-mounts",
        action="store_true",
        default=None,
        help="at the end, leave mounts in place whose image is complete",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop."""
    import os
    import signal

    # What is mounted may hang on this process already, when it takes over from another: an order to end waits
    # until it can be followed. The keeper takes the block away.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1})

    import msgspec

    from erofsd.cli.machine import prepare_directories
    from erofsd.cli.options import SOCKET_VARIABLE
    from erofsd.daemon import keeper
    from erofsd.logging import configure_logging

    socket = args.socket or os.environ.get(SOCKET_VARIABLE)
    chosen = {
        "socket": socket and Path(absolute(socket)),
        "state_dir": args.state_dir and Path(absolute(args.state_dir)),
        "log_level": args.log_level,
        "keep_mounts": args.keep_mounts,
    }
    config = msgspec.structs.replace(load_config(args), **{k: v for k, v in chosen.items() if v is not None})
    prepare_directories(config.state_dir, config.socket)
    configure_logging(config.log_level)
    return keeper.main(config)
