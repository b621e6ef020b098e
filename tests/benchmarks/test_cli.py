from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name
from typing import get_type_hints

import pytest

from benchmarks.cli import COMMANDS, main
from benchmarks.harness.config import CommandConfig, RunConfig
from benchmarks.harness.results import Report

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--concurrency", "0"], "--concurrency"),
        (["--temperature", "-1"], "--temperature"),
        (["--temperature", "warm"], "--temperature"),
        (["--max-tokens", "0"], "--max-tokens"),
        (["--limit", "0"], "--limit"),
        (["--thinking", "maybe"], "--thinking"),
        (["--tasks", ","], "--tasks"),
        (["--raw-prompts"], "--raw-prompts"),
        (["--prompts", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--base-url", "localhost:30000"], "--base-url"),
    ],
)
def test_a_bad_value_names_its_flag(flags: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--base-url", "http://127.0.0.1:9", *flags]) == 2
    assert named in capsys.readouterr().err


def test_an_unknown_flag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["run", "--base-url", "http://127.0.0.1:9", "--concurency", "2"])
    assert error.value.code == 2


def test_an_unknown_task_is_refused_before_any_server_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--base-url", "http://127.0.0.1:9", "--tasks", "gsm9k"]) == 2
    assert "gsm9k" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_the_server_may_be_named_with_or_without_v1(url: str) -> None:
    assert RunConfig(base_url=url).base_url == "http://h:1"


def help_of(commands: list[list[str]], unwanted: set[str]) -> str:
    """What `--help` prints after each of `commands`, in one process that must load none of the unwanted packages."""
    code = (
        "import sys; from benchmarks.cli import main\n"
        f"for command in {commands}:\n"
        "    try: main([*command, '--help'])\n"
        "    except SystemExit: pass\n"
        f"sys.exit(', '.join({unwanted} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_list_of_commands_needs_no_heavy_library() -> None:
    shown = help_of([[]], {"openai", "torch", "sglang", "huggingface_hub", "psutil", "numpy", "matplotlib"})
    assert all(f"    {name}" in shown for name in COMMANDS)


def test_help_of_every_command_needs_neither_torch_nor_sglang() -> None:
    shown = help_of([[name] for name in COMMANDS], {"torch", "sglang", "transformers", "datasets", "matplotlib"})
    assert all(f"usage: python -m benchmarks {name} [-h]" in shown for name in COMMANDS)
    assert "--base-url" in shown
    assert "(default: 512)" in shown


def test_every_command_returns_a_report() -> None:
    for command in COMMANDS.values():
        function = resolve_name(command.function)
        types = get_type_hints(function)
        assert issubclass(types["config"], CommandConfig)
        assert issubclass(types["return"], Report)
        assert types["return"].STEM
