"""A run's directory: one trainer at a time, nobody else's files, a log without what will be made again."""

from __future__ import annotations

import json
import logging
import shutil
import stat
from pathlib import Path

import pytest
import yaml

from sglang_auf.errors import DataError, TrainingError
from sglang_auf.files import UNFINISHED
from sglang_auf.recording.manifest import MANIFEST
from sglang_auf.training.recipe import parse_recipe
from sglang_auf.training.run_directory import (
    RECORDED,
    check_sources,
    copy_recordings,
    describe,
    forget_after,
    opened,
    sources_of,
)
from tests.support.tiny_models import write_target
from tests.support.toy_tokenizer import toy_tokenizer
from tests.support.training_runs import tiny_recipe

RECIPE = tiny_recipe("some/target", "answers.jsonl")


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def make_run(directory: Path) -> None:
    with opened(directory, fresh=False):
        describe(directory, RECIPE, {"steps": 3}, {"step": 0})
        (directory / "checkpoints" / "step-00000001").mkdir(parents=True)
        (directory / "best").symlink_to("checkpoints/step-00000001")
        (directory / "metrics.jsonl").touch()


def test_a_second_trainer_is_refused(tmp_path: Path) -> None:
    refused = pytest.raises(TrainingError, match="another process is training")
    with opened(tmp_path / "run", fresh=False), refused, opened(tmp_path / "run", fresh=True):
        pass
    with opened(tmp_path / "run", fresh=False):
        pass


@pytest.mark.parametrize("earlier", [False, True])
def test_a_start_that_is_refused_removes_the_directory_that_it_made(tmp_path: Path, earlier: bool) -> None:
    run = tmp_path / "run"
    if earlier:
        run.mkdir()
    with pytest.raises(DataError), opened(run, fresh=False):
        raise DataError("no row", "rows")
    assert run.exists() == earlier
    with pytest.raises(DataError), opened(run, fresh=False):
        (run / "recipe.yaml").touch()
        raise DataError("no row", "rows")
    assert (run / "recipe.yaml").is_file()


def test_a_place_that_can_be_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(TrainingError, match=r"run cannot be used .*File exists"), opened(tmp_path / "run", fresh=False):
        pass


@pytest.mark.parametrize("fresh", [False, True])
def test_other_files_are_never_mixed_with_a_run(tmp_path: Path, fresh: bool) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(TrainingError, match=r"thesis\.tex"), opened(tmp_path, fresh=fresh):
        pass
    assert "thesis.tex" in names(tmp_path)


ROWS = "20261101T000000000000Z.jsonl"


def recording_of(directory: Path, rows: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MANIFEST).write_text("{}")
    (directory / ROWS).write_text(rows)
    return directory


def start(run: Path, *sources: str, fresh: bool = False) -> str:
    """The rows that a start of the run reads from its last source."""
    with opened(run, fresh=fresh):
        copy_recordings(run, sources)
    return (Path(sources_of(run, sources)[-1]) / ROWS).read_text()


