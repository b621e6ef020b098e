from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cli import main
from benchmarks.shapes import visit
from benchmarks.shapes.serve import StepRow


@pytest.mark.e2e
def test_a_toy_is_served_measured_and_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole command, as it is to be run on a GPU."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main(["write-shape", "--widths", "toy", "--out", str(tmp_path / "models")]) == 0
    command = ["serve-shape", "--models", str(tmp_path / "models"), "--out", str(tmp_path / "out"), "--batch", "1,3"]
    command += ["--steps", "2", "--rounds", "1", "--prompt-tokens", "8", "--prompts", "4", "--max-tokens", "6"]
    assert main(command) == 0

    report: dict[str, Any] = json.loads((tmp_path / "out" / "serve-shape.json").read_text())
    levels = [cell["concurrency"] for cell in report["acceptance"]]
    assert [cell["losslessness"]["identical"] for cell in report["agreement"]] == [4] * len(levels)
    assert all(cell["acceptance"]["tau"] >= 1 for cell in report["acceptance"])
    assert [(row["temperature"], row["batch"]) for row in report["steps"]] == [(0, 1), (0, 3), (1, 1), (1, 3)]
    blocks = {name: cell["facts"]["block_size"] for name, cell in report["servers"].items()}
    assert blocks == {"auf": 16, "plain": None, "forced": 16}
    for cell in report["servers"].values():
        assert sum(cell["planned"].values()) > 0
        assert cell["used"] > 0
        assert "weights" in cell["said"]  # any number: on a CPU what the machine has less free, whoever took it
    document = (tmp_path / "out" / "serve-shape.md").read_text()
    assert document in capsys.readouterr().out
    assert "block 16" in document

    monkeypatch.setattr(visit, "serve", lambda *_, **__: pytest.fail("a server was started"))
    assert main(command) == 0
    assert json.loads((tmp_path / "out" / "serve-shape.json").read_text())["steps"] == report["steps"]


def test_the_speed_up_is_tau_over_the_ratio_of_steps() -> None:
    row = StepRow(temperature=0, batch=1, auf_s=0.03, plain_s=0.02)
    assert row.ratio == pytest.approx(1.5)
    assert row.speed_up(3) == pytest.approx(2)
    unknown = StepRow(temperature=0, batch=1, auf_s=0.03, plain_s=None)
    assert (unknown.ratio, unknown.speed_up(3)) == (None, None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompts", "2"], "2 prompts and concurrency 4"),
        (["--steps", "2000"], "within 2048 tokens"),
        (["--max-tokens", "2000"], "within 2048 tokens"),
    ],
)
def test_what_would_fail_after_loading_is_refused_before(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["write-shape", "--widths", "toy", "--out", str(tmp_path / "models")]) == 0
    command = ["serve-shape", "--models", str(tmp_path / "models"), "--out", str(tmp_path / "out")]
    assert main([*command, "--concurrency", "1,4", *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_directory_without_models_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve-shape", "--models", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "write-shape" in capsys.readouterr().err
