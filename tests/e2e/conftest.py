"""Real SGLang engines and servers for the end-to-end tests: a tiny random model, and the shipped profile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.servers import free_port
from tests.support.tiny_models import write_drafter, write_target

ROOT = Path(__file__).parents[2]
START_SECONDS = 300


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("tiny") / "target")


@pytest.fixture(scope="session")
def tiny_drafter(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a drafter of random weights for the tiny target: tiny_drafter(block_size, **dflash_config)."""

    def make(block_size: int = 4, **dflash: Any) -> Path:
        return write_drafter(tmp_path_factory.mktemp("drafter") / "drafter", block_size, **dflash)

    return make


@contextmanager
def running(
    module_and_arguments: list[str], log: Path, port: int | None = None, **environment: str
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`python -m ... --port P` in a process group of its own, until GET /health answers 200; killed at the end.

    port: a free one if None.
    """
    port = port or free_port()
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *module_and_arguments, "--port", str(port)],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not healthy(url):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the server did not start (exit code {process.poll()}):\n{log.read_text()[-6000:]}")
            time.sleep(0.5)
        yield url, process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


@pytest.fixture(scope="session")
def start_server() -> Any:
    return running
