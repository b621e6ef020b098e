from __future__ import annotations

import errno
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import ClassVar, get_args, get_type_hints

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


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException | None], None]:
    """Has `run` raise an error, or return a report."""

    class Done(Report):
        STEM: ClassVar[str] = "done"

    def set_up(error: BaseException | None) -> None:
        def function(config: RunConfig) -> Done:
            if error is not None:
                raise error
            return Done()

        function.__annotations__ = {"config": RunConfig, "return": Done}
        monkeypatch.setattr("benchmarks.cli.resolve_name", lambda name: function)

    return set_up


def test_a_place_that_cannot_be_written_is_an_error_and_not_a_traceback(
    command: Callable[[BaseException | None], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (file := tmp_path / "notes.txt").write_text("mine")
    read_only = OSError(errno.EROFS, "Read-only file system", "/mnt/runs")
    for error, out in ((None, file), (None, file / "run"), (read_only, tmp_path / "run")):
        command(error)
        assert main(["run", "--base-url", "http://127.0.0.1:9", "--out", str(out)]) == 2
        said = capsys.readouterr().err
        assert ("/mnt/runs" if error else str(file)) in said
        assert "give another with --out" in said
    assert file.read_text() == "mine"


def test_an_error_that_is_no_users_keeps_its_traceback(command: Callable[[BaseException | None], None]) -> None:
    command(BrokenPipeError(errno.EPIPE, "Broken pipe"))
    with pytest.raises(BrokenPipeError):
        main(["run", "--base-url", "http://127.0.0.1:9"])


@pytest.mark.parametrize(
    "command",
    [["report", "nowhere"], ["study", "nowhere.yaml"], ["study", "nowhere.yaml", "--report-only"], ["train-demo"]],
)
def test_a_command_with_pictures_says_at_once_that_it_needs_matplotlib(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("benchmarks.training.demo.serve", lambda *_, **__: pytest.fail("it began"))
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    assert "pip install -c constraints.txt matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


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


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_no_flag_that_the_command_lacks(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Commands share fields, and so their descriptions."""
    monkeypatch.setenv("COLUMNS", "2000")  # each flag on a line
    with pytest.raises(SystemExit):
        main([name, "--help"])
    flags = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  -")]
    known = {flag for line in flags for flag in re.findall(r"(?<!\S)--[\w-]+", line.split("   ")[0])}
    assert known > {"--help"}
    assert set(re.findall(r"(?<!\S)--[a-z][\w-]*", "\n".join(flags))) <= known


def test_every_command_returns_a_report() -> None:
    for command in COMMANDS.values():
        function = resolve_name(command.function)
        types = get_type_hints(function)
        assert issubclass(types["config"], CommandConfig)
        for report in get_args(types["return"]) or (types["return"],):
            assert issubclass(report, Report)
            assert report.STEM
