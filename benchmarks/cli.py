"""The command line: a table of commands. Only the module of the command that was asked for is imported.

Exit codes. 0: done; 1: done, but requests failed, answers were not lossless or not identical, or a run differs from its
walk; 2: the user has something to fix; 130: interrupted.
"""

from __future__ import annotations

import argparse
import errno
import logging
import sys
from collections.abc import Sequence
from pkgutil import resolve_name
from typing import NamedTuple, get_type_hints

from sglang_auf.errors import AufError, ConfigError
from sglang_auf.flags import add_flags, from_flags

CANNOT_BE_WRITTEN = {
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EEXIST, errno.EISDIR),
    *(errno.ENOSPC, errno.EDQUOT),
}


class Command(NamedTuple):
    """function: takes a config, whose class makes the flags, and returns a Report. positional: fields with no flag."""

    function: str
    help: str
    positional: tuple[str, ...] = ()


COMMANDS = {
    "run": Command("benchmarks.serving.run:ask_server", "tau, speed and latency of a server that is up"),
    "compare": Command(
        "benchmarks.serving.compare:compare_servers",
        "AUF against plain decoding: tau, speed-up, same answers",
    ),
    "lossless": Command(
        "benchmarks.stats.lossless_check:check_runs",
        "have two runs the same answers, or one run the target's own?",
        ("speculating", "plain"),
    ),
    "identity": Command(
        "benchmarks.serving.identity:measure_identity",
        "does load, block or drafter change an answer?",
    ),
    "speed": Command("benchmarks.serving.speed:measure_speed", "AUF, plain decoding and DFLASH by concurrency"),
    "variants": Command(
        "benchmarks.serving.variants:measure_variants", "which block, drafter, setting is fastest here?"
    ),
    "sweep": Command("benchmarks.serving.sweep:measure_sweep", "speed-up and latency by concurrency or rate"),
    "report": Command("benchmarks.reports.report:report_runs", "one page of runs that were made", ("runs",)),
    "study": Command("benchmarks.studies.report:measure_study", "compare training arms over seeds", ("study",)),
    "walk": Command(
        "benchmarks.studies.served_walk:walk_run", "does serving reach the tau that training computes?", ("run",)
    ),
    "soak": Command("benchmarks.serving.soak:measure_soak", "mixed load for minutes, nothing wrong"),
    "failover": Command(
        "benchmarks.serving.failover:measure_failover", "a server killed behind the router, nothing lost"
    ),
    "write-shape": Command("benchmarks.shapes.write:write_shape", "random models of Qwen3-8B's shape"),
    "serve-shape": Command("benchmarks.shapes.serve:serve_shape", "serve them: identity, memory, cost of a step"),
    "step": Command("benchmarks.training.step:measure_step", "time and memory of a training step"),
    "rival-steps": Command(
        "benchmarks.training.rival_steps:measure_rival_steps", "a training step against other packages'"
    ),
    "overlap": Command("benchmarks.training.overlap:measure_overlap", "benchmark prompts in training data"),
    "train-demo": Command("benchmarks.training.demo:train_demo", "train a drafter and serve it"),
    "adapt-demo": Command("benchmarks.training.adapt_demo:adapt_demo", "a drafter learns from its own traffic"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, write and print its report. Returns the exit code."""
    options = vars(_parser(sys.argv[1:] if arguments is None else arguments).parse_args(arguments))
    function, config = options.pop("function"), options.pop("config")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        settings = from_flags(config, options)
        report = function(settings)
        place = report.write(settings.out)
    except AufError as error:
        return _failed(error)
    except OSError as error:
        if error.errno not in CANNOT_BE_WRITTEN:
            raise
        expected = "a place that can be written, with room"
        return _failed(ConfigError(str(error), expected, "correct it, or give another with --out"))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print("\n\n".join(filter(None, [report.text().rstrip("\n"), f"written to {place}"])))
    return 0 if report.passed else 1


def _failed(error: AufError) -> int:
    print(f"error: {error}", file=sys.stderr)
    return error.exit_code


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """Parser of all commands, with the flags of the one that is in `arguments`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Tau, speed and losslessness, measured.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    asked = next((word for word in arguments if word in COMMANDS), None)
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=command.help)
        if name == asked:
            function = resolve_name(command.function)
            config = get_type_hints(function)["config"]
            subparser.description = config.__doc__
            subparser.set_defaults(function=function, config=config)
            add_flags(subparser, config, command.positional)
    return parser
