"""Servers that the benchmark starts itself, most of them with `python -m server`, and always ends."""

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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.harness.results import ROOT
from sglang_auf.errors import ServerError
from sglang_auf.settings import apply_override, find_settings, merged, read_settings
from sglang_auf.training.generation.client import is_local, tls

logger = logging.getLogger(__name__)

PROFILES = ROOT / "server" / "profiles"
DRAIN_S = 30.0
KILLED_S = 10.0
POLL_S = 0.5
REST_S = 0.2
LOG_LINES = 20
PORTS_TRIED = 100
PR_SET_PDEATHSIG = 1
VARIABLE = "env."
"""How a setting of a server begins that is a variable of its environment."""
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True, slots=True)
class Server:
    """A server that is up. base_url: without /v1. process: the one that was started."""

    base_url: str
    process: subprocess.Popen[bytes]

    def pause(self) -> None:
        """Stop all its processes, so that an idle engine takes no CPU from its rival."""
        time.sleep(REST_S)  # the engine still works after its last answer, and SGLang's watchdog would see the pause
        _signal(family(self.process), signal.SIGSTOP)

    def resume(self) -> None:
        _signal(family(self.process), signal.SIGCONT)

    def kill(self) -> None:
        """End all its processes at once, as a machine that fails does."""
        _signal(family(self.process), signal.SIGKILL)


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
    """`launch` a server of a profile, one of ours by name or a file. plain: without a drafter.

    settings: key=value, each passed as --set, or env.NAME=value, a variable of the server's environment.
    """
    of_profile, variables = split_settings(settings)
    arguments = ["-m", "server", "--profile", profile]
    for setting in of_profile:
        arguments += ["--set", setting]
    if plain:
        arguments.append("--plain")
    variables = {**(environment or {}), **variables}
    return launch(arguments, port, environment=variables, log_file=log_file, timeout_s=timeout_s)


def split_settings(settings: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """Settings of a profile (key=value), and the variables of a server's environment that are among them."""
    of_profile: list[str] = []
    variables: dict[str, str] = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name.startswith(VARIABLE) and name != VARIABLE:
            variables[name.removeprefix(VARIABLE)] = value
        else:
            of_profile.append(setting)
    return of_profile, variables


def profile_content(path_or_name: str, settings: Iterable[str] = ()) -> dict[str, Any]:
    """The keys of a profile, and of those that it extends, with `settings` on top; {} where there is no such profile.

    A server that starts checks all of it. Raises ConfigError for a file that cannot be read.
    """
    if find_settings(path_or_name, PROFILES) is None:
        return {}
    content: dict[str, Any] = reduce(merged, (layer for _, layer in read_settings(path_or_name, PROFILES, "profile")))
    for setting in split_settings(settings)[0]:
        apply_override(setting, content)
    return content


@contextlib.contextmanager
def launch(
    program: Sequence[str],
    port: int | None = None,
    *,
    environment: Mapping[str, str] | None = None,
    log_file: Path,
    timeout_s: float = 900.0,
) -> Iterator[Server]:
    """Start a server and wait until it is ready. After the block, end it and every process that it started.

    program: arguments of Python, without --host and --port. port: None for a free one. environment: variables added to
    those of this process. log_file: where its output goes. Raises ServerError, with the end of the log, when the server
    ends before it is ready or is not ready within timeout_s.
    """
    port = port or free_port()
    arguments = [sys.executable, *program, "--host", "127.0.0.1", "--port", str(port)]
    log_file.parent.mkdir(parents=True, exist_ok=True)
    logger.info("starting %s (log: %s)", " ".join(arguments[1:]), log_file)
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
    """A port on which nobody listens. Raises ServerError if none is found.

    It is below the ports that Linux gives to connections: a server binds its port only after it has loaded its models,
    and other engines open connections in the meantime.
    """
    for number in random.sample(range(20_000, 32_000), PORTS_TRIED):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", number))
            return number
    raise ServerError(f"{PORTS_TRIED} ports of 127.0.0.1 that cannot be bound", "a free one")


def end(process: subprocess.Popen[bytes], drain_s: float = DRAIN_S) -> None:
    """Ask a server to end, kill what is left of its family and its process group, and wait until the family has ended.

    drain_s: seconds that the server has for the requests in flight.
    """
    members = family(process)
    _signal(members, signal.SIGCONT)  # a paused process would never see the SIGTERM
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(drain_s)
    _signal(members, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + KILLED_S
    while any(map(_runs, members)) and time.monotonic() < deadline:
        time.sleep(0.05)


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """A process and all its descendants; empty when it has ended."""
    try:
        leader = psutil.Process(process.pid)
        return [leader, *leader.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _runs(process: psutil.Process) -> bool:
    """Whether a process has not ended. One that ended and that its parent did not ask after holds nothing any more."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _signal(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[None]:
    """So many processes that want a core each, as other programs of a shared machine do."""
    busy = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(busy, preexec_fn=die_with_parent) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def die_with_parent() -> None:
    """Run in a child before exec, so that the kernel ends it when the benchmark itself is killed."""
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait_until_ready(process: subprocess.Popen[bytes], base_url: str, log_file: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise _failed(f"the server ended with exit code {process.returncode} before it was ready", log_file)
        with contextlib.suppress(httpx.HTTPError):
            url = f"{base_url}/health_generate"
            if httpx.get(url, timeout=30.0, verify=tls(), trust_env=not is_local(url)).status_code == 200:
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
