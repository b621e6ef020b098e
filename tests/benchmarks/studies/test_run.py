"""How a study's trainings are spread over a machine; tests/e2e/test_study.py runs whole studies."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from benchmarks.harness.records import Record
from benchmarks.studies import run as study_module
from benchmarks.studies.config import Study, StudyConfig, load_study
from benchmarks.studies.run import Places, _train_all, run_study
from sglang_auf.errors import ConfigError, TrainingError
from sglang_auf.settings import read_yaml

STUDY = Path(__file__).parents[3] / "benchmarks" / "studies" / "smoke.yaml"


def no_walk(arm: str, seed: int) -> None:
    pass


@pytest.fixture
def study() -> Study:
    """decay and auf, seeds 1 and 2."""
    return load_study(STUDY)


@pytest.mark.parametrize(("jobs", "threads"), [(1, None), (2, 1), (1000, 1)])
def test_every_arm_and_seed_is_trained_once_and_walked(
    jobs: int, threads: int | None, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, int, int | None]] = []
    monkeypatch.setattr(
        study_module, "_train", lambda study, places, arm, seed, threads: done.append((arm, seed, threads))
    )
    walked: list[tuple[str, int]] = []
    _train_all(study, Places(tmp_path), jobs, threads, lambda arm, seed: walked.append((arm, seed)))
    assert sorted(done) == sorted((arm, seed, threads) for arm in ("decay", "auf") for seed in (1, 2))
    assert sorted(walked) == sorted((arm, seed) for arm in ("decay", "auf") for seed in (1, 2))


def test_jobs_run_beside_each_other(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2, timeout=30)  # breaks where one waits for the other to end
    monkeypatch.setattr(study_module, "_train", lambda *arguments: both.wait())
    _train_all(study, Places(tmp_path), 2, 1, no_walk)


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
        _train_all(study, Places(tmp_path), 2, 1, no_walk)
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


@pytest.mark.parametrize("killed_at", range(1, 17))
def test_a_kill_repeats_nothing_that_is_finished(
    killed_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two budgets of two arms and two seeds: eight trainings and eight walks, one of which is killed."""
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    file.write_text(STUDY.read_text() + "budgets: {30: [], 60: []}\n")
    begun: list[tuple[str, str]] = []

    def begin(what: str, which: Path) -> None:
        begun.append((what, str(which.relative_to(out))))
        if len(begun) == killed_at:
            raise KeyboardInterrupt

    def train(study: Study, places: Places, arm: str, seed: int, threads: int | None) -> None:
        drafter = places.drafter(arm, seed)
        if not drafter.is_dir():
            begin("train", drafter)
            drafter.mkdir(parents=True)

    class Walker:
        def __init__(self, *arguments: object) -> None:
            pass

        def walk(self, drafter: Path) -> list[list[Record]]:
            begin("walk", drafter)
            assert drafter.is_dir()
            return [[]]

    monkeypatch.setattr(study_module, "_target_part", lambda *arguments: None)
    monkeypatch.setattr(study_module, "_train", train)
    monkeypatch.setattr(study_module, "Walker", Walker)
    monkeypatch.setattr(study_module, "read_records", lambda path: [])
    config = StudyConfig(study=file, out=out, walk_only=True)
    with pytest.raises(KeyboardInterrupt):
        run_study(config)
    run_study(config)
    assert len(set(begun)) == 16
    assert len(begun) == 17, "but what was killed"
    assert next(which for _, which in begun if "60" in which) == "arms/60/decay-1/drafter"
    done = list(begun)
    run_study(config)
    assert begun == done


def test_a_study_does_not_go_on_with_a_profile_that_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, profile, out = tmp_path / "study.yaml", tmp_path / "mine.yaml", tmp_path / "out"
    file.write_text(STUDY.read_text().replace("profile: smollm2-135m", f"profile: {profile}"))
    profile.write_text("extends: smollm2-135m\n")
    for part in ("_target_part", "_train_all", "_served_part"):
        monkeypatch.setattr(study_module, part, lambda *arguments: None)
    run_study(StudyConfig(study=file, out=out))
    kept = read_yaml(out / "records" / "profile.yaml")
    assert kept["target"] == "smollm2-135m"
    profile.write_text("# the same\nextends: smollm2-135m\n")
    run_study(StudyConfig(study=file, out=out))
    profile.write_text("extends: smollm2-135m\ndtype: float32\n")
    with pytest.raises(ConfigError, match="says other than when the study"):
        run_study(StudyConfig(study=file, out=out))
    profile.unlink()
    run_study(StudyConfig(study=file, out=out))
    assert read_yaml(out / "records" / "profile.yaml") == kept


@pytest.mark.parametrize(("jobs", "threads"), [(1, None), (2, 3), (1000, 1)])
def test_a_part_of_a_study_does_no_more_with_its_share_of_the_cores(
    jobs: int, threads: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(STUDY.read_text() + "budgets: {30: [], 60: []}\n")
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(7)))
    done: list[tuple[str, int | None, str, int, int | None]] = []

    def train(study: Study, places: Places, arm: str, seed: int, threads: int | None) -> None:
        done.append(("train", places.budget, arm, seed, threads))

    def walk(walks: object, places: Places, threads: int | None, arm: str, seed: int) -> None:
        done.append(("walk", places.budget, arm, seed, threads))

    monkeypatch.setattr(study_module, "_target_part", lambda *arguments: None)
    monkeypatch.setattr(study_module, "_train", train)
    monkeypatch.setattr(study_module.Walks, "walk", walk)
    given = {"study": file, "out": tmp_path / "out", "walk_only": True, "jobs": jobs}
    run_study(StudyConfig.model_validate({**given, "seeds": "2,2", "budgets": "60"}))
    assert sorted(done) == [(what, 60, arm, 2, threads) for what in ("train", "walk") for arm in ("auf", "decay")]
    with pytest.raises(ConfigError, match="seed 3"):
        run_study(StudyConfig.model_validate({**given, "seeds": "3"}))


def test_a_file_of_a_study_is_in_its_data_directory_or_where_it_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    places, name = Places(tmp_path / "out", Path("data")), Path("letters.jsonl")
    assert places.given(name) == Path("data/letters.jsonl")
    name.touch()
    assert places.given(name) == name
    Path("data/letters.jsonl").touch()
    assert places.given(name) == Path("data/letters.jsonl")
