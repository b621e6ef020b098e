"""Fixtures of the training tests."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def in_fork() -> Iterator[Callable[..., list[int]]]:
    """Call a function of a test module in processes of its own: in_fork("module:function", ranks=2, key=value)."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.training_forks"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None

    def call(function: str, ranks: int = 1, **arguments: Any) -> list[int]:
        """Exit statuses, one a rank; negative is a signal."""
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps({"function": function, "ranks": ranks, "arguments": arguments}) + "\n")
        process.stdin.flush()
        statuses: list[int] = json.loads(process.stdout.readline())
        return statuses

    yield call
    process.stdin.close()
    process.wait()


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As forked runs are: on one thread, since sums of several are rounded in another order."""
    from accelerate.state import AcceleratorState

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(True)
