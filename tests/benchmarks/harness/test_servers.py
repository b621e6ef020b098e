from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from benchmarks.harness.servers import end, neighbours, profile_content, serve
from sglang_auf.errors import ServerError

pytestmark = pytest.mark.usefixtures("fake_server_program")


def gone(pid: int) -> bool:
    """Ended; a zombie that nobody has collected yet counts."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def becomes(process: psutil.Process, status: str) -> bool:
    deadline = time.monotonic() + 60
    while process.status() != status and time.monotonic() < deadline:
        time.sleep(0.05)
    return process.status() == status


def child_of(log_file: Path) -> int:
    return int(log_file.read_text().split()[1])


def test_a_server_is_up_inside_and_gone_outside(tmp_path: Path) -> None:
    log_file = tmp_path / "logs" / "server.log"
    with serve("toy", plain=True, settings=["a=1", "b=2"], log_file=log_file) as server:
        info = httpx.get(f"{server.base_url}/server_info").json()
        assert info["speculative_algorithm"] is None
        pid, child = server.process.pid, child_of(log_file)
        assert not gone(pid)
        assert not gone(child)
    assert "a=1 b=2" in log_file.read_text()
    assert gone(pid)
    assert gone(child)


def test_a_server_is_awaited_without_a_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with serve("toy", plain=True, log_file=tmp_path / "log", timeout_s=60):
        pass


def test_a_setting_may_be_a_variable_of_the_server(tmp_path: Path) -> None:
    settings = ["a=1", "env.AUF_TEST_LETTERS=x=y", "env.=the server refuses it"]
    with serve(
        "toy", plain=True, settings=settings, environment={"AUF_TEST_MORE": "1"}, log_file=tmp_path / "log"
    ) as up:
        variables = psutil.Process(up.process.pid).environ()
    assert (variables["AUF_TEST_LETTERS"], variables["AUF_TEST_MORE"]) == ("x=y", "1")
    log = (tmp_path / "log").read_text()
    assert "a=1 env.=the server refuses it" in log
    assert "AUF_TEST" not in log


def test_a_profile_is_read_with_those_that_it_extends_and_settings_on_top(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: smollm2-135m\nserver_args: {max_running_requests: 4}\n")
    found = profile_content(str(tmp_path / "mine.yaml"), ["port=1", "env.A=1"])
    ours = profile_content("smollm2-135m")
    assert found == {**ours, "port": 1, "server_args": {**ours["server_args"], "max_running_requests": 4}}
    assert profile_content("toy", ["port=1"]) == {}


def test_neighbours_are_busy_inside_and_gone_outside() -> None:
    before = set(psutil.Process().children())
    with pytest.raises(RuntimeError), neighbours(2):
        busy = set(psutil.Process().children()) - before
        assert len(busy) == 2
        begun = {process: process.cpu_times().user for process in busy}
        deadline = time.monotonic() + 60
        while any(process.cpu_times().user <= begun[process] for process in busy) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert all(process.cpu_times().user > begun[process] for process in busy)
        raise RuntimeError
    assert all(gone(process.pid) for process in busy)


def test_a_server_is_ended_when_the_work_with_it_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), serve("toy", plain=False, log_file=tmp_path / "log") as server:
        raise RuntimeError
    assert gone(server.process.pid)
    assert gone(child_of(tmp_path / "log"))


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    why = pytest.raises(ServerError, match=r"(?s)exit code 1.*the drafter does not fit the target")
    with why, serve("broken", plain=False, log_file=tmp_path / "log"):
        pytest.fail("it started")


def test_a_server_that_is_never_ready_is_ended(tmp_path: Path) -> None:
    package = tmp_path / "server" / "__main__.py"
    package.write_text("import os, time\nprint('pid', os.getpid(), flush=True)\ntime.sleep(600)\n")
    why = pytest.raises(ServerError, match="not ready after")
    with why, serve("toy", plain=False, log_file=tmp_path / "log", timeout_s=1.5):
        pytest.fail("it started")
    assert gone(child_of(tmp_path / "log"))


def test_a_paused_server_stands_still_and_goes_on(tmp_path: Path) -> None:
    with serve("toy", plain=False, log_file=tmp_path / "log") as server:
        family = [psutil.Process(server.process.pid), psutil.Process(child_of(tmp_path / "log"))]
        server.pause()
        assert all(becomes(process, psutil.STATUS_STOPPED) for process in family)
        with pytest.raises(httpx.TimeoutException):
            httpx.get(f"{server.base_url}/server_info", timeout=0.3)
        server.resume()
        assert httpx.get(f"{server.base_url}/server_info", timeout=60).status_code == 200
        server.pause()
    assert all(gone(process.pid) for process in family)


def test_a_process_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('x', flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        process.stdout.readline()
        end(process, drain_s=0.2)
    assert process.returncode == -signal.SIGKILL
