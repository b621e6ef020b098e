"""Peak memory of one step, in a process that does nothing else.

`python -m benchmarks.training.step_memory` reads a MemoryJob from standard input and prints bytes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Literal

from benchmarks.harness.results import ROOT
from benchmarks.training.peak_memory import CLEAR_REFS, ENVIRONMENT, peak_bytes
from sglang_auf.errors import ConfigError, TrainingError
from sglang_auf.settings import Settings


class MemoryJob(Settings):
    """What to measure: one variant on a batch of rows x length tokens with `anchors` blocks in each row."""

    shape: str
    rows: int
    length: int
    anchors: int
    variant: str
    r_active: float
    device: str
    precision: Literal["bf16", "fp32"]


def measured_peak(job: MemoryJob) -> int:
    """Bytes beyond weights, tables and batch, gradients included. Raises TrainingError if the process fails."""
    if job.device == "cpu" and not CLEAR_REFS.exists():
        raise ConfigError("a system without " + str(CLEAR_REFS), "Linux", "measure there, or with --device cuda")
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.training.step_memory"],
        input=job.model_dump_json(),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
    )
    if ended.returncode:
        raise TrainingError(
            f"measuring {job.variant} on {job.shape} ended with {ended.returncode}: {ended.stderr.strip()[-400:]}",
            "exit code 0 (-9: the machine has too little memory)",
            "measure a smaller batch or fewer shapes",
        )
    return int(ended.stdout)


def _measure(job: MemoryJob) -> int:
    from dataclasses import replace

    from benchmarks.training.step_shapes import SHAPES
    from benchmarks.training.step_variants import Bench

    shape = replace(SHAPES[job.shape], rows=job.rows, length=job.length, anchors=job.anchors)
    bench = Bench(shape, job.device, job.precision)
    batch = bench.batch(shape, job.r_active, seed=1)
    bench.run(job.variant, batch)  # warm up: what libraries keep, such as kernels, is not memory of the step
    bench.drop_gradients()
    return peak_bytes(lambda: bench.run(job.variant, batch), job.device)


if __name__ == "__main__":
    print(_measure(MemoryJob.model_validate_json(sys.stdin.read())))
