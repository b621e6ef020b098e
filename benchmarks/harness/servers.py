"""Servers that the benchmark starts itself, most through `python -m server`, and always ends."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from sglang_auf.errors import ServerError

log = logging.getLogger(__name__)

DRAIN_S = 30.0
POLL_S = 0.5
REST_S = 0.2
LOG_LINES = 20
PORTS_TRIED = 100
PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True, slots=True)
class Server:
    """A server that is up. pause: stop all its processes, so that an idle engine takes no CPU from its rival."""

    base_url: str
    process: subprocess.Popen[bytes]

    def pause(self) -> None:
        time.sleep(REST_S)  # the engine tidies up after its last answer; SGLang's watchdog minds a pause in the middle
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """End all its processes at once, as a machine that fails does."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        for process in family(self.process):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)


@contextlib.contextmanager
def awake(server: Server) -> Iterator[None]:
    """Let a paused server run, and pause it again."""
    server.resume()
    try:
        yield
    finally:
        server.pause()


def serve(
    profile: str,
    plain: bool,
    port: int | None = None,
    *,
    settings: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    log_file: Path,
    timeout_s: float = 900.0,
) -> contextlib.AbstractContextManager[Server]:
    """A server of a profile, as `launch` has it. settings: key=value, each passed as --set."""
    arguments = ["-m", "server", "--profile", profile]
    for setting in settings:
        arguments += ["--set", setting]
    if plain:
        arguments.append("--plain")
    return launch(arguments, port, environment=environment, log_file=log_file, timeout_s=timeout_s)


@contextlib.contextmanager
def launch(
    program: Sequence[str],
    port: int | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    log_file: Path,
    timeout_s: float = 900.0,
) -> Iterator[Server]:
    """Start a server and wait until it is ready; end it and every process it made on the way out.

    program: arguments of Python, without --host and --port. environment: variables added to this process's own.
    log_file: where its output goes. ServerError with the end of the log when it ends before it is ready, or is not
    ready within timeout_s.
    """
    port = port or free_port()
    arguments = [sys.executable, *program, "--host", "127.0.0.1", "--port", str(port)]
    log_file.parent.mkdir(parents=True, exist_ok=True)
    log.info("starting %s (log: %s)", " ".join(arguments[1:]), log_file)
    with log_file.open("wb") as output:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    try:
        base_url = f"http://127.0.0.1:{port}"
        _wait_until_ready(process, base_url, log_file, timeout_s)
        yield Server(base_url, process)
    finally:
        end(process)


def free_port() -> int:
    """A port that nobody listens at, from below those that Linux gives to connections. ServerError if none is found.

    A server binds its port only when its models are loaded, and the engines beside it open connections all the while.
    """
    for number in random.sample(range(20_000, 32_000), PORTS_TRIED):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", number))
            return number
    raise ServerError(f"{PORTS_TRIED} ports of 127.0.0.1 that cannot be bound", "a free one", "end what listens there")


def end(process: subprocess.Popen[bytes], drain_s: float = DRAIN_S) -> None:
    """SIGTERM and time to drain, then SIGKILL to whatever is left of the family and of its process group."""
    members = family(process)
    for member in members:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGCONT)  # a paused process would never see the SIGTERM
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(drain_s)
    for member in members:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The server's process and all its descendants; empty when it has ended."""
    try:
        leader = psutil.Process(process.pid)
        return [leader, *leader.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def die_with_parent() -> None:
    """Runs in the child before exec: should the benchmark itself be killed outright, the kernel ends the server."""
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait_until_ready(process: subprocess.Popen[bytes], base_url: str, log_file: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise _failed(f"the server ended with exit code {process.returncode} before it was ready", log_file)
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"{base_url}/health_generate", timeout=30.0).status_code == 200:
                return
        time.sleep(POLL_S)
    raise _failed(f"the server was not ready after {timeout_s:.0f} s", log_file)


def _failed(found: str, log_file: Path) -> ServerError:
    lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines()
    tail = "\n".join(lines[-LOG_LINES:])
    return ServerError(
        found,
        "a server that answers /health_generate",
        f"read {log_file}; if memory ran out, ask the servers one after the other (--mode sequential). "
        f"The log ends with:\n{tail}",
    )
