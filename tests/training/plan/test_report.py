"""The command `plan`."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_auf.cli import main
from tests.support import qwen3_8b


def test_the_command_needs_a_config_and_no_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "qwen3-8b-dflash-auf", "--set", f"target={qwen3_8b.write_target(tmp_path)}"]
    assert main(command) == 0
    alone = capsys.readouterr().out.splitlines()
    assert any(line.startswith("peak") and line.endswith("52.81 GB") for line in alone)
    assert any(line.startswith("work") and line.endswith("TFLOP") for line in alone)
    assert [line.split()[-2:] for line in alone if line.startswith("disk")] == [["12.58", "GB"], ["50.33", "GB"]]
    assert main([*command, "--ranks", "8", "--fsdp"]) == 0
    assert "38.13 GB" in capsys.readouterr().out
    auto = ["--set", "drafter.target_layer_ids=auto", "--set", "drafter.mask_token_id=auto"]
    assert main([*command, *auto]) == 0
    assert capsys.readouterr().out.splitlines() == alone
    assert main([*command, "--ranks", "3"]) == 2
    assert "batch.micro_batches 8 on 3 ranks" in capsys.readouterr().err
