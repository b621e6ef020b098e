"""python -m server --profile NAME_OR_FILE [--set key=value ...] [--host H] [--port N] [--plain] [--api-key K]

--check [--device-memory 48GiB]: print what the server would be and take, and start none.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from server.profile import PROFILES, Profile, default_profile, load_profile
from sglang_auf.env import API_KEY
from sglang_auf.errors import AufError, ConfigError
from sglang_auf.process import begin_server, end_on_sigterm
from sglang_auf.settings import settings_names


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m server", description="Serve a target with its block drafter: SGLang's OpenAI API, accelerated."
    )
    parser.add_argument(
        "--profile",
        metavar="NAME_OR_FILE",
        help=f"one of {', '.join(settings_names(PROFILES))}, or a YAML file of your own (default: qwen3-8b with CUDA, "
        "smollm2-135m without)",
    )
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="change one key of the profile: drafter=PATH, block_size=8, server_args.max_running_requests=16",
    )
    parser.add_argument("--host", help="address to listen on (default: the profile's, 127.0.0.1)")
    parser.add_argument("--port", type=int, help="port to listen on (default: the profile's)")
    parser.add_argument("--plain", action="store_true", help="serve the same target without the drafter")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        default=os.environ.get(API_KEY),
        help=f"ask for this bearer token on every route (default: ${API_KEY}, which `ps` does not show)",
    )
    parser.add_argument(
        "--check", action="store_true", help="run every check before the start, print the plan, and do not start"
    )
    parser.add_argument(
        "--device-memory",
        metavar="SIZE",
        help="with --check: of the CUDA device to plan for, 24GB or 24GiB (needed where there is none)",
    )
    return parser.parse_args(arguments)


def check_key(key: str | None) -> None:
    """Raise ConfigError for a key that no client could send in a header, or that asks for none at all."""
    if key is not None and not (key and key.isascii() and key.isprintable() and key == key.strip()):
        raise ConfigError(
            f"an API key that is {'empty' if not key else 'no plain text (its characters are not shown)'}",
            "letters, digits and signs of ASCII, without spaces around them",
            f"correct --api-key or ${API_KEY}; leave both out for a server without a key",
        )


def print_plan(profile: Profile, options: argparse.Namespace) -> None:
    from tabulate import tabulate

    from server.plan.device import choose, parse_memory

    here = choose(profile, None if options.device_memory is None else parse_memory(options.device_memory))
    from server.plan.report import report  # imports SGLang, which looks then for what `choose` has chosen

    lines = report(profile, here, plain=options.plain, api_key=options.api_key)
    print(tabulate(lines, tablefmt="plain", disable_numparse=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 after a drained SIGTERM or a --check that found nothing wrong, 2 for what the user can fix, 143 for
    SIGTERM before the server was up."""
    end_on_sigterm()
    options = parse(arguments)
    level = logging.WARNING if options.check else logging.INFO  # the plan is what --check has to say
    logging.basicConfig(level=level, format="[%(asctime)s] %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # one line for every poll of the probe otherwise
    flags = {key: value for key in ("host", "port") if (value := getattr(options, key)) is not None}
    try:
        check_key(options.api_key)
        profile = load_profile(options.profile or default_profile(), options.overrides, flags)
        if options.device_memory is not None and not options.check:
            raise ConfigError("--device-memory without --check", "--check, which plans for a device of that size")
        if options.check:
            print_plan(profile, options)
            return 0
        if arguments is None and profile.device == "cpu":
            begin_server()
        from server.launch import serve  # SGLang takes seconds to import; a typing mistake should not wait for it

        serve(profile, plain=options.plain, api_key=options.api_key)
    except AufError as error:
        logging.getLogger("server").error("%s", error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
