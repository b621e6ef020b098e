"""Fixtures that several test files share."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

if "PYTEST_XDIST_WORKER" in os.environ:
    # Each worker and its engines compute with one thread: several processes whose threads wait for each other actively
    # take many times as long. Set here, before anything imports torch.
    os.environ["OMP_NUM_THREADS"] = "1"

# A busy machine must not fail a test.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

START_SECONDS = 300
"""Importing SGLang takes 10 s on two free cores; a busy machine may need many times that."""


@pytest.hookimpl(tryfirst=True)  # before pytest looks at -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """End-to-end tests first: they are the longest, and what is short fills the workers up at the end."""
    for item in items:
        if "scripted_server" in getattr(item, "fixturenames", ()):
            item.add_marker("e2e")
    items.sort(key=lambda item: item.get_closest_marker("e2e") is None)


@pytest.fixture(scope="session")
def scripted_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a running scripted_server.py, one for all files: a start imports SGLang, which takes 10 s.

    It records no second answer to a prompt that it has seen, whichever file it came from.
    """
    directory = tmp_path_factory.mktemp("scripted")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = Path(__file__).parent / "support" / "scripted_server.py"
    log = directory / "log"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(script.parents[2]), os.environ.get("PYTHONPATH", "")])
    }
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, str(script), str(directory), str(port)], stdout=output, stderr=output, env=environment
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while not answers(address):
            if server.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the scripted server did not start ({server.poll()}):\n{log.read_text()[-4000:]}")
            time.sleep(0.2)
        yield address
    finally:
        server.kill()
        server.wait()


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/totals"):
            return True
    except (urllib.error.URLError, ConnectionError):
        return False
