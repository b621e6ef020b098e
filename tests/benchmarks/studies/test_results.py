"""The studies under docs/results say what their records say."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.cli import main

ROOT = Path(__file__).parents[3]
STUDIES = {path.name: path for path in sorted((ROOT / "docs/results/study-smollm2").glob("*/")) if path.is_dir()}
LARGEST = 10_000_000


@pytest.mark.parametrize("name", STUDIES)
def test_every_figure_of_a_study_is_computed_anew_from_its_records(name: str, tmp_path: Path) -> None:
    """Parts that other machines did are in folders of their own, under `parts`."""
    shutil.copytree(STUDIES[name] / "records", tmp_path / "records")
    study = ROOT / "benchmarks" / "studies" / f"smollm2-{name}.yaml"
    joined = [word for part in sorted((STUDIES[name] / "parts").glob("*")) for word in ("--join", str(part))]
    assert main(["study", str(study), "--out", str(tmp_path), "--report-only", *joined]) == 0
    assert (tmp_path / "study.md").read_text() == (STUDIES[name] / "study.md").read_text()


def test_there_are_studies_and_their_records_are_small() -> None:
    assert STUDIES
    files = [file for study in STUDIES.values() for file in study.rglob("*")]
    assert sum(file.stat().st_size for file in files) < LARGEST
