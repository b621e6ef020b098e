"""Adaptations from beginning to end: only a better drafter replaces the old one, and a kill changes nothing."""

from __future__ import annotations

import json
import random
import shutil
import signal
import stat
from array import array
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

from sglang_auf.checkpoints import draft_vocabulary
from sglang_auf.checkpoints.card import check_drafter, load_card
from sglang_auf.checkpoints.draft_vocabulary import DraftVocabulary
from sglang_auf.cli import main
from sglang_auf.errors import ConfigError, DataError, TrainingError
from sglang_auf.files import WEIGHTS
from sglang_auf.provenance import sha256_of
from sglang_auf.recording.manifest import MANIFEST, Manifest
from sglang_auf.recording.recorder import digest
from sglang_auf.recording.ring import encoded
from sglang_auf.training import trainer
from sglang_auf.training.adapt.adapt import NOT_BETTER, PLAN, adapt
from sglang_auf.training.adapt.rows import HELD_OUT, OLD, OLD_HELD_OUT, TRAINED
from sglang_auf.training.adapt.settings import AdaptSettings
from sglang_auf.training.export import export_checkpoint
from sglang_auf.training.trainer import train
from tests.support.tiny_models import VOCABULARY, write_target
from tests.support.training_runs import limit_file_size, same_weights, tiny_recipe, write_models

pytestmark = pytest.mark.usefixtures("on_the_cpu")

Forks = Callable[..., list[int]]
ADAPT = "tests.support.training_runs:adapt_in_fork"
ROWS = 60


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Path]:
    """(target, answers of before, a drafter that was trained for one step)."""
    directory = tmp_path_factory.mktemp("models")
    target, data = write_models(directory)
    recipe = tiny_recipe(target, data, schedule={"max_steps": 1}, optimiser={"lr": 1e-4})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        train(recipe, directory / "run")
    return Path(target), data, export_checkpoint(directory / "run", directory / "drafter")


