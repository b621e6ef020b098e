"""Run `sglang-auf` commands from a benchmark. Each is a process that ends when the benchmark does."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from benchmarks.harness.servers import die_with_parent
from sglang_auf.errors import TrainingError

logger = logging.getLogger(__name__)


def sglang_auf(
    arguments: Sequence[str],
    threads: int | None = None,
    *,
    codes: Collection[int] = (0,),
    output: Path | None = None,
) -> int:
    """Run one command, and return its exit code. Raises TrainingError where that is none of `codes`.

    threads: threads that it computes with on a CPU; None: no limit. output: file for what it prints; None: this
    terminal. Its messages and progress stay on the terminal. A Ctrl-C reaches the command too; this function then waits
    until the command has saved its work.
    """
    logger.info("sglang-auf %s", " ".join(arguments))
    with contextlib.ExitStack() as files:
        printed = None if output is None else files.enter_context(output.open("wb"))
        process = subprocess.Popen(
            [sys.executable, "-m", "sglang_auf.cli", *arguments],
            stdout=printed,
            preexec_fn=die_with_parent,
            env=os.environ if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
    try:
        code = process.wait()
    except KeyboardInterrupt:
        with contextlib.suppress(KeyboardInterrupt):
            process.wait()
        process.kill()
        raise
    if code not in codes:
        raise TrainingError(
            f"sglang-auf {arguments[0]} ended with exit code {code}",
            "exit code " + " or ".join(map(str, codes)),
            "see its message above; the same command continues after what is done",
        )
    return code
