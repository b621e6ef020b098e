"""`sglang-auf` commands run from a benchmark, each in a process of its own that ends with it."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Sequence

from benchmarks.harness.servers import die_with_parent
from sglang_auf.errors import TrainingError

log = logging.getLogger(__name__)


def sglang_auf(arguments: Sequence[str], threads: int | None = None) -> None:
    """Run one command, its output on this terminal. Raises TrainingError where it fails.

    threads: how many it may compute with on a CPU; None: as many as it likes.
    Interrupted, it waits for the command, which has had the same Ctrl-C and saves what it has.
    """
    log.info("sglang-auf %s", " ".join(arguments))
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
            "see its message above; the same command goes on from what is done",
        )
