"""The page of a study with made-up results."""

from __future__ import annotations

from pathlib import Path

from benchmarks.studies.findings import findings
from benchmarks.studies.report import study_report
from tests.benchmarks.studies.test_findings import EQUAL, results


def test_the_page_holds_the_findings(tmp_path: Path) -> None:
    made = results(0.15, EQUAL)
    page = study_report(made).write(tmp_path)
    text = (tmp_path / "study.md").read_text(encoding="utf-8")
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    tau, _ = findings(made)
    assert f"{tau.difference:+.3f}" in text
    assert "| yes |" in text and "| not shown |" in text
    assert "| auf, seed 1 | 0 | 120 |" in text
    assert "1.0000 | 120 of 120 |" in text