def test_a_run_goes_on_with_the_rows_that_it_began_with(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recording, run = recording_of(tmp_path / "recording", "first\n"), tmp_path / "run"
    assert start(run, "answers.jsonl", str(recording)) == "first\n"
    make_run(run)
    recording_of(recording, "first\nsecond\n")
    (recording / "20261102T000000000000Z.jsonl").write_text("third\n")
    with caplog.at_level(logging.INFO):
        assert start(run, "answers.jsonl", str(recording)) == "first\n"
    assert f"goes on with the rows of {recording} that it began with" in caplog.text
    first, copy = sources_of(run, ["answers.jsonl", str(recording)])
    assert first == "answers.jsonl" and Path(copy).parent == run / RECORDED
    assert names(Path(copy)) == [ROWS, MANIFEST]
    assert stat.S_IMODE(Path(copy).stat().st_mode) == 0o700
    shutil.rmtree(recording)
    assert start(run, "answers.jsonl", str(recording)) == "first\n", "whatever becomes of the recording"
    recording_of(recording, "other\n")
    assert start(run, str(recording), fresh=True) == "other\n"


def test_a_start_that_saved_nothing_leaves_no_rows_to_the_next(tmp_path: Path) -> None:
    recording, run = recording_of(tmp_path / "recording", "too few\n"), tmp_path / "run"
    start(run, str(recording))
    recording_of(recording, "too few\nand more\n")
    assert start(run, str(recording)) == "too few\nand more\n"
    other = recording_of(tmp_path / "other", "others\n")
    assert start(run, str(other)) == "others\n"


def test_rows_of_a_recording_are_not_taken_for_what_lies_in_its_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recording, run = recording_of(tmp_path / "recording", "recorded\n"), tmp_path / "run"
    start(run, str(recording))
    shutil.rmtree(recording)
    assert start(run, str(recording)) == "recorded\n"
    assert f"{recording} is gone" in caplog.text
    recording.mkdir()
    (recording / ROWS).write_text("written by hand\n")
    assert start(run, str(recording)) == "written by hand\n"


def test_a_recording_of_another_target_does_not_end_the_run_that_it_should_replace(tmp_path: Path) -> None:
    recording, run = recording_of(tmp_path / "recording", "first\n"), tmp_path / "run"
    start(run, str(recording))
    toy_tokenizer().save_pretrained(target := write_target(tmp_path / "target"))
    check_sources(run, [str(recording)], target, fresh=False)  # its rows are read from the run
    with pytest.raises(DataError, match="manifest of a recording"):  # its manifest is {}
        check_sources(run, [str(recording)], target, fresh=True)


def test_another_recording_is_not_taken_for_the_one_of_the_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    start(run, str(recording_of(tmp_path / "recording", "first\n")))
    make_run(run)
    other = str(recording_of(tmp_path / "other", "others\n"))
    assert sources_of(run, [other]) == [other]


def test_fresh_keeps_rows_that_are_nowhere_else(tmp_path: Path) -> None:
    run, recording = tmp_path / "run", str(recording_of(tmp_path / "recording", "first\n"))
    start(run, recording)
    (copy,) = sources_of(run, [recording])
    shutil.rmtree(recording)
    for source in (copy, recording):
        with pytest.raises(TrainingError, match=f"cp -r {copy}"):
            check_sources(run, [source], tmp_path / "target", fresh=True)
    live = recording_of(tmp_path / "server" / RECORDED, "of a server\n")
    for fresh in (False, True):
        with pytest.raises(TrainingError, match=RECORDED), opened(tmp_path / "server", fresh=fresh):
            pass
    assert (live / ROWS).exists()


def test_fresh_removes_the_run_and_nothing_else(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "run" / "notes.txt").touch()
    with pytest.raises(TrainingError, match=r"notes\.txt"), opened(tmp_path / "run", fresh=True):
        pass
    assert (tmp_path / "run" / "best").resolve().is_dir()
    (tmp_path / "run" / "notes.txt").unlink()
    with opened(tmp_path / "run", fresh=True):
        assert names(tmp_path / "run") == [".lock"]


def test_what_a_kill_left_half_written_does_not_count(tmp_path: Path) -> None:
    (tmp_path / f".recipe.yaml{UNFINISHED}12345678").touch()
    with opened(tmp_path, fresh=False):
        assert names(tmp_path) == [".lock"]
    make_run(tmp_path)
    (tmp_path / ".best.new").symlink_to("checkpoints/step-00000001")
    with opened(tmp_path, fresh=True):
        assert names(tmp_path) == [".lock"]


def test_a_run_may_hold_other_files_while_it_is_resumed(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "run" / "notes.txt").touch()
    with opened(tmp_path / "run", fresh=False):
        assert "notes.txt" in names(tmp_path / "run")


def test_every_start_is_written_down(tmp_path: Path) -> None:
    for step in (0, 4, 9):
        describe(tmp_path, RECIPE, {"steps": 12}, {"step": step, "command": ["x"]})
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["steps"] == 12 and [start["step"] for start in run["starts"]] == [0, 4, 9]
    assert parse_recipe(yaml.safe_load((tmp_path / "recipe.yaml").read_text()), "saved") == RECIPE
    assert names(tmp_path) == ["recipe.yaml", "run.json"]


def test_what_was_logged_after_the_checkpoint_is_dropped(tmp_path: Path) -> None:
    rows = [json.dumps({"step": step, "loss": 1.0}) for step in (0, 1, 2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + '\n{"step": 5, "lo')
    forget_after(tmp_path, 3)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == rows[:4]
    forget_after(tmp_path, 0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""
