"""Run `sglang-auf` commands from a benchmark. Each is a process that ends when the benchmark does."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Sequence

from benchmarks.harness.servers import die_with_parent
from sglang_auf.errors import TrainingError

logger = logging.getLogger(__name__)


def sglang_auf(arguments: Sequence[str], threads: int | None = None) -> None:
    """Run one command with its output on this terminal. Raises TrainingError when it fails.

    threads: threads that it computes with on a CPU; None: no limit. A Ctrl-C reaches the command too; this function
    then waits until the command has saved its work.
    """
    logger.info("sglang-auf %s", " ".join(arguments))
    process = subprocess.Popen(
        [sys.executable, "-m", "sglang_auf.cli", *arguments],
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
    if code:
        raise TrainingError(
            f"sglang-auf {arguments[0]} ended with exit code {code}",
            "exit code 0",
            "see its message above; the same command continues after what is done",
        )
