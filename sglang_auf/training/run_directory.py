"""The directory of one training run: who may use it, and what lies in it.

recipe.yaml     the resolved recipe           metrics.jsonl   one line for each logged step and each evaluation
run.json        data, target, and every start tensorboard/    the same figures
checkpoints/    and best, see checkpoint.py
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from sglang_auf.errors import TrainingError
from sglang_auf.files import listing, read_json
from sglang_auf.training.checkpointer import BEST
from sglang_auf.training.recipe import Recipe

RECIPE = "recipe.yaml"
RUN = "run.json"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
LOCK = ".lock"
OURS = (RECIPE, RUN, METRICS, TENSORBOARD, "checkpoints", BEST, LOCK)


@contextmanager
def opened(directory: Path, fresh: bool) -> Iterator[Path]:
    """Hold `directory` for one trainer. fresh: an earlier run in it is removed first.

    Raises TrainingError where another process trains in it, or where it holds anything but a run.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / LOCK).open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise TrainingError(
                f"another process is training in {directory}", "one trainer a directory", "wait, or give another --out"
            ) from error
        if fresh:
            _remove_run(directory)
        elif not (directory / RUN).is_file() and (foreign := _foreign(directory)):
            (directory / LOCK).unlink()
            raise TrainingError(
                f"{directory} holds no run, but {', '.join(foreign[:5])}",
                "a new directory, or that of the run to resume",
                "give another --out",
            )
        yield directory


def describe(directory: Path, recipe: Recipe, facts: Mapping[str, Any], start: Mapping[str, Any]) -> None:
    """Write recipe.yaml and run.json. facts: data and target. start: joins the list of this run's starts."""
    starts = []
    if (directory / RUN).is_file():
        starts = read_json(directory / RUN, TrainingError).get("starts", [])
    content = {**facts, "starts": [*starts, start]}
    _write(directory / RECIPE, yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    _write(directory / RUN, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def forget_after(directory: Path, step: int) -> None:
    """Drop metrics of steps after `step`: they were logged, but no checkpoint holds them, and will be made again."""
    file = directory / METRICS
    if not file.is_file():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # cut short when the process was killed
            continue
        if row["step"] <= step:
            kept.append(line + "\n")
    _write(file, "".join(kept))


def _foreign(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir() if entry.name not in OURS)


def _remove_run(directory: Path) -> None:
    """Remove a run and nothing else. Raises TrainingError where there are files of somebody else."""
    if foreign := _foreign(directory):
        raise TrainingError(
            f"--fresh on {directory}, which also holds {', '.join(foreign[:5])} (of {listing(directory)})",
            "a directory with nothing but a run in it",
            "move these files away, or give another --out",
        )
    for name in OURS:
        entry = directory / name
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif name != LOCK:
            entry.unlink(missing_ok=True)


def _write(file: Path, text: str) -> None:
    """Complete or not at all."""
    scratch = file.with_name(f".{file.name}.writing")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, file)
