"""rival-steps with this trainer's own driver and with packages that are not what they should be."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cli import main

SMALL = ["--shape", "tiny", "--length", "48", "--anchors", "8", "--rounds", "2"]


def rival_steps(out: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    code = main(["rival-steps", *SMALL, "--out", str(out), *flags])
    return code, json.loads((out / "rival-steps.json").read_text())


def environment(directory: Path) -> Path:
    """A virtual environment whose python is this one, where no rival is installed."""
    (directory / "bin").mkdir(parents=True)
    python = directory / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return directory


@pytest.mark.e2e
def test_own_steps_are_timed_and_a_package_that_cannot_run_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report = rival_steps(tmp_path / "out", "--venv", f"specforge={environment(tmp_path / 'venv')}")
    assert code == 1
    auf, decay, specforge = report["steps"]
    for ours in (auf, decay):
        assert ours["trainer"] == "sglang_auf" and ours["error"] is None
        assert len(ours["rounds"]) == 2
        assert ours["tokens_per_s"] == pytest.approx(48 / ours["seconds"])
        assert ours["peak_mib"] > 0
    assert (auf["step"], decay["step"], specforge["step"]) == ("auf", "decay", "decay")
    assert "No module named 'specforge'" in specforge["error"]
    assert set(specforge["refused"]) == {"flex_attention", "sdpa", "eager"}
    assert specforge["seconds"] is None and specforge["peak_mib"] is None
    text = (tmp_path / "out" / "rival-steps.md").read_text()
    assert "specforge FAILED" in text
    assert text in capsys.readouterr().out


@pytest.mark.e2e
def test_an_environment_whose_python_dies_is_reported(tmp_path: Path) -> None:
    broken = environment(tmp_path / "venv")
    (broken / "bin" / "python").write_text("#!/bin/sh\necho no such interpreter >&2\nexit 3\n")
    code, report = rival_steps(tmp_path / "out", "--venv", f"speculators={broken}")
    assert code == 1
    assert report["steps"][2]["error"] == "no such interpreter"
    assert report["steps"][0]["seconds"] > 0


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--venv", "specforge=nowhere"], "--venv specforge=nowhere"),
        (["--venv", "eagle=."], "--venv eagle=."),
        (["--shape", "huge"], "--shape huge"),
        (["--anchors", "41"], "--anchors 41"),
    ],
)
def test_a_bad_value_is_refused(
    flags: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rival-steps", *SMALL, "--out", str(tmp_path), *flags]) == 2
    assert named in capsys.readouterr().err
