"""`python -m server`: flags, messages, exit codes."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from server.__main__ import main
from server.profile import Profile
from sglang_auf.errors import ServerError

CHECKOUT = Path(__file__).parents[2]


class Serve:
    """server.launch.serve's stand-in."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: BaseException | None = None) -> None:
        self.error = error
        self.profile: Profile | None = None
        self.options: dict[str, Any] = {}
        monkeypatch.setattr("server.launch.serve", self)

    def __call__(self, profile: Profile, **options: Any) -> None:
        self.profile, self.options = profile, options
        if self.error is not None:
            raise self.error


def test_flags_reach_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    serve = Serve(monkeypatch)
    flags = ["--host", "::1", "--port", "4000", "--plain", "--api-key", "secret", "--set", "block_size=4", "--set"]
    assert main(["--profile", "smollm2-135m", *flags, "server_args.max_running_requests=2"]) == 0
    assert serve.profile is not None
    assert (serve.profile.host, serve.profile.port, serve.profile.block_size) == ("::1", 4000, 4)
    assert serve.profile.server_args["max_running_requests"] == 2
    assert serve.options == {"plain": True, "api_key": "secret"}


def test_a_profile_is_a_file_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    serve = Serve(monkeypatch)
    (tmp_path / "mine.yaml").write_text("extends: smollm2-135m\nblock_size: 4\n")
    monkeypatch.chdir(tmp_path)
    assert main(["--profile", "mine.yaml"]) == 0
    assert serve.profile is not None
    assert (serve.profile.block_size, serve.profile.served_model_name) == (4, "smollm2-135m")


def test_defaults_are_the_profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    serve = Serve(monkeypatch)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main([]) == 0
    assert serve.profile is not None
    assert (serve.profile.served_model_name, serve.profile.host) == ("smollm2-135m", "127.0.0.1")
    assert serve.options == {"plain": False, "api_key": None}


def test_the_key_comes_from_the_environment_unless_a_flag_gives_one(monkeypatch: pytest.MonkeyPatch) -> None:
    serve = Serve(monkeypatch)
    monkeypatch.setenv("SGLANG_AUF_API_KEY", "from the environment")
    assert main(["--profile", "smollm2-135m"]) == 0
    assert serve.options["api_key"] == "from the environment"
    assert main(["--profile", "smollm2-135m", "--api-key", "flag"]) == 0
    assert serve.options["api_key"] == "flag"


@pytest.mark.parametrize("key", ["", " ", "two words\n", "schlüssel", "\x07"])
def test_a_key_that_no_client_can_send_is_refused_before_anything_loads(
    key: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    serve = Serve(monkeypatch)
    assert main(["--profile", "smollm2-135m", "--api-key", key]) == 2
    monkeypatch.setenv("SGLANG_AUF_API_KEY", key)
    assert main(["--profile", "smollm2-135m"]) == 2
    assert serve.profile is None
    assert "an API key that is" in caplog.text
    assert not key.strip() or key not in caplog.text


def test_user_error_is_said_once_and_exits_2(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    Serve(monkeypatch, ServerError("port 1 is in use", "a free port", "another --port"))
    assert main(["--profile", "smollm2-135m"]) == 2
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == [
        "found: port 1 is in use; expected: a free port; to fix it: another --port"
    ]


def test_interrupt_is_no_stack_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    Serve(monkeypatch, KeyboardInterrupt())
    assert main(["--profile", "smollm2-135m"]) == 130


STOPPED = """
import os, signal, sys
from types import SimpleNamespace
from server.__main__ import main

def serve(*_, **__):
    os.kill(os.getpid(), signal.SIGTERM)

sys.modules["server.launch"] = SimpleNamespace(serve=serve)
try:
    main(["--profile", "smollm2-135m"])
finally:
    print("unwound")
"""


def test_sigterm_before_the_launch_unwinds() -> None:
    run = subprocess.run([sys.executable, "-c", STOPPED], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (143, "unwound\n")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "smollm2-135m"),
        (["--profile", "nonsense"], 2, "qwen3-8b"),
        (["--profile", "smollm2-135m", "--set", "nonsense=1"], 2, "unknown key nonsense"),
        (["--profile", "smollm2-135m", "--port", "many"], 2, "--port"),
    ],
)
def test_as_a_command(arguments: list[str], code: int, said: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "server", *arguments], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert run.returncode == code
    assert said in run.stdout + run.stderr
    assert "Traceback" not in run.stderr
