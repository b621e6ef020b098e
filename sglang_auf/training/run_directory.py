"""The directory of one training run, its lock and its files.

recipe.yaml     the resolved recipe           metrics.jsonl   one line for each logged step and each evaluation
run.json        data, target, and every start tensorboard/    the same figures
checkpoints/    and best, see checkpointer.py
recorded/       copies of the recordings among the sources, as they were when the run began: a server adds rows to them
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from sglang_auf.errors import DataError, TrainingError
from sglang_auf.files import listing, locked, read_json, remove_unfinished, whole_directory, write_whole
from sglang_auf.recording.manifest import MANIFEST, is_recording, require_target
from sglang_auf.recording.ring import row_files
from sglang_auf.training.checkpointer import BEST, NEW_BEST, Checkpoints, RunState
from sglang_auf.training.recipe import Recipe, differences, parse_recipe

logger = logging.getLogger(__name__)

RECIPE = "recipe.yaml"
RUN = "run.json"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
LOCK = ".lock"
RECORDED = "recorded"
OURS = (RECIPE, RUN, METRICS, TENSORBOARD, "checkpoints", BEST, NEW_BEST, LOCK, RECORDED)


@contextmanager
def opened(directory: Path, fresh: bool) -> Iterator[Path]:
    """Hold `directory` for one trainer. fresh: an earlier run in it is removed first.

    Raises TrainingError where another process trains in it, where it cannot be written, or where it holds anything but
    a run. A directory that this start made is removed again where it leaves nothing in it, as when its data is refused.
    """
    made = not directory.exists()
    with ExitStack() as held:
        try:
            held.enter_context(locked(directory / LOCK))
        except BlockingIOError as error:
            raise TrainingError(
                f"another process is training in {directory}", "one trainer a directory", "wait, or give another --out"
            ) from error
        except OSError as problem:
            raise TrainingError(
                f"{directory} cannot be used ({problem})", "a directory that this user may write", "give another --out"
            ) from problem
        for name in (RECIPE, RUN, METRICS):
            remove_unfinished(directory / name)
        if fresh:
            _remove_run(directory)
        elif not (directory / RUN).is_file() and (foreign := _foreign(directory)):
            (directory / LOCK).unlink()
            raise TrainingError(
                f"{directory} holds no run, but {', '.join(foreign[:5])}",
                "a new directory, or that of the run to resume",
                "give another --out",
            )
        try:
            yield directory
        finally:
            if made and directory.is_dir() and [entry.name for entry in directory.iterdir()] == [LOCK]:
                shutil.rmtree(directory, ignore_errors=True)  # some file systems still hold the lock's name


def check_sources(directory: Path, sources: Sequence[str], target: Path, fresh: bool) -> None:
    """Before the directory is opened. What the run has copies of is read from there, and checked then.

    Raises DataError for a recording of another target, TrainingError for a source that fresh would remove.
    """
    if not fresh:
        require_target([source for source in sources if not _copy_of(directory, source).is_dir()], target)
        return
    for source in sources:
        place, copy = Path(source).expanduser(), _copy_of(directory, source)
        if place.resolve().is_relative_to((directory / RECORDED).resolve()):
            raise TrainingError(
                f"--fresh on {directory}, in which {source} is", "data outside the run", f"copy it: cp -r {source} COPY"
            )
        if copy.is_dir() and not place.exists():
            raise TrainingError(
                f"--fresh on {directory}, which has the only copy of {source}",
                "the recording, or its copy outside the run",
                f"copy it, and give the copy as --data: cp -r {copy} COPY",
            )
    require_target(sources, target)


def copy_recordings(directory: Path, sources: Sequence[str]) -> None:
    """Copy the recordings among the sources into the run, which goes on with these rows once it has a checkpoint.

    Raises DataError where this user may not read one, OSError where the copy cannot be written.
    """
    begun = Checkpoints(directory, 1).latest() is not None
    for source in sources:
        copy = _copy_of(directory, source)
        remove_unfinished(copy)
        if begun and copy.is_dir():
            logger.info("%s goes on with the rows of %s that it began with: later ones are not read", directory, source)
        elif not begun:
            _copy(Path(source).expanduser(), copy)


def _copy(source: Path, copy: Path) -> None:
    """One recording; nothing for another source."""
    try:
        if not is_recording(source):
            if copy.is_dir() and source.exists():
                shutil.rmtree(copy)  # of a recording in whose place there is something else now
            elif copy.is_dir():
                logger.warning("%s is gone: its rows are read from %s", source, copy)
            return
        if copy.is_dir():  # of a start that ended before it saved anything
            shutil.rmtree(copy)
        with whole_directory(copy) as made:
            made.chmod(0o700)  # its rows are what users wrote
            for file in (source / MANIFEST, *row_files(source)):
                with suppress(FileNotFoundError):  # the server may have removed it since, because it grew too old
                    shutil.copy(file, made)
    except PermissionError as problem:
        raise DataError(
            f"{source} cannot be copied to {copy} ({problem})", "a recording that this user may read"
        ) from problem


def sources_of(directory: Path, sources: Sequence[str]) -> list[str]:
    """The sources with the run's copies in place of recordings, which may be gone by now."""
    return [str(copy) if (copy := _copy_of(directory, source)).is_dir() else source for source in sources]


