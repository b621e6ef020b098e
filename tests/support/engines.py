"""Run jobs on a real SGLang engine in a new process (tests/support/engine_runner.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from sglang_auf.env import FORK

RUNNER = Path(__file__).with_name("engine_runner.py")
TIMEOUT_SECONDS = 1800
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""For engines of tiny models, whose products take longer to share between threads than to compute. Where other
processes want the cores, the threads wait for each other actively and such an engine becomes ten times slower."""


def run_engine(scratch: Path, engine: dict[str, Any], jobs: list[dict[str, Any]], **environment: str) -> Any:
    """The results of `jobs`, one list per job, from an engine of a tiny model with the arguments `engine`."""
    scratch.mkdir(parents=True, exist_ok=True)
    out = scratch / "out.json"
    done = subprocess.run(
        [sys.executable, str(RUNNER)],
        input=json.dumps({"engine": engine, "jobs": jobs, "out": str(out)}).encode(),
        capture_output=True,
        timeout=TIMEOUT_SECONDS,
        env=os.environ | ONE_THREAD | {FORK.name: "1"} | environment,
        check=False,
    )
    assert out.exists(), done.stderr.decode()[-6000:]
    return json.loads(out.read_text())
