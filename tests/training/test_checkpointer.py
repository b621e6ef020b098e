"""Checkpoints: complete or absent, the last few and the best kept, read back as they were written."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_auf.errors import TrainingError
from sglang_auf.files import UNFINISHED
from sglang_auf.models.config import DrafterConfig
from sglang_auf.models.dflash import Drafter
from sglang_auf.models.loading import load_drafter
from sglang_auf.training.checkpointer import Checkpoints, RunState, gather, read_state, read_tensors, restore
from sglang_auf.training.losses.objectives import ObjectiveSettings
from sglang_auf.training.losses.step import TrainingStep
from sglang_auf.training.optimiser import make_optimisers
from sglang_auf.training.recipe import OptimiserSettings
from tests.support.tiny_models import target_config
from tests.support.training_runs import limit_file_size, same_weights

CONFIG = DrafterConfig.for_target(target_config(), num_layers=1, target_layer_ids=[1], block_size=4, mask_token_id=3)


def state(step: int, **fields: Any) -> RunState:
    required = {
        "recipe": {"seed": 1},
        "data_sha256": "d",
        "target_config_hash": "t",
        "ranks": 1,
        "tokens": 5,
        "seconds": 2,
    }
    return RunState.model_validate({"step": step, **required, **fields})


def write(checkpoints: Checkpoints, step: int, size: int = 10, **fields: Any) -> Path:
    weights = {"w": torch.full((size,), float(step))}
    return checkpoints.write({"a": 1}, weights, {"w/exp_avg": torch.zeros(size)}, state(step, **fields))


def listing(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in range(1, 6):
        write(checkpoints, step, best_step=min(step, 2))
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.latest() == tmp_path / "checkpoints" / "step-00000005"
    assert (tmp_path / "best").resolve() == checkpoints.path(2).resolve()
    assert listing(tmp_path) == ["best", "checkpoints"]


def test_the_link_moves_to_a_better_one_before_the_old_one_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    write(checkpoints, 1, best_step=1)
    rename = os.rename

    def watched(old: Path, new: Path) -> None:
        rename(old, new)
        assert (tmp_path / "best" / "state.json").is_file()

    monkeypatch.setattr(os, "rename", watched)
    write(checkpoints, 2, best_step=2)
    assert read_state(tmp_path / "best").step == 2
    assert checkpoints.steps() == [2]


def test_read_back_as_written(tmp_path: Path) -> None:
    path = write(Checkpoints(tmp_path, 1), 3, evaluation={"tau": 1.5}, best_step=3, best_tau=1.5)
    weights, optimiser = read_tensors(path)
    assert torch.equal(weights["w"], torch.full((10,), 3.0)) and list(optimiser) == ["w/exp_avg"]
    assert read_state(path) == state(3, evaluation={"tau": 1.5}, best_step=3, best_tau=1.5)
    assert json.loads((path / "config.json").read_text()) == {"a": 1}


@pytest.mark.parametrize("suffix", ["12345678", "removed"])
def test_nothing_half_written_is_ever_taken_for_a_checkpoint(tmp_path: Path, suffix: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    write(checkpoints, 1)
    left_over = checkpoints.directory / f".step-00000002{UNFINISHED}{suffix}"
    left_over.mkdir()
    (left_over / "model.safetensors").write_bytes(b"half")
    assert checkpoints.steps() == [1]
    write(checkpoints, 2)
    assert listing(checkpoints.directory) == ["step-00000001", "step-00000002"]


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def flushed(handle: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name.split(UNFINISHED)[0])
        fsync(handle)

    def renamed(old: Path, new: Path) -> None:
        events.append(f"-> {Path(new).name}")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "rename", renamed)
    write(Checkpoints(tmp_path, 1), 1)
    named = events.index("-> step-00000001")
    files = {
        "config.json",
        "state.json",
        "model.safetensors",
        "state.safetensors",
        "optimiser",
        ".step-00000001",
    }
    assert set(events[:named]) == files
    assert events[named + 1 :] == ["checkpoints", tmp_path.name]


def test_a_full_disk_leaves_the_earlier_checkpoints_and_says_what_to_do(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    write(checkpoints, 1)
    before = read_tensors(checkpoints.path(1))[0]
    lift = limit_file_size(100_000)
    try:
        with pytest.raises(TrainingError) as caught:
            write(checkpoints, 2, size=1_000_000)
    finally:
        lift()
    assert "step 2" in caught.value.found and "8 MB" in caught.value.expected
    assert "step-00000001" in caught.value.remedy
    assert listing(checkpoints.directory) == ["step-00000001"]
    assert same_weights(read_tensors(checkpoints.path(1))[0], before)
    write(checkpoints, 2, size=1_000_000)
    assert checkpoints.steps() == [2]


def test_a_disk_that_fills_up_at_the_last_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    write(checkpoints, 1)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingError, match="No space left on device"):
        write(checkpoints, 2)
    assert listing(checkpoints.directory) == ["step-00000001"]


@pytest.mark.parametrize("file", ["model.safetensors", "optimiser/state.safetensors"])
def test_damaged_weights_are_named(tmp_path: Path, file: str) -> None:
    path = write(Checkpoints(tmp_path, 1), 1)
    (path / file).write_bytes((path / file).read_bytes()[:-4])
    with pytest.raises(TrainingError, match="step-00000001 is damaged") as caught:
        read_tensors(path)
    assert "remove this directory" in caught.value.remedy


@pytest.mark.parametrize("text", ["{", '{"step": -1}', '{"unknown": 1}'])
def test_damaged_state_is_refused(tmp_path: Path, text: str) -> None:
    path = write(Checkpoints(tmp_path, 1), 1)
    (path / "state.json").write_text(text)
    with pytest.raises(TrainingError):
        read_state(path)


@pytest.mark.parametrize("settings", [{}, {"name": "muon", "muon_lr": 0.01}], ids=["adamw", "muon"])
def test_training_goes_on_bit_by_bit(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Three steps in one go, against one step, a checkpoint on disk, and two more with what is read back."""
    make = OptimiserSettings(lr=0.01, **settings)

    def fresh(seed: int) -> tuple[TrainingStep, list[torch.optim.Optimizer]]:
        torch.manual_seed(seed)
        step = TrainingStep(Drafter(CONFIG), torch.zeros(64, 64), torch.zeros(64, 64), ObjectiveSettings(name="auf"))
        return step, make_optimisers(step.drafter, make)

    def advance(step: TrainingStep, optimisers: list[torch.optim.Optimizer], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in step.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for optimiser in optimisers:
            optimiser.step()

    unbroken, optimisers = fresh(0)
    advance(unbroken, optimisers, 1)
    weights, saved = gather(unbroken, optimisers)
    path = Checkpoints(tmp_path, 1).write(CONFIG.to_checkpoint(), weights, saved, state(1))
    for seed in (2, 3):
        advance(unbroken, optimisers, seed)

    resumed, others = fresh(99)
    restore(resumed, others, *read_tensors(path), ranks=1)
    for seed in (2, 3):
        advance(resumed, others, seed)
    assert same_weights(dict(unbroken.drafter.state_dict()), dict(resumed.drafter.state_dict()))


def test_a_checkpoint_is_a_drafter(tmp_path: Path) -> None:
    step = TrainingStep(Drafter(CONFIG), torch.zeros(64, 64), torch.zeros(64, 64), ObjectiveSettings(name="auf"))
    optimisers = make_optimisers(step.drafter, OptimiserSettings(lr=0.01))
    path = Checkpoints(tmp_path, 1).write(CONFIG.to_checkpoint(), *gather(step, optimisers), state(0))
    loaded = load_drafter(path)
    assert loaded.config == CONFIG
    assert same_weights(dict(loaded.state_dict()), dict(step.drafter.state_dict()))
