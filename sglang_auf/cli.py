"""The `sglang-auf` command: prepare a target, check a drafter against one."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from sglang_auf import __version__
from sglang_auf.errors import AufError


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 with one message on stderr for what the user can mend."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # one line for every request to the hub otherwise
    try:
        if options.command == "prepare":
            return _prepare(options)
        return _check(options)
    except AufError as error:
        print(f"sglang-auf {options.command}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sglang-auf", description="Tools around drafters trained with AUF.")
    parser.add_argument("--version", action="version", version=f"sglang-auf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    prepare = commands.add_parser("prepare", help="make a target model ready to serve, once")
    prepare.add_argument("name", metavar="NAME", help="the target: smollm2-135m")
    prepare.add_argument("--out", metavar="DIR", type=Path, help="directory to make (default: in the user's cache)")

    check = commands.add_parser("check", help="check a drafter and its card against a target; no weights are loaded")
    check.add_argument("drafter", metavar="DRAFTER", help="directory or hub id")
    check.add_argument("target", metavar="TARGET", help="directory, hub id or prepared target")
    return parser


def _prepare(options: argparse.Namespace) -> int:
    from sglang_auf.targets import prepare

    print(prepare(options.name, options.out))
    return 0


def _check(options: argparse.Namespace) -> int:
    from sglang_auf.card import check_drafter
    from sglang_auf.targets import resolve

    checked = check_drafter(options.drafter, resolve(options.target))
    for name, value in checked.card.model_dump(mode="json").items():
        print(f"{name:20} {'unknown' if value is None else value}")
    for warning in checked.warnings:
        print(f"warning: {warning}")
    print(f"{options.drafter} fits {options.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
