"""How rival_steps.py talks to a driver: lines of JSON over the driver's standard input and output.

The driver reads a job and answers what it prepared, or why it could not. Then it reads batch numbers and answers each
with the time of one step. For a job of memory it answers the peak of one step instead, and ends. Only torch and the
standard library are used, because a driver runs in another package's environment.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import torch

from benchmarks.training.peak_memory import peak_bytes

DriverJob = dict[str, Any]
"""drafter: as DrafterConfig.to_checkpoint gives it. length, anchors, gamma, r_active, step, measure, ...: as flags."""

Step = Callable[[], torch.Tensor]
"""Runs forward and backward, and returns the loss."""

MakeStep = Callable[[int, int, int], Step]
"""(length, anchors, batch number) -> the step on that batch. It leaves no gradients."""

WARM_UP = (32, 2, 0)


def serve(
    package: str, attentions: Sequence[str], prepare: Callable[[DriverJob, str], MakeStep], note: str = ""
) -> None:
    """Answer rival_steps.py until it closes the input.

    attentions: implementations to try; the first that runs is used. note: what a reader of the report must know.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print goes to the log

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    job: DriverJob = json.loads(sys.stdin.readline())
    refused: dict[str, str] = {}
    for attention in attentions:
        try:
            make_step = prepare(job, attention)
            make_step(*WARM_UP)()
            break
        except Exception as error:
            refused[attention] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    else:
        answer(refused=refused, error="no attention implementation runs: " + next(iter(refused.values())))
        return
    answer(refused=refused, attention=attention, version=_version(package), torch=torch.__version__, note=note)
    size = (job["length"], job["anchors"])
    if job["measure"] == "memory":
        make_step(*size, 1)()  # warm up: what libraries keep, such as kernels, is not memory of the step
        answer(peak=peak_bytes(make_step(*size, 1), job["device"]))
        return
    for line in sys.stdin:
        step = make_step(*size, int(line))
        _wait(job)
        began = time.perf_counter()
        loss = step()
        _wait(job)
        answer(seconds=time.perf_counter() - began, loss=float(loss.detach()))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _wait(job: DriverJob) -> None:
    if job["device"] == "cuda":
        torch.cuda.synchronize()
