"""How a study's trainings are spread over a machine; tests/e2e/test_study.py runs whole studies."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from benchmarks.studies import run as study_module
from benchmarks.studies.config import Study, StudyConfig, load_study
from benchmarks.studies.run import Places, _train_all, run_study
from sglang_auf.errors import ConfigError, TrainingError

STUDY = Path(__file__).parents[3] / "benchmarks" / "studies" / "smoke.yaml"


@pytest.fixture
def study() -> Study:
    """decay and auf, seeds 1 and 2."""
    return load_study(STUDY)


@pytest.mark.parametrize(("jobs", "threads"), [(1, None), (2, max(1, (os.cpu_count() or 1) // 2)), (1000, 1)])
def test_every_arm_and_seed_is_trained_once_with_its_share_of_the_cores(
    jobs: int, threads: int | None, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, int, int | None]] = []
    monkeypatch.setattr(
        study_module, "_train", lambda study, places, arm, seed, threads: done.append((arm, seed, threads))
    )
    _train_all(study, Places(tmp_path), jobs)
    assert sorted(done) == sorted((arm, seed, threads) for arm in ("decay", "auf") for seed in (1, 2))


def test_jobs_run_beside_each_other(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2, timeout=30)  # breaks where one waits for the other to end
    monkeypatch.setattr(study_module, "_train", lambda *arguments: both.wait())
    _train_all(study, Places(tmp_path), 2)


@pytest.mark.parametrize("failure", [TrainingError("a", "b", "c"), KeyboardInterrupt()])
def test_after_a_failure_what_runs_is_waited_for_and_nothing_begins(
    failure: BaseException, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ended = [], []
    failed = threading.Event()

    def train(study: Study, places: Places, arm: str, seed: int, threads: int | None) -> None:
        begun.append((arm, seed))
        if (arm, seed) == ("decay", 1):
            failed.set()
            raise failure
        assert failed.wait(30)
        time.sleep(0.5)  # long enough for the failure to be noticed
        ended.append((arm, seed))

    monkeypatch.setattr(study_module, "_train", train)
    with pytest.raises(type(failure)):
        _train_all(study, Places(tmp_path), 2)
    assert ("auf", 2) not in begun
    assert len(ended) == len(begun) - 1 <= 1


@pytest.mark.parametrize(
    ("change", "complaint"),
    [("objective.name=vta", "none of the objectives"), ("objective.name=b-auf", "none of head dflash")],
)
def test_a_study_with_an_arm_that_cannot_be_trained_does_not_begin(change: str, complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    right = "auf: {set: [objective.name=auf]}"
    file.write_text(STUDY.read_text().replace(right, f"auf: {{set: [{change}]}}"))
    with pytest.raises(ConfigError, match=complaint):
        run_study(StudyConfig(study=file, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
