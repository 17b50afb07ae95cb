"""The command line: one module per verb, which parses, calls and prints.

Each verb's module has ``add_parser(subparsers)`` and ``run(args) -> int`` and imports what it needs in
``run``, so that ``erofsd --help`` and shell completion stay quick.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

import erofsd
from erofsd.errors import ErofsdError

VERBS = (
    "serve",
    "mount",
    "umount",
    "ls",
    "prefetch",
    "inspect",
    "check",
    "build",
    "convert",
    "doctor",
    "quickstart",
)

EPILOG = """\
examples:
  erofsd doctor                                      can this machine do it?
  erofsd serve &                                     start the daemon
  erofsd mount registry.example/app:nydus /mnt/app   mount lazily, read at once
  erofsd ls                                          what is mounted, how much is here
  erofsd umount /mnt/app

exit codes: 0 done; 1 failed; 2 usage; 3 not possible on this kernel; 4 image or data refused;
            5 source unreachable or refused us. Manual: erofsd(1), `erofsd --man`
"""

INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="erofsd",
        description="Start containers and VMs before their EROFS image has arrived.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"erofsd {erofsd.__version__}")
    parser.add_argument("--man", action=_ShowManual, help="show the manual page and exit")
    verbs = parser.add_subparsers(title="verbs", dest="verb", metavar="VERB", required=True)
    for verb in VERBS:
        importlib.import_module(f"erofsd.cli.{verb}").add_parser(verbs)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    try:
        args = build_parser().parse_args(argv)
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except ErofsdError as exc:
        return report(exc)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough. Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception:
        traceback.print_exc()
        print("erofsd: this is a bug in erofsd: please report it with the lines above", file=sys.stderr)
        return 1


def report(exc: ErofsdError) -> int:
    """Print what the user should know of *exc*; returns its exit code."""
    message = " ".join(str(exc).split())
    print(f"erofsd: {message}", file=sys.stderr)
    if exc.hint:
        print(f"  hint: {exc.hint}", file=sys.stderr)
    return exc.exit_code


class _ShowManual(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from erofsd.cli.output import show_manual

        parser.exit(show_manual())