def _copy_of(directory: Path, source: str) -> Path:
    """Named after the place of the recording: another one is never taken for it."""
    place = str(Path(source).expanduser().absolute())
    return directory / RECORDED / hashlib.sha256(place.encode()).hexdigest()[:16]


def describe(directory: Path, recipe: Recipe, facts: Mapping[str, Any], start: Mapping[str, Any]) -> None:
    """Write recipe.yaml and run.json. facts: data and target. start: is added to the list of this run's starts."""
    starts = []
    if (directory / RUN).is_file():
        starts = read_json(directory / RUN, TrainingError).get("starts", [])
    content = {**facts, "starts": [*starts, start]}
    write_whole(directory / RECIPE, yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    write_whole(directory / RUN, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def require_same_recipe(directory: Path, ours: Recipe, saved: RunState) -> None:
    """Raises TrainingError where the run that was begun in `directory` has another recipe. No data is needed for it."""
    _refuse(directory, differences(ours, parse_recipe(saved.recipe, f"of {directory}")))


def require_same_run(directory: Path, ours: RunState, theirs: RunState) -> None:
    """Raises TrainingError where the run that was begun in `directory` had other data or another target."""
    names = ("data_sha256", "target_config_hash", "target_weights")
    pairs = [(name, getattr(ours, name), getattr(theirs, name)) for name in names]
    _refuse(
        directory, [f"{name}: {here} here, {there} there" for name, here, there in pairs if there not in (here, None)]
    )


def _refuse(directory: Path, different: Sequence[str]) -> None:
    if different:
        raise TrainingError(
            f"the checkpoint in {directory} belongs to another run ({'; '.join(different)})",
            "the recipe, data and target it was saved with",
            "use those, give another --out, or start over with --fresh",
        )


def forget_after(directory: Path, step: int) -> None:
    """Drop the metrics of steps after `step`: no checkpoint holds these steps, so they will be trained again.

    Without a checkpoint (step 0) the start is evaluated again too.
    """
    file = directory / METRICS
    if not file.is_file():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # cut short when the process was killed
            continue
        if step > 0 and row["step"] <= step:
            kept.append(line + "\n")
    write_whole(file, "".join(kept))


def _foreign(directory: Path) -> list[str]:
    ours = set(OURS) - ({RECORDED} if is_recording(directory / RECORDED) else set())  # a user's, into which one records
    return sorted(entry.name for entry in directory.iterdir() if entry.name not in ours)


def _remove_run(directory: Path) -> None:
    """Remove a run and nothing else. Raises TrainingError where other files lie in the directory."""
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
