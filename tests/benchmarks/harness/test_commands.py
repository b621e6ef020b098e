"""Commands that a benchmark runs: their exit codes, and where their output goes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.harness.commands import sglang_auf
from sglang_auf.errors import TrainingError


def test_output_goes_to_a_file_where_one_is_given(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert sglang_auf(["--help"], output=tmp_path / "help.txt") == 0
    assert "regenerate" in (tmp_path / "help.txt").read_text()
    assert capfd.readouterr().out == ""
    assert sglang_auf(["--help"]) == 0
    assert "regenerate" in capfd.readouterr().out


def test_a_code_that_is_not_expected_is_an_error() -> None:
    with pytest.raises(TrainingError, match=r"exit code 2.*exit code 0 or 3"):
        sglang_auf(["no-such-command"], codes=(0, 3))
    assert sglang_auf(["no-such-command"], codes=(0, 2)) == 2