def record(directory: Path, target: Path, rows: int = ROWS, seed: int = 5) -> Path:
    """A recording: prompts of random tokens, and to each the same answer, which a drafter learns at once."""
    directory.mkdir(parents=True)
    (directory / MANIFEST).write_text(Manifest.of(target).model_dump_json())
    dice = random.Random(seed)
    lines = []
    for _ in range(rows):
        prompt = array("i", [dice.randrange(5, 60) for _ in range(6)])
        answer = array("i", ([20, 30, 40] * 6)[: dice.randrange(10, 18)])
        lines.append(encoded(digest(prompt, answer), prompt, answer))
    for part, day in enumerate((1, 2, 3)):
        file = directory / f"2026110{day}T000000000000Z.jsonl"
        file.write_bytes(b"".join(lines[part * rows // 3 : (part + 1) * rows // 3]))
    return directory


@pytest.fixture(scope="module")
def recorded(models: tuple[Path, str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("recorded") / "rows", models[0])


def settings(models: tuple[Path, str, Path], recorded: Path, out: Path, **changes: Any) -> AdaptSettings:
    given = {
        "drafter": str(models[2]),
        "recorded": recorded,
        "out": out,
        "min_rows": 20,
        "steps": 30,
        "set": ("optimiser.lr=0.01",),
    }
    return AdaptSettings.model_validate(given | changes)


def test_a_better_drafter_is_exported_with_its_parent_and_both_figures(
    models: tuple[Path, str, Path], recorded: Path, tmp_path: Path
) -> None:
    target, _, drafter = models
    draft_vocabulary.write(DraftVocabulary(tokens=tuple(range(5, VOCABULARY))), drafter, force=True)
    first = tmp_path / "first"
    outcome = adapt(settings(models, recorded, first))
    comparison = outcome.comparison
    assert comparison is not None and comparison.better
    assert comparison.new > comparison.old + 0.5
    assert outcome.rows == {TRAINED: 48, HELD_OUT: 12}
    assert (outcome.exit_code, outcome.out, outcome.generation) == (0, first, 1)

    checked = check_drafter(str(first), str(target))
    adapted = checked.card.adapted
    assert adapted is not None and checked.card.tau is not None
    assert adapted.model_dump() == {
        "generation": 1,
        "parent": sha256_of([drafter / WEIGHTS])[WEIGHTS],
        "recorded_rows": 48,
        "answers": 12,
        "old_tau": comparison.old,
        "new_tau": comparison.new,
        "low": comparison.difference.low,
        "high": comparison.difference.high,
    }
    assert checked.card.tau.value == comparison.new
    assert checked.card.objective == "auf"
    assert checked.vocabulary is not None and len(checked.vocabulary.tokens) == VOCABULARY - 5
    assert load_card(drafter).adapted is None
    assert "adapted" not in checked.card.unknown + load_card(drafter).unknown
    assert "adapted" not in json.loads((drafter / "auf_card.json").read_text()), "an earlier version reads this card"

    second = adapt(settings(models, recorded, tmp_path / "second", drafter=str(first), set=("optimiser.lr=0.001",)))
    if second.out is not None:
        assert second.generation == 2
    assert second.comparison is not None
    assert second.comparison.old == comparison.new, "the same answers, held out again"


def test_the_generation_counts_on(models: tuple[Path, str, Path], recorded: Path, tmp_path: Path) -> None:
    """From a first generation that was adapted little."""
    first = adapt(settings(models, recorded, tmp_path / "first", steps=6))
    second = adapt(settings(models, recorded, tmp_path / "second", drafter=str(tmp_path / "first"), steps=40))
    assert (first.generation, second.generation) == (1, 2)
    card = load_card(tmp_path / "second").adapted
    assert card is not None
    assert card.parent == sha256_of([tmp_path / "first" / WEIGHTS])[WEIGHTS]


def test_a_drafter_that_did_not_change_is_not_exported(
    models: tuple[Path, str, Path], recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    idle = ["--min-rows", "20", "--steps", "2", "--set", "optimiser.lr=1e-9"]
    code = main(["adapt", str(models[2]), "--recorded", str(recorded), "--out", str(out), *idle])
    said = capsys.readouterr().out
    assert code == NOT_BETTER == 3
    assert not out.exists()
    assert "12 recorded answers: tau " in said
    assert "not better" in said


def test_a_worse_drafter_is_not_exported(models: tuple[Path, str, Path], recorded: Path, tmp_path: Path) -> None:
    good, out = tmp_path / "good", tmp_path / "out"
    assert adapt(settings(models, recorded, good)).out == good
    outcome = adapt(settings(models, recorded, out, drafter=str(good), steps=4, set=("optimiser.lr=0.9",)))
    assert outcome.comparison is not None and outcome.comparison.difference.high is not None
    assert outcome.comparison.difference.high < 0, "worse by more than chance"
    assert (outcome.exit_code, outcome.out, out.exists()) == (NOT_BETTER, None, False)


def test_data_of_before_is_mixed_in_and_both_differences_are_said(
    models: tuple[Path, str, Path], recorded: Path, tmp_path: Path
) -> None:
    outcome = adapt(settings(models, recorded, tmp_path / "out", data=(models[1],), old_share=0.25))
    assert outcome.rows == {TRAINED: 48, HELD_OUT: 12, OLD: 16, OLD_HELD_OUT: 5}
    assert outcome.old_data is not None and outcome.old_data.answers == 5
    run = tmp_path / "out.run"
    ids = [{json.loads(line)["id"] for line in (run / name).read_text().splitlines()} for name in outcome.rows]
    assert sum(map(len, ids)) == len(set().union(*ids)), "no row is in two files"
    assert "16 of --data (25%)" in outcome.lines()[0]
    assert "decides nothing" in outcome.lines()[2]


def test_minutes_become_steps_once(models: tuple[Path, str, Path], recorded: Path, tmp_path: Path) -> None:
    given = settings(models, recorded, tmp_path / "out", steps=None, minutes=0.02)
    adapt(given)
    plan = json.loads((tmp_path / "out.run" / PLAN).read_text())
    assert plan["steps"] >= 1
    state = json.loads((tmp_path / "out.run" / "training" / "best" / "state.json").read_text())
    assert state["step"] == plan["steps"]


def test_a_slow_first_step_does_not_make_the_others_fewer(
    models: tuple[Path, str, Path], recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock on which the first step takes a minute and each other one 15 seconds: 4 fit into a minute."""
    clock, of_step = 0.0, trainer.pooled_gradient

    def timed(*arguments: Any, **named: Any) -> Any:
        nonlocal clock
        clock += 15 if clock else 60
        return of_step(*arguments, **named)

    monkeypatch.setattr(trainer, "pooled_gradient", timed)
    monkeypatch.setattr(trainer, "time", SimpleNamespace(monotonic=lambda: clock))
    adapt(settings(models, recorded, tmp_path / "out", steps=None, minutes=1))
    assert json.loads((tmp_path / "out.run" / PLAN).read_text())["steps"] == 4


def test_too_few_rows_are_refused(models: tuple[Path, str, Path], tmp_path: Path) -> None:
    few = record(tmp_path / "rows", models[0], rows=15)
    with pytest.raises(DataError, match=r"15 rows in .*rows that can be trained on; expected: 20 or more"):
        adapt(settings(models, few, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_recording_of_another_target_is_refused(
    models: tuple[Path, str, Path], recorded: Path, tmp_path: Path
) -> None:
    """Also as data of before, whose ids would be read as this target's."""
    other = record(tmp_path / "rows", write_target(tmp_path / "other", head_dim=32))
    for given in (
        settings(models, other, tmp_path / "out"),
        settings(models, recorded, tmp_path / "out", data=[str(other)]),
    ):
        with pytest.raises(DataError, match=r"is a recording of other .*target_config_hash"):
            adapt(given)
    assert not (tmp_path / "out.run").exists()
    with pytest.raises(DataError, match="no recording in"):
        adapt(settings(models, tmp_path, tmp_path / "out"))


def test_what_exists_and_what_was_begun_otherwise_is_refused(
    models: tuple[Path, str, Path], recorded: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="exists"):
        adapt(settings(models, recorded, tmp_path))
    out = tmp_path / "out"
    adapt(settings(models, recorded, out, steps=2))
    with pytest.raises(TrainingError, match=r"was begun with another steps"):
        adapt(settings(models, recorded, out, steps=3))
    elsewhere = tmp_path / "another"
    shutil.copytree(recorded, elsewhere)
    with pytest.raises(TrainingError, match=r"was begun with another recorded"):
        adapt(settings(models, elsewhere, out, steps=2))


def test_a_full_disk_is_one_clear_error_and_the_run_goes_on_behind_it(
    models: tuple[Path, str, Path], recorded: Path, tmp_path: Path
) -> None:
    given = settings(models, recorded, tmp_path / "out", steps=4)
    for size, stops_at in ((3_000, "out.run cannot be used"), (50_000, "checkpoint of step 2 could not be written")):
        lift = limit_file_size(size)
        try:
            with pytest.raises(TrainingError, match=stops_at):
                adapt(given)
        finally:
            lift()
    assert adapt(given).comparison is not None
    assert stat.S_IMODE((tmp_path / "out.run").stat().st_mode) == 0o700


def test_two_budgets_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapt", "x", "--recorded", "x", "--out", "x", "--steps", "1", "--minutes", "1"]) == 2
    assert "--steps and --minutes are both given" in capsys.readouterr().err


@pytest.mark.parametrize("out", [".", "/", "x/.."])
def test_an_out_without_a_name_is_refused(out: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["adapt", "x", "--recorded", "x", "--out", out]) == 2
    assert "names no directory to make" in capsys.readouterr().err


@pytest.mark.e2e
def test_killed_again_and_again_it_ends_as_if_it_had_not_been(
    models: tuple[Path, str, Path], recorded: Path, tmp_path: Path, in_fork: Forks
) -> None:
    """Also while the server goes on recording."""
    grown = record(tmp_path / "rows", models[0])

    def arguments(out: str) -> list[str]:
        flags = {"--recorded": grown, "--out": tmp_path / out, "--min-rows": 20, "--steps": 12}
        given = [part for flag, value in flags.items() for part in (flag, str(value))]
        return [str(models[2]), *given, "--set", "optimiser.lr=0.01", "--set", "save_every=4"]

    assert in_fork(ADAPT, arguments=arguments("unbroken")) == [0]
    for kill_at in (3, 9, 30, 40, 24):
        assert in_fork(ADAPT, arguments=arguments("killed"), kill_at=kill_at) == [-signal.SIGKILL]
        if (tmp_path / "killed.run" / PLAN).is_file():
            with (grown / "20261103T000000000000Z.jsonl").open("ab") as newest:
                newest.write(encoded(kill_at, array("i", [9]), array("i", [7] * 12)))
    assert in_fork(ADAPT, arguments=arguments("killed"), term_at=14) == [128 + signal.SIGTERM]
    for _ in range(2):  # and once more, when it is finished
        assert in_fork(ADAPT, arguments=arguments("killed")) == [0]
    ends = [load_file(tmp_path / out / WEIGHTS) for out in ("unbroken", "killed")]
    assert same_weights(*ends)
    cards = [load_card(tmp_path / out) for out in ("unbroken", "killed")]
    assert cards[0] == cards[1]
