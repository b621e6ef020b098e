"""Runs from beginning to end: exact resume, ranks, signals, the best checkpoint, and what stops a run."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_auf.cli import main
from sglang_auf.errors import AufError, ConfigError, DataError, TargetError, TrainingError
from sglang_auf.models import products
from sglang_auf.models.dflash import Layer
from sglang_auf.models.loading import load_drafter
from sglang_auf.recording.manifest import MANIFEST, Manifest
from sglang_auf.training.checkpointer import Checkpoints, read_state, read_tensors
from sglang_auf.training.data.loader import Plan, load_data
from sglang_auf.training.evaluation.held_out import HeldOutAnswers
from sglang_auf.training.losses import cross_entropy
from sglang_auf.training.recipe import Recipe, parse_recipe
from sglang_auf.training.trainer import Trainer, train
from tests.support.products_seen import Products
from tests.support.tiny_models import VOCABULARY
from tests.support.training_runs import (
    FSDP,
    limit_file_size,
    metrics,
    same_weights,
    tiny_recipe,
    weights_at,
    write_models,
)

pytestmark = pytest.mark.usefixtures("on_the_cpu")

Forks = Callable[..., list[int]]
TRAIN = "tests.support.training_runs:train_in_fork"
COMMAND = "tests.support.training_runs:command_in_fork"
STEPS = 6
DOMINO: dict[str, Any] = {
    "drafter": {"head": "domino", "gru_hidden_dim": 8, "emb_dim": 4},
    "objective": {"name": "b-auf"},
    "optimiser": {"lr": 0.01, "name": "muon", "muon_lr": 0.01},
    "precision": "bf16",
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def unbroken(models: tuple[str, str], in_fork: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs from the first to the last step in one go."""
    directory = tmp_path_factory.mktemp("unbroken")
    for name, sections in (("dflash", {}), ("domino", DOMINO)):
        recipe = tiny_recipe(*models, **sections).model_dump(mode="json")
        assert in_fork(TRAIN, recipe=recipe, out=str(directory / name)) == [0]
    return {name: directory / name for name in ("dflash", "domino")}


def assert_same_run(first: Path, second: Path) -> None:
    """Equal in weights, optimiser state and all that was logged."""
    ends = [read_tensors(run / "checkpoints" / f"step-{STEPS:08d}") for run in (first, second)]
    for ours, theirs in zip(*ends, strict=True):
        assert same_weights(ours, theirs)
    assert metrics(first) == metrics(second)
    states = [read_state(run / "checkpoints" / f"step-{STEPS:08d}") for run in (first, second)]
    ours, theirs = (state.model_dump(exclude={"seconds"}) for state in states)
    assert ours == theirs


def stopping_after(step: int) -> Callable[[Trainer, list[int]], tuple[int, bool]]:
    """In place of Trainer._agreed: as if SIGTERM had been caught in this step."""
    return lambda self, caught: (signal.SIGTERM if self.state.step == step else 0, False)


