"""Run jobs on a real SGLang engine in a process of its own (tests/support/engine_runner.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from sglang_auf.env import FORK
from sglang_auf.process import ENVIRONMENT

RUNNER = Path(__file__).with_name("engine_runner.py")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""For engines of tiny models, whose products take longer to share between threads than to compute. Where other
processes want the cores, threads that wait for each other make such an engine ten times slower."""


def run_engine(
    scratch: Path,
    engine: dict[str, Any],
    jobs: list[dict[str, Any]],
    *,
    features: Path | None = None,
    **environment: str,
) -> Any:
    """The results of `jobs`, one list per job, from an engine of a tiny model with the arguments `engine`.

    features: where to write the hidden states that the drafter is given (engine_runner.py).
    """
    scratch.mkdir(parents=True, exist_ok=True)
    out, log = scratch / "out.json", scratch / "log"
    # Our own variables are read when they are needed, all others perhaps when a program begins.
    at_start = tuple(sorted((name, value) for name, value in environment.items() if not name.startswith("SGLANG_AUF_")))
    runner = _runner(at_start)
    task = {"engine": engine, "jobs": jobs, "out": str(out), "log": str(log), "environment": environment}
    task["features"] = None if features is None else str(features)
    assert runner.stdin is not None and runner.stdout is not None
    runner.stdin.write(json.dumps(task) + "\n")
    runner.stdin.flush()
    status = runner.stdout.readline()
    assert status and out.exists(), f"{status}{log.read_text()[-6000:] if log.exists() else ''}"
    return json.loads(out.read_text())


@cache
def _runner(environment: tuple[tuple[str, str], ...]) -> subprocess.Popen[str]:
    """The process that starts the engines of these variables. It ends when this process closes its input."""
    return subprocess.Popen(
        [sys.executable, str(RUNNER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=ENVIRONMENT | os.environ | ONE_THREAD | {FORK.name: "1"} | dict(environment),  # as process.begin_server
    )
