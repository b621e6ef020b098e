"""The `sglang-auf` command: exit codes and where its words go."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sglang_auf import __version__, cli
from sglang_auf.checkpoints.card import DrafterCard
from sglang_auf.errors import CardError


def test_prepare_prints_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sglang_auf.checkpoints.prepare.prepare", lambda name, out: out / name)
    assert cli.main(["prepare", "smollm2-135m", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/smollm2-135m\n"


def test_what_is_logged_has_the_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sglang_auf.checkpoints.prepare.prepare", lambda *_: logging.getLogger("sglang_auf").info("hm"))
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.WARNING)
    cli.main(["prepare", "smollm2-135m"])
    assert re.fullmatch(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] hm\n", capsys.readouterr().err)


def test_user_error_is_one_message_on_stderr_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prepare", "gpt-5"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "gpt-5" in captured.err
    assert "smollm2-135m" in captured.err


CARD = DrafterCard(
    target_name="some/target",
    target_config_hash=None,
    target_layer_ids=(1, 2),
    mask_token_id=3,
    block_size=8,
    head="dflash",
)


def test_check_reports_card_and_warnings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[tuple[str, str]] = []

    def check_drafter(drafter: str, target: str) -> SimpleNamespace:
        asked.append((drafter, target))
        vocabulary = SimpleNamespace(tokens=(2, 3, 5))
        return SimpleNamespace(card=CARD, warnings=("tau may fall",), path=Path(drafter), vocabulary=vocabulary)

    monkeypatch.setattr("sglang_auf.checkpoints.card.check_drafter", check_drafter)
    assert cli.main(["check", "my/drafter", "some/target"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert asked == [("my/drafter", "some/target")]
    assert [line.split() for line in lines if line.startswith(("block_size", "draft", "objective"))] == [
        ["block_size", "8"],
        ["objective", "unknown"],
        ["draft_vocabulary", "3", "tokens"],
    ]
    assert "warning: tau may fall" in lines


def test_check_that_fails_exits_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def check_drafter(drafter: str, target: str) -> None:
        raise CardError("hidden_size 64", "hidden_size 576", "use a drafter of this target")

    monkeypatch.setattr("sglang_auf.checkpoints.card.check_drafter", check_drafter)
    assert cli.main(["check", "my/drafter", "some/target"]) == 2
    assert "hidden_size 576" in capsys.readouterr().err


def test_check_of_an_unprepared_target_says_how_to_prepare_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SGLANG_AUF_HOME", str(tmp_path))
    assert cli.main(["check", "my/drafter", "smollm2-135m"]) == 2
    assert "sglang-auf prepare smollm2-135m" in capsys.readouterr().err


def test_sigterm_unwinds() -> None:
    code = (
        "import os, signal, sys; from types import SimpleNamespace; from sglang_auf.cli import main\n"
        "stop = SimpleNamespace(prepare=lambda *_: os.kill(os.getpid(), signal.SIGTERM))\n"
        "sys.modules['sglang_auf.checkpoints.prepare'] = stop\n"
        "try: main(['prepare', 'smollm2-135m'])\n"
        "finally: print('unwound')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (143, "unwound\n")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"sglang-auf {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["fly"], ["prepare"]])
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2


def test_help_imports_neither_torch_nor_sglang() -> None:
    code = (
        "import sys; from sglang_auf.cli import _parser; _parser().format_help();"
        "print(sorted({'torch', 'sglang', 'transformers', 'pydantic'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