# --- resume ---


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("kind", "kills", "saved"),
    [
        # In a backward pass, while the files of a checkpoint are flushed, before its rename, just after it, before
        # `best` is linked, before an old checkpoint is removed, and in a backward pass again.
        ("dflash", (9, 21, 24, 25, 23, 25, 18), [0, 0, 0, 2, 3, 4, 4]),
        ("domino", (22, 23, 16), [2, 3, 3]),
    ],
)
def test_killed_again_and_again_a_run_ends_as_if_it_had_not_been(
    models: tuple[str, str],
    in_fork: Forks,
    unbroken: dict[str, Path],
    tmp_path: Path,
    kind: str,
    kills: tuple[int, ...],
    saved: list[int],
) -> None:
    recipe = tiny_recipe(*models, **(DOMINO if kind == "domino" else {})).model_dump(mode="json")
    out = tmp_path / "run"
    steps = []
    for kill_at in kills:
        assert in_fork(TRAIN, recipe=recipe, out=str(out), kill_at=kill_at) == [-signal.SIGKILL]
        steps.append(max(Checkpoints(out, 1).steps(), default=0))
    assert steps == saved
    assert in_fork(TRAIN, recipe=recipe, out=str(out)) == [0]
    assert_same_run(out, unbroken[kind])
    assert not list((out / "checkpoints").glob(".*"))
    starts = json.loads((out / "run.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, *steps]


def test_a_signal_saves_and_the_same_command_goes_on(
    models: tuple[str, str], unbroken: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = tiny_recipe(*models), tmp_path / "run"
    advance = Trainer._advance

    def interrupted(self: Trainer, index: int, caught: list[int]) -> int:
        if index == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return advance(self, index, caught)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_advance", interrupted)
        outcome = train(recipe, out)
    assert (outcome.step, outcome.steps, outcome.signal) == (3, STEPS, signal.SIGTERM)
    assert max(Checkpoints(out, 1).steps()) == 3
    assert signal.getsignal(signal.SIGTERM) is before
    outcome = train(recipe, out)
    assert (outcome.step, outcome.signal) == (STEPS, None)
    assert same_weights(weights_at(out, STEPS), weights_at(unbroken["dflash"], STEPS))


def test_a_checkpoint_is_saved_by_the_clock_and_changes_nothing(
    models: tuple[str, str], unbroken: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    train(tiny_recipe(*models, save_every=9, save_minutes=1e-6, keep_last=9), out)
    assert Checkpoints(out, 9).steps() == list(range(1, STEPS + 1))
    for step in Checkpoints(out, 9).steps()[3:]:
        shutil.rmtree(Checkpoints(out, 9).path(step))
    train(tiny_recipe(*models), out)
    assert same_weights(weights_at(out, STEPS), weights_at(unbroken["dflash"], STEPS))


def test_a_finished_run_is_left_as_it_is(models: tuple[str, str], tmp_path: Path) -> None:
    recipe = tiny_recipe(*models)
    first = train(recipe, tmp_path / "run")
    logged = metrics(tmp_path / "run")
    assert train(recipe, tmp_path / "run") == first
    assert metrics(tmp_path / "run") == logged


def test_a_run_of_another_recipe_is_refused_and_kept(
    models: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the data is read, which may take minutes."""
    out = tmp_path / "run"
    train(tiny_recipe(*models, schedule={"max_steps": 2}), out)
    monkeypatch.setattr("sglang_auf.training.trainer.load_data", None)
    with pytest.raises(TrainingError) as caught:
        train(tiny_recipe(*models, schedule={"max_steps": 3}, optimiser={"lr": 0.02}), out)
    assert "optimiser.lr: 0.02 here, 0.01 there" in caught.value.found
    assert "schedule.max_steps: 3 here, 2 there" in caught.value.found
    assert "--fresh" in caught.value.remedy
    assert max(Checkpoints(out, 1).steps()) == 2


def test_a_run_on_other_data_is_refused(models: tuple[str, str], tmp_path: Path) -> None:
    target, data = models
    changed = tmp_path / "answers.jsonl"
    changed.write_text(Path(data).read_text())
    recipe = tiny_recipe(target, str(changed), schedule={"max_steps": 2})
    train(recipe, tmp_path / "run")
    moved = changed.rename(tmp_path / "moved.jsonl")
    assert train(recipe.with_sources([str(moved)]), tmp_path / "run").step == 2
    moved.write_text(moved.read_text().replace("row-3", "row-33"))
    with pytest.raises(TrainingError, match="data_sha256"):
        train(recipe.with_sources([str(moved)]), tmp_path / "run")


def test_a_run_goes_on_with_the_rows_that_a_recording_had(models: tuple[str, str], tmp_path: Path) -> None:
    target, data = models
    recording = tmp_path / "recording"
    recording.mkdir()
    (recording / MANIFEST).write_text(Manifest.of(Path(target)).model_dump_json())
    rows = recording / "20261101T000000000000Z.jsonl"
    rows.write_text(Path(data).read_text() + "\n")
    recipe, out = tiny_recipe(target, str(recording), schedule={"max_steps": 2}), tmp_path / "run"
    train(recipe, out)
    with rows.open("a") as newest:
        newest.write(json.dumps({"id": "later", "prompt_ids": [5], "response_ids": [6] * 8}) + "\n")
    assert train(recipe, out).step == 2


def test_a_run_of_an_earlier_version_keeps_the_rows_that_it_trains_on(models: tuple[str, str], tmp_path: Path) -> None:
    """It left out only rows that are the same as a held-out one."""
    target, data = models
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    other_answers = [row | {"id": f"again-{row['id']}", "response_ids": [4, *row["response_ids"][1:]]} for row in rows]
    twice = tmp_path / "twice.jsonl"
    twice.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *other_answers]))
    recipe, out = tiny_recipe(target, str(twice), schedule={"max_steps": 2}), tmp_path / "run"
    train(recipe, out)
    trained = json.loads((out / "run.json").read_text())["data"]["train"]
    for file in out.glob("checkpoints/*/state.json"):
        state = json.loads(file.read_text())
        assert state.pop("apart") == "prompt"
        file.write_text(json.dumps(state))
    train(recipe, out)
    assert trained < json.loads((out / "run.json").read_text())["data"]["train"] == 2 * len(rows) - 4


def test_a_target_with_other_weights_is_refused(models: tuple[str, str], tmp_path: Path) -> None:
    target, data = models
    other = shutil.copytree(target, tmp_path / "target")
    recipe = tiny_recipe(str(other), data, schedule={"max_steps": 2})
    out = tmp_path / "run"
    train(recipe, out)
    file = other / "model.safetensors"
    weights = load_file(file)
    save_file({name: tensor + 0.01 for name, tensor in weights.items()}, file, metadata={"format": "pt"})
    with pytest.raises(TrainingError, match="target_weights"):
        train(recipe, out)
    # A run of a version that did not write this down goes on.
    for file in out.glob("checkpoints/*/state.json"):
        state = json.loads(file.read_text())
        unknown = ("target_weights", "target_revision", "chat_template_hash")
        file.write_text(json.dumps({name: value for name, value in state.items() if name not in unknown}))
    assert train(recipe, out).step == 2


def test_how_often_is_logged_may_change(
    models: tuple[str, str], unbroken: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_agreed", stopping_after(3))
        train(tiny_recipe(*models, save_every=3, evaluate_every=6, log_every=2), tmp_path / "run")
    train(tiny_recipe(*models), tmp_path / "run")
    assert same_weights(weights_at(tmp_path / "run", STEPS), weights_at(unbroken["dflash"], STEPS))


def test_fresh_starts_over(models: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(tiny_recipe(*models, schedule={"max_steps": 2}, seed=1), out)
    assert train(tiny_recipe(*models, schedule={"max_steps": 1}), out, fresh=True).step == 1
    assert Checkpoints(out, 1).steps() == [1]
    assert {row["step"] for row in metrics(out)} == {1}
    assert len(json.loads((out / "run.json").read_text())["starts"]) == 1


# --- ranks ---


@pytest.mark.parametrize(("ranks", "environment", "recompute"), [(4, {}, False), (2, FSDP, True)], ids=["ddp", "fsdp"])
def test_ranks_train_as_one_and_resume_exactly(
    models: tuple[str, str],
    in_fork: Forks,
    unbroken: dict[str, Path],
    tmp_path: Path,
    ranks: int,
    environment: dict[str, str],
    recompute: bool,
) -> None:
    """Four ranks, since two have only one order in which they can be added."""
    recipe = tiny_recipe(*models, batch={"recompute": recompute})
    job = {"recipe": recipe.model_dump(mode="json"), "environment": environment}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert in_fork(TRAIN, ranks=ranks, out=str(whole), **job) == [0] * ranks
    # Only the last rank is asked to stop, in its third step: all together make four backward passes in each.
    assert in_fork(TRAIN, ranks=ranks, out=str(broken), term_at=1 + 2 * 4 // ranks, **job) == [0] * ranks
    assert Path(f"{broken}.signal").read_text() == str(int(signal.SIGTERM))
    assert max(Checkpoints(broken, 1).steps()) == 3
    assert in_fork(TRAIN, ranks=ranks, out=str(broken), **job) == [0] * ranks
    for file in ("model.safetensors", "optimiser/state.safetensors"):
        place = Path("checkpoints") / f"step-{STEPS:08d}" / file
        assert (whole / place).read_bytes() == (broken / place).read_bytes()
    together, alone = (weights_at(run, STEPS) for run in (whole, unbroken["dflash"]))
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-3, atol=1e-4)
    assert_same_losses(whole, unbroken["dflash"])


def assert_same_losses(first: Path, second: Path, rel: float = 1e-4) -> None:
    losses = [[row["loss"] for row in metrics(run)] for run in (first, second)]
    assert losses[0] == pytest.approx(losses[1], rel=rel)


def test_domino_sharded_in_bfloat16(
    models: tuple[str, str], in_fork: Forks, unbroken: dict[str, Path], tmp_path: Path
) -> None:
    recipe = tiny_recipe(*models, **DOMINO | {"optimiser": {"lr": 0.01}, "schedule": {"max_steps": 2}})
    job = {"recipe": recipe.model_dump(mode="json")}
    assert in_fork(TRAIN, ranks=2, out=str(tmp_path / "sharded"), environment=FSDP, **job) == [0, 0]
    train(recipe, tmp_path / "alone")
    assert_same_losses(tmp_path / "sharded", tmp_path / "alone", rel=0.02)


def test_two_ranks_over_the_end_of_an_epoch_whose_rows_fill_no_step(
    models: tuple[str, str], in_fork: Forks, tmp_path: Path
) -> None:
    """22 conversations one by one, four a step: two are left out of each epoch. The run stops after the first one."""
    sections = {"batch": {"batch_rows": 1}, "schedule": {"epochs": 2, "max_steps": None}, "evaluate_every": 5}
    recipe = tiny_recipe(*models, **sections)
    job = {"recipe": recipe.model_dump(mode="json"), "out": str(tmp_path / "two")}
    assert in_fork(TRAIN, ranks=2, term_at=9, **job) == [0, 0]
    assert max(Checkpoints(tmp_path / "two", 1).steps()) == 5
    assert in_fork(TRAIN, ranks=2, **job) == [0, 0]
    assert train(recipe, tmp_path / "one").steps == 10
    assert_same_losses(tmp_path / "two", tmp_path / "one")


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_of_them(in_fork: Forks, tmp_path: Path) -> None:
    recipe = tiny_recipe(*write_models(tmp_path, poisoned=(3,)), save_every=1, keep_last=9)
    out = tmp_path / "run"
    assert in_fork(TRAIN, ranks=2, recipe=recipe.model_dump(mode="json"), out=str(out)) == [1, 1]
    found = [Path(f"{out}.error-{rank}").read_text() for rank in (0, 1)]
    assert found[0] == found[1] and "loss nan" in found[0] and "row-3" in found[0].replace(",", " ").split()
    saved = Checkpoints(out, 9).steps()
    assert saved == list(range(1, int(found[0].split(":")[0].removeprefix("step "))))
    for step in saved:
        assert all(tensor.isfinite().all() for tensor in weights_at(out, step).values())


def test_a_rank_that_dies_ends_the_other_one_and_the_run_goes_on(
    models: tuple[str, str], in_fork: Forks, unbroken: dict[str, Path], tmp_path: Path
) -> None:
    job = {"recipe": tiny_recipe(*models).model_dump(mode="json"), "out": str(tmp_path / "run")}
    assert in_fork(TRAIN, ranks=2, kill_last_at=6, **job) == [1, -signal.SIGKILL]
    assert max(Checkpoints(tmp_path / "run", 1).steps()) == 2
    assert in_fork(TRAIN, ranks=2, **job) == [0, 0]
    assert_same_losses(tmp_path / "run", unbroken["dflash"])


def test_all_ranks_save_where_the_clock_of_one_says_so(
    models: tuple[str, str], in_fork: Forks, unbroken: dict[str, Path], tmp_path: Path
) -> None:
    """By the clock of the last rank no checkpoint is ever too old."""
    recipe = tiny_recipe(*models, save_every=9, evaluate_every=9, save_minutes=1e-6, keep_last=9)
    job = {"recipe": recipe.model_dump(mode="json"), "out": str(tmp_path / "run"), "slow_last": True}
    assert in_fork(TRAIN, ranks=2, **job) == [0, 0]
    assert Checkpoints(tmp_path / "run", 9).steps() == list(range(1, STEPS + 1))


def test_a_rank_with_an_error_ends_at_once_and_waits_for_no_other(
    models: tuple[str, str], in_fork: Forks, tmp_path: Path
) -> None:
    """The first rank alone opens the run's directory; the other one waits for it, and the launcher would end it."""
    out, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(tiny_recipe(*models).model_dump(mode="json")))
    out.mkdir()
    (out / "notes.txt").write_text("a user's")
    arguments = ["train", str(recipe), "--out", str(out)]
    assert in_fork(COMMAND, ranks=2, arguments=arguments, out=str(out)) == [2, 1]
    said = [Path(f"{out}.stderr-{rank}").read_text() for rank in (0, 1)]
    assert f"sglang-auf train: found: {out} holds no run, but notes.txt; expected: " in said[0]
    assert "Traceback" in said[1], "gloo notices that the first rank is gone; NCCL does not"
    assert not list(tmp_path.glob("run.returned-*"))
    assert not list(tmp_path.glob("run.destroyed-*"))

    (out / "notes.txt").unlink()
    assert in_fork(COMMAND, ranks=2, arguments=arguments, out=str(out)) == [0, 0]
    assert sorted(path.name for path in tmp_path.glob("run.*ed-*")) == [
        *("run.destroyed-0", "run.destroyed-1", "run.returned-0", "run.returned-1")
    ]
    said = [Path(f"{out}.stdout-{rank}").read_text() for rank in (0, 1)]
    assert said[0].startswith(f"{out}: {STEPS} steps") and said[1] == "", "the first rank alone says how the run ended"


# --- what a run leaves ---


def test_what_is_logged(unbroken: dict[str, Path]) -> None:
    rows = metrics(unbroken["dflash"])
    training = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in training] == list(range(1, STEPS + 1))
    shown = {"loss", "lr", "grad_norm", "epoch", "r_active", "support_accuracy", "common_accuracy"}
    assert all(row.keys() >= shown | {"alpha_1", "alpha_2", "alpha_3"} for row in training)
    assert all(1 / 4 <= row["r_active"] <= 3 / 4 and math.isfinite(row["loss"]) for row in training)
    assert [row["step"] for row in rows if row["kind"] == "held_out"] == [3, 6]
    assert all(row["tau"] >= 1 for row in rows if row["kind"] == "held_out")
    assert list((unbroken["dflash"] / "tensorboard").glob("events.*"))


def test_what_a_run_was_is_written_beside_it(models: tuple[str, str], unbroken: dict[str, Path]) -> None:
    run = json.loads((unbroken["dflash"] / "run.json").read_text())
    assert run["data"]["sources"] == [models[1]] and len(run["data"]["sha256"]) == 64
    assert run["data"]["train"] + run["data"]["held_out"] == 26 and run["data"]["held_out"] == 4
    assert run["target"]["vocab_size"] == 64 and run["steps"] == STEPS
    assert {"git_revision", "versions", "command", "ranks", "step"} <= run["starts"][0].keys()
    drafter = load_drafter(unbroken["dflash"] / "best")
    assert drafter.config.target_layer_ids == (1, 3)


def test_what_was_chosen_is_written_down_and_kept_on_resume(models: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    recipe = tiny_recipe(*models, drafter={"target_layer_ids": "auto"}, schedule={"max_steps": 2})
    train(recipe, out)
    assert load_drafter(out / "best").config.target_layer_ids == (2,)
    kept = [yaml.safe_load((out / "recipe.yaml").read_text()), read_state(out / "best").recipe]
    assert [content["drafter"]["target_layer_ids"] for content in kept] == [[2], [2]]
    assert train(recipe, out).step == 2
    assert train(recipe.with_drafter(target_layer_ids=(2,)), out).step == 2
    with pytest.raises(TrainingError, match="target_layer_ids"):
        train(recipe.with_drafter(target_layer_ids=(1,)), out)


def test_a_mask_that_texts_have_is_warned_of_once(
    models: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [json.loads(line) for line in Path(models[1]).read_text().splitlines()]
    count = sum((row["prompt_ids"] + row["response_ids"]).count(9) for row in rows)
    assert count > 0
    told = f"drafter.mask_token_id 9 is also {count} tokens of the data: choose an id that no text uses, or auto"
    for mask, expected in ((9, [told]), (3, [])):
        caplog.clear()
        train(tiny_recipe(*models, drafter={"mask_token_id": mask}, schedule={"max_steps": 1}), tmp_path / str(mask))
        assert [record.message for record in caplog.records if "mask_token_id" in record.message] == expected


def test_training_lowers_the_loss(models: tuple[str, str], tmp_path: Path) -> None:
    recipe = tiny_recipe(*models, schedule={"max_steps": 40}, evaluate_every=40, save_every=40)
    train(recipe, tmp_path / "run")
    losses = [row["loss"] for row in metrics(tmp_path / "run") if row["kind"] == "train"]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


def test_the_best_checkpoint_is_the_one_of_the_best_tau(
    models: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taus = iter([1.25, 2.5, 2.5, None, 1.5])
    monkeypatch.setattr(HeldOutAnswers, "figures", lambda self, step: {"tau": next(taus), "accuracy": 0.5, "loss": 3.0})
    recipe = tiny_recipe(*models, schedule={"max_steps": 5}, evaluate_every=1, save_every=5, keep_last=1)
    outcome = train(recipe, tmp_path / "run")
    assert (outcome.best_step, outcome.best_tau) == (2, 2.5)
    assert Checkpoints(tmp_path / "run", 1).steps() == [2, 5]
    best = read_state(tmp_path / "run" / "best")
    assert best.step == 2 and best.evaluation == {"tau": 2.5, "accuracy": 0.5, "loss": 3.0}
    last = read_state(tmp_path / "run" / "checkpoints" / "step-00000005")
    assert (last.best_step, last.best_tau, last.evaluation and last.evaluation["tau"]) == (2, 2.5, 1.5)


def test_arms_see_the_same_batches_and_anchors(models: tuple[str, str], tmp_path: Path) -> None:
    """What is trained on must not depend on the objective."""
    counts = []
    for name in ("full", "auf"):
        train(tiny_recipe(*models, objective={"name": name}, schedule={"max_steps": 2}), tmp_path / name)
        counts.append([row["alpha_1"] for row in metrics(tmp_path / name) if row["step"] == 1])
    assert counts[0] == counts[1]


def test_a_run_from_a_drafter_is_compared_with_it(
    models: tuple[str, str],
    unbroken: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A learning rate that breaks the drafter; and the start is evaluated once, however often the run is stopped."""
    good, out = unbroken["dflash"] / "checkpoints" / f"step-{STEPS:08d}", tmp_path / "run"
    recipe = tiny_recipe(*models, drafter={"init_from": str(good)}, optimiser={"lr": 0.9})
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "write", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(recipe, out)  # before it has a checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_agreed", stopping_after(4))
        assert train(recipe, out).signal == signal.SIGTERM
    assert "no better" not in caplog.text
    outcome = train(recipe, out)
    held_out = {row["step"]: row for row in metrics(out) if row["kind"] == "held_out"}
    assert [row["step"] for row in metrics(out) if row["kind"] == "held_out"] == [0, 3, 6]
    (expected,) = [row for row in metrics(unbroken["dflash"]) if row["kind"] == "held_out" and row["step"] == STEPS]
    assert held_out[0] == {**expected, "step": 0}
    assert outcome.start_tau == expected["tau"] >= outcome.best_tau > 0
    told = f"held-out tau {outcome.best_tau:.4f}, no better than {outcome.start_tau:.4f} of the drafter that training"
    assert told in caplog.text
    assert str(outcome).endswith(f"at step {outcome.best_step}; {outcome.start_tau:.3f} before the first step")
    weights = weights_at(out, STEPS)
    train(changed(recipe, evaluate_every=None), tmp_path / "without")
    assert same_weights(weights, weights_at(tmp_path / "without", STEPS))
    assert [row["step"] for row in metrics(tmp_path / "without") if row["kind"] == "held_out"] == [STEPS]


# --- curricula ---

CURRICULUM: dict[str, Any] = {
    "name": "auf",
    "earlier": [{"name": "full", "until": 1 / 3}, {"name": "vat", "until": 0.5}],
}
OBJECTIVE_OF_STEP = ["full", "full", "vat", "auf", "auf", "auf"]


@pytest.fixture(scope="module")
def unbroken_curriculum(models: tuple[str, str], in_fork: Forks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("curriculum") / "run"
    recipe = tiny_recipe(*models, objective=CURRICULUM, save_every=1, keep_last=STEPS).model_dump(mode="json")
    assert in_fork(TRAIN, recipe=recipe, out=str(out)) == [0]
    return out


def test_each_step_of_a_curriculum_has_its_objective(
    models: tuple[str, str], unbroken_curriculum: Path, tmp_path: Path
) -> None:
    training = [row for row in metrics(unbroken_curriculum) if row["kind"] == "train"]
    assert [row["objective"] for row in training] == OBJECTIVE_OF_STEP
    train(tiny_recipe(*models, objective={"name": "full"}, save_every=1, keep_last=STEPS), tmp_path / "full")
    for step, same in ((1, True), (2, True), (3, False)):
        assert same_weights(weights_at(tmp_path / "full", step), weights_at(unbroken_curriculum, step)) == same
    # Slots behind a failure carry loss under vat alone, and under full they have all of it.
    assert training[1]["r_active"] == pytest.approx(training[2]["r_active"], abs=0.1)
    assert all(row["r_active"] < training[2]["r_active"] - 0.1 for row in training[3:])


def test_the_optimiser_goes_on_where_the_objective_changes(unbroken_curriculum: Path) -> None:
    """AdamW counts its steps beside its means; another optimiser, or an emptied one, would begin again at 1."""
    for step in range(1, STEPS + 1):
        _, state = read_tensors(Checkpoints(unbroken_curriculum, 1).path(step))
        counts = {float(value) for name, value in state.items() if name.endswith("/step")}
        assert counts == {step}


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_curriculum_resumed_changes_where_the_unbroken_one_does(
    models: tuple[str, str], unbroken_curriculum: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """Stopped inside an objective, and exactly between two."""
    recipe, out = tiny_recipe(*models, objective=CURRICULUM, save_every=1, keep_last=STEPS), tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_agreed", stopping_after(stop))
        assert train(recipe, out).step == stop
    assert train(recipe, out).step == STEPS
    assert_same_run(out, unbroken_curriculum)


def test_a_logged_loss_is_of_one_objective(models: tuple[str, str], unbroken_curriculum: Path, tmp_path: Path) -> None:
    train(tiny_recipe(*models, objective=CURRICULUM, log_every=4), tmp_path / "run")
    rows = [row for row in metrics(tmp_path / "run") if row["kind"] == "train"]
    assert [(row["step"], row["objective"]) for row in rows] == [(2, "full"), (3, "vat"), (4, "auf"), (6, "auf")]
    losses = [row["loss"] for row in metrics(unbroken_curriculum) if row["kind"] == "train"]
    assert [row["loss"] for row in rows] == pytest.approx(
        [sum(losses[:2]) / 2, losses[2], losses[3], sum(losses[4:]) / 2]
    )


def test_a_run_too_short_for_its_curriculum_is_refused(models: tuple[str, str], tmp_path: Path) -> None:
    objective = {"name": "auf", "earlier": [{"name": "full", "until": 0.1}, {"name": "vat", "until": 0.15}]}
    with pytest.raises(ConfigError) as caught:
        train(tiny_recipe(*models, objective=objective), tmp_path / "run")
    assert "full until 0.1, then vat until 0.15, then auf: none of the 6 steps" in caught.value.found
    assert caught.value.found.endswith("would train vat")


def test_domino_has_curricula_too(models: tuple[str, str], unbroken: dict[str, Path], tmp_path: Path) -> None:
    objective = {"name": "b-auf", "earlier": [{"name": "decay", "until": 0.5}]}
    train(tiny_recipe(*models, **{**DOMINO, "objective": objective}), tmp_path / "run")
    training = [row for row in metrics(tmp_path / "run") if row["kind"] == "train"]
    assert [row["objective"] for row in training] == ["decay"] * 3 + ["b-auf"] * 3
    assert not same_weights(weights_at(tmp_path / "run", STEPS), weights_at(unbroken["domino"], STEPS))


# --- what stops a run ---


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_conversations(tmp_path: Path) -> None:
    """Rows 3 and 11 are poisoned; which step they come in is the plan's choice."""
    models = write_models(tmp_path, poisoned=(3, 11))
    recipe = tiny_recipe(*models, save_every=1, evaluate_every=6, batch={"micro_batches": 1}, keep_last=9)
    with pytest.raises(TrainingError) as caught:
        train(recipe, tmp_path / "run")
    assert "loss nan" in caught.value.found
    assert any(f"row-{row}" in caught.value.found.replace(",", " ").split() for row in (3, 11))
    step = int(caught.value.found.split(":")[0].removeprefix("step "))
    saved = Checkpoints(tmp_path / "run", 9).steps()
    assert saved == list(range(1, step))
    for each in saved:
        assert all(tensor.isfinite().all() for tensor in weights_at(tmp_path / "run", each).values())


def test_no_memory_says_for_what_and_the_same_command_goes_on(
    models: tuple[str, str], unbroken: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = tiny_recipe(*models), tmp_path / "run"
    passes, forward = 0, Layer.forward

    def without_memory(self: Layer, *arguments: Any) -> torch.Tensor:
        nonlocal passes
        passes += self.training and torch.is_grad_enabled()
        if passes > 3 * 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")
        return forward(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Layer, "forward", without_memory)
        with pytest.raises(TrainingError) as caught:
            train(recipe, out)
    _, rows = Plan(load_data(recipe, Path(models[0]), VOCABULARY).train, recipe).at(3)
    found = re.fullmatch(
        r"no memory left for the drafter on a micro-batch of (\d+) rows x (\d+) tokens with 3 anchors a row, in step 4 "
        r"\(CUDA out of memory. Tried to allocate 2.00 GiB.\)",
        caught.value.found,
    )
    assert found and int(found[1]) == len(rows[0])
    assert "120 tokens (batch.batch_tokens) with up to 3 anchors a row (batch.anchors_per_row)" in caught.value.expected
    assert caught.value.remedy.startswith("--set batch.recompute=true")
    assert "the same command goes on from step-00000003" in caught.value.remedy
    train(recipe, out)
    assert_same_run(out, unbroken["dflash"])


def no_memory(*_: Any, **__: Any) -> Any:
    torch.empty(2**50)  # as a CPU's allocator says it


def no_room_for_python(*_: Any, **__: Any) -> Any:
    raise MemoryError


@pytest.mark.parametrize(
    ("place", "fails", "doing"),
    [
        ("data.features.OnlineFeatures.__call__", no_memory, r"the features of a micro-batch of \d.*, in step 1 "),
        ("evaluation.held_out.HeldOutAnswers.figures", no_room_for_python, r"the evaluation, in step 3 \(MemoryError"),
        ("trainer.gather", no_memory, "the checkpoint, in step 2 "),
        ("trainer.initial_drafter", no_memory, "the start "),
    ],
)
def test_what_there_was_no_memory_for(
    models: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    fails: Callable[..., Any],
    doing: str,
) -> None:
    monkeypatch.setattr(f"sglang_auf.training.{place}", fails)
    with pytest.raises(TrainingError, match=f"no memory left for {doing}") as caught:
        train(tiny_recipe(*models, batch={"recompute": True}), tmp_path / "run")
    assert "recompute" not in caught.value.remedy


def test_a_disk_that_the_checkpoints_do_not_fit_is_refused_before_the_first_step(
    models: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps save two checkpoints; six would have four at once: the last two, the best one and a new one."""
    out = tmp_path / "run"
    train(tiny_recipe(*models, schedule={"max_steps": 1}), out)
    files = [file for file in (out / "best").resolve().rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files if file.suffix == ".safetensors")
    free = 0
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=free))
    for steps, fits in ((2, 2), (6, 4)):
        recipe = tiny_recipe(*models, schedule={"max_steps": steps}, save_every=1, evaluate_every=1)
        free = fits * size - size // 10
        with pytest.raises(TrainingError) as caught:
            train(recipe, tmp_path / str(steps))
        assert f"{fits} checkpoints of {size / 1e6:.1f}" in caught.value.expected
        assert "keep_last=1" in caught.value.remedy
        assert not Checkpoints(tmp_path / str(steps), 2).steps()
        free = fits * size
        train(recipe, tmp_path / str(steps))


def test_a_full_disk_stops_the_run_and_it_goes_on_once_there_is_space(
    models: tuple[str, str], unbroken: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = tiny_recipe(*models), tmp_path / "run"
    write = Checkpoints.write

    def on_a_full_disk(self: Checkpoints, config: Any, weights: Any, optimiser: Any, state: Any) -> Path:
        lift = limit_file_size(50_000 if state.step == 4 else 2**40)
        try:
            return write(self, config, weights, optimiser, state)
        finally:
            lift()

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "write", on_a_full_disk)
        with pytest.raises(TrainingError, match="step 4 could not be written"):
            train(recipe, out)
    assert max(Checkpoints(out, 1).steps()) == 3
    train(recipe, out)
    assert same_weights(weights_at(out, STEPS), weights_at(unbroken["dflash"], STEPS))


@pytest.mark.parametrize(
    ("sections", "error", "complaint"),
    [
        ({"data": {"sources": []}}, ConfigError, "without data.sources"),
        ({"data": {"sources": ["missing.jsonl"]}}, DataError, "missing.jsonl"),
        ({"data": {"held_out": 26}}, DataError, "0 rows to train on"),
        ({"data": {"max_length": 6}}, DataError, "no row"),
        ({"batch": {"micro_batches": 30}}, DataError, "22 rows"),
        ({"drafter": {"mask_token_id": 64}}, ConfigError, "mask_token_id 64 of 64 tokens"),
        ({"drafter": {"target_layer_ids": [1, 5]}}, ConfigError, "[1, 5]"),
        ({"target": "no/such/target"}, TargetError, "no/such/target"),
        ({"features": "no-cache"}, DataError, "no-cache"),
        ({"features": "no-cache", "objective": {"name": "auf", "labels": "target"}}, ConfigError, "labels target"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    models: tuple[str, str], tmp_path: Path, sections: dict[str, Any], error: type[AufError], complaint: str
) -> None:
    with pytest.raises(error) as caught:
        train(changed(tiny_recipe(*models), **sections), tmp_path / "run")
    assert complaint in caught.value.found
    assert not (tmp_path / "run").exists()


# --- settings that change what is computed ---


@pytest.mark.parametrize("kind", ["dflash", "domino"])
def test_recomputing_changes_no_bit_and_may_be_changed_in_a_run(
    models: tuple[str, str], unbroken: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    recipe = tiny_recipe(*models, **(DOMINO if kind == "domino" else {}))
    layers: list[int] = []
    forward = Layer.forward

    def counted(self: Layer, *arguments: Any) -> torch.Tensor:
        layers.append(self.training and torch.is_grad_enabled())
        return forward(self, *arguments)

    monkeypatch.setattr(Layer, "forward", counted)
    passes = []
    for recompute, until in ((True, 3), (False, STEPS)):
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "_agreed", stopping_after(until))
            train(changed(recipe, batch={"recompute": recompute}), tmp_path / "run")
        passes.append(sum(layers))
        layers.clear()
    assert passes == [2 * 3 * 4, 3 * 4]
    assert same_weights(weights_at(tmp_path / "run", STEPS), weights_at(unbroken[kind], STEPS))


def test_weights_of_a_bfloat16_run_are_float32(models: tuple[str, str], tmp_path: Path) -> None:
    """In bfloat16 a norm's weight of 1 would lose every update below 1 / 256."""
    train(tiny_recipe(*models, precision="bf16", optimiser={"lr": 1e-5}, schedule={"max_steps": 2}), tmp_path / "run")
    found = weights_at(tmp_path / "run", 2)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert 0 < (found["norm.weight"] - 1).abs().max() < 1 / 256


def test_labels_of_the_target_are_another_loss(models: tuple[str, str], tmp_path: Path) -> None:
    losses = []
    for labels in ("text", "target"):
        recipe = tiny_recipe(*models, objective={"name": "full", "labels": labels}, schedule={"max_steps": 1})
        train(recipe, tmp_path / labels)
        losses.append(metrics(tmp_path / labels)[0]["loss"])
    assert losses[0] != losses[1] and all(map(math.isfinite, losses))


# --- what a GPU would be waited for ---


class Waits(TorchDispatchMode):
    """Counts operations that wait for a GPU: a number read from a tensor, or a result whose size is a tensor's."""

    READ = ("_local_scalar_dense", "nonzero", "masked_select")
    PLACES = ("index", "index_put", "index_put_", "_index_put_impl_")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        masks = name in self.PLACES and any(each is not None and each.dtype == torch.bool for each in args[1])
        self.count += name in self.READ or masks
        return function(*args, **(kwargs or {}))


class Copies(TorchFunctionMode):
    """Counts what Waits does not see on a CPU: tensors read as lists, and numbers sent to a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        self.count += name in ("tolist", "cpu", "numpy", "tensor", "as_tensor")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "sections"), [("full", {}), ("auf", {}), ("decay", DOMINO), ("b-auf", DOMINO), ("s-auf", DOMINO)]
)
def test_how_often_a_step_waits(
    models: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, sections: dict[str, Any]
) -> None:
    """Each micro-batch: once for its blocks, and in each branch once for the rows that carry loss.

    Waves: twice each; once where an objective stops no block. The step: losses, weights and the gradient's norm.
    """
    waves, branches = [0, 0], 0
    advance, of_head = Trainer._advance, cross_entropy._waves

    def counted_waves(mask: torch.Tensor, correct: torch.Tensor, failures: int | None, chunk: int) -> Iterator[Any]:
        nonlocal branches
        branches += 1
        for wave in of_head(mask, correct, failures, chunk):
            waves[failures is None] += 1
            yield wave

    def counted(self: Trainer, index: int, caught: list[int]) -> int:
        nonlocal branches
        if index != 1:
            return advance(self, index, caught)
        self.stream = chain([next(self.stream) for _ in range(4)], self.stream)  # type: ignore[assignment]
        waves[:], branches = [0, 0], 0
        with Waits() as waits, Copies() as copies:
            stopped = advance(self, index, caught)
        passes = 2 if "head" in sections.get("drafter", {}) else 1
        assert branches == 4 * passes**2
        assert waits.count == 4 * passes + branches + 2 * waves[0] + waves[1] + 1
        assert copies.count == 2
        assert waves[0] <= 3 * branches
        return stopped

    monkeypatch.setattr(Trainer, "_advance", counted)
    monkeypatch.setattr(cross_entropy, "_waves", counted_waves)
    monkeypatch.setattr(cross_entropy, "_RIGHT", {})  # as on a GPU
    sections = {**sections, "objective": {"name": name}, "schedule": {"max_steps": 3}}
    train(tiny_recipe(*models, **sections, log_every=3, save_every=3), tmp_path / "run")


# --- the command ---


def test_the_command(models: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(json.dumps(without_sources(tiny_recipe(*models))))
    command = ["train", str(recipe), "--out", str(out), "--data", models[1], "--set", "schedule.max_steps=2"]
    assert main(command) == 0
    assert f"{out}: 2 steps; best held-out tau" in capsys.readouterr().out
    assert main([*command, "--set", "optimiser.lr=0.5"]) == 2
    assert "optimiser.lr: 0.5 here, 0.01 there" in capsys.readouterr().err


def test_what_torchrun_begins_again_is_not_begun_afresh(
    models: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun --max-restarts repeats the whole command, --fresh included, after a rank has failed."""
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(json.dumps(without_sources(tiny_recipe(*models, schedule={"max_steps": 2}))))
    command = ["train", str(recipe), "--out", str(out), "--data", models[1], "--fresh"]
    starts = []
    for restarts in ("0", "1", "0"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        assert main(command) == 0
        starts.append([start["step"] for start in json.loads((out / "run.json").read_text())["starts"]])
    assert starts == [[0], [0, 2], [0]]


def test_the_command_reports_a_signal(
    models: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "_agreed", stopping_after(1))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(tiny_recipe(*models).model_dump(mode="json")))
    assert main(["train", str(recipe), "--out", str(tmp_path / "run")]) == 128 + signal.SIGTERM
    assert f"stopped after step 1 of {STEPS}" in capsys.readouterr().out


def changed(recipe: Recipe, **sections: Any) -> Recipe:
    content = recipe.model_dump(mode="json")
    for name, section in sections.items():
        content[name] = {**content[name], **section} if isinstance(section, dict) else section
    return parse_recipe(content, "of a test")


def without_sources(recipe: Recipe) -> dict[str, Any]:
    content = recipe.model_dump(mode="json")
    del content["data"]["sources"]
    return content


# --- a CPU without instructions for bf16 ---


@pytest.mark.parametrize("sections", [{"precision": "bf16", "optimiser": DOMINO["optimiser"]}, DOMINO])
def test_no_bf16_product_is_left_to_torch(
    models: tuple[str, str], sections: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "multiplies_bf16", lambda: False)
    with Products() as seen:
        assert train(tiny_recipe(*models, **sections), tmp_path / "run").signal is None
    assert seen.by_type.pop(torch.float32) > 100
    assert seen.by_type == {}
