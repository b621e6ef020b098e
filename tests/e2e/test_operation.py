"""The operator's two benchmarks at their smallest: a soak, and a server killed behind SGLang's router."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.cli import main
from benchmarks.serving.soak import SoakReport
from benchmarks.serving.soak_requests import KINDS

pytestmark = pytest.mark.e2e

DRAFTER = Path(__file__).parents[2] / "drafters" / "smollm2-135m"


def test_a_soak_finds_nothing_wrong(tmp_path: Path) -> None:
    """Whether memory is flat shows only in minutes (`make soak`); everything else must hold at once."""
    options = ["--minutes", "0.7", "--clients", "8", "--questions", "6", "--sample-s", "2", "--record"]
    main(["soak", *options, "--swap", str(DRAFTER), "--swap", str(DRAFTER), "--out", str(tmp_path)])
    report = SoakReport.model_validate_json((tmp_path / "soak.json").read_text())
    assert report.faults == {}, report.named
    assert set(report.asked) <= {kind.__name__ for kind in KINDS}
    assert sum(report.asked.values()) > len(KINDS)
    assert report.after.kv_tokens == report.before.kv_tokens
    assert report.after.running == report.after.waiting == 0
    assert max(sample.running for sample in report.samples) > 1
    assert report.acceptance["total"]["verify_steps"] > 0
    first, second = (swap.generation for swap in report.swapped)
    assert first == 1
    assert second > 1  # 3 where the server has gone back by itself in between
    assert report.recording is not None
    assert report.recording["rows"] > 0
    assert report.recording["error"] is None


def test_nothing_is_lost_with_a_server(tmp_path: Path) -> None:
    options = ["--requests", "12", "--clients", "4", "--max-tokens", "24", "--out", str(tmp_path)]
    assert main(["failover", *options]) == 0
    report = json.loads((tmp_path / "failover.json").read_text())
    for load in (report["both"], report["killed"]):
        assert (load["asked"], load["lost"], load["wrong"]) == (12, 0, 0)
    assert report["both"]["sent"] == 12
    assert report["killed"]["sent"] > 12, "no request met the dead server"
    assert sum(server["verify_steps"] for server in report["totals"]) == report["both"]["verify_steps"]
