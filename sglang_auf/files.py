"""Files and directories: find a model, read JSON, write completely or not at all, and lock."""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock
import httpx
from huggingface_hub import snapshot_download

from sglang_auf.errors import AufError

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
PROVENANCE = "provenance.json"
UNFINISHED = ".writing-"
"""Part of the name of what is being written. After a kill it may remain; `remove_unfinished` removes it."""
REPLACED = "replaced-"
"""Follows it in the name of what is about to be replaced, which `remove_unfinished` puts back."""


def find_model(name: str, patterns: Sequence[str], error: type[AufError], revision: str | None = None) -> Path:
    """The local directory of a model given as a path or as a hub id ("owner/name").

    Of a hub repository only the files that match `patterns` are fetched. Raises `error` when there is neither.
    """
    local = Path(name).expanduser()
    if os.path.isdir(local):  # pathlib's raises OSError where the name is too long for a file
        return local
    if os.path.exists(local):
        raise error(f"{local} is a file", "a directory with config.json", "give the directory that holds the model")
    if not HUB_ID.fullmatch(name):
        raise error(
            f"no directory {local.absolute()}",
            "a model directory, or a hub id of the form owner/name",
            "check the path",
        )
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except (OSError, ValueError, httpx.HTTPError) as problem:
        reason = str(problem).strip().split("\n")[0]
        at = f"{name} at revision {revision}" if revision else name
        raise error(
            f"no directory {local.absolute()}, and the hub gave no {at} ({type(problem).__name__}: {reason})",
            "a model directory, or a hub repository that can be reached or is cached",
            "check the name; without a network give the path of a directory",
        ) from problem


def read_json(file: Path, error: type[AufError]) -> dict[str, Any]:
    """The JSON object in `file`; raises `error` when it is missing or is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as problem:
        raise error(
            f"no {file.name} in {file.parent} (it holds: {listing(file.parent)})",
            f"a model directory with {file.name}",
            "give the directory that holds the checkpoint, or fetch it again",
        ) from problem
    except ValueError as problem:  # malformed JSON and malformed UTF-8
        raise error(f"{file} is not JSON ({problem})", "a JSON object", "fetch or write the file again") from problem
    if not isinstance(content, dict):
        raise error(f"{file} holds a {type(content).__name__}", "a JSON object", "fetch or write the file again")
    return content


def listing(directory: Path, limit: int = 8) -> str:
    """Names of what a directory holds, for error messages."""
    names = sorted(entry.name for entry in directory.iterdir()) if directory.is_dir() else []
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "nothing") + more


def weight_files(directory: Path, error: type[AufError]) -> list[Path]:
    """The safetensors files of a checkpoint: those that its index lists, or all where it has no index. Sorted by name.

    Raises `error` when a listed file is missing, when there are no weights, or when they are pickles only: loading a
    pickle may run any code, so none is ever opened.
    """
    files = sorted(directory.glob("*.safetensors"))
    if (directory / INDEX).is_file():
        listed = read_json(directory / INDEX, error).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise error(f"{directory / INDEX} has no weight_map", "weight name -> file name", "fetch the model again")
        files = sorted({directory / name for name in listed.values()})
        if missing := [file.name for file in files if not file.is_file()]:
            raise error(
                f"{directory} lacks {', '.join(missing)}, which {INDEX} lists (it holds: {listing(directory)})",
                "every file of the checkpoint",
                "fetch the model again",
            )
    if not files:
        pickles = sorted(file.name for pattern in PICKLES for file in directory.glob(pattern))
        raise error(
            f"no weights as *.safetensors in {directory} "
            f"({'pickles: ' + ', '.join(pickles) if pickles else 'it holds: ' + listing(directory)})",
            "weights as safetensors: loading a pickle may run any code",
            "save it as safetensors in an environment you trust (SpecForge has a command: specforge export --to hf)"
            if pickles
            else "fetch the model again",
        )
    return files


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a complete file (text as UTF-8) or none, whenever the process or the machine stops. Raises OSError.

    An earlier file of this name stays until the new one is complete on the disk.
    """
    draft = _unfinished(path)
    try:
        with draft.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A new, empty directory to fill. When the block ends, it is on the disk as `path`; when it raises, it is removed.

    A directory that `path` names already is replaced, and only then: it stays where the new one cannot take its place.
    Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = _unfinished(path)  # beside the final place, so that the rename stays inside one file system
    draft.mkdir()
    try:
        yield draft
        for entry in (*draft.rglob("*"), draft):
            sync(entry)
        replaced = _unfinished(path, REPLACED) if path.exists() else None
        if replaced:
            path.rename(replaced)
        try:
            draft.rename(path)
        except BaseException:
            if replaced:
                replaced.rename(path)
            raise
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    sync(path.parent)
    if replaced:
        _remove(replaced)


def remove_unfinished(path: Path) -> None:
    """Remove what a killed process left of writing `path`, and put back what it had only taken away.

    Only for a caller who holds the lock of `path`.
    """
    for entry in path.parent.glob(f".{path.name}{UNFINISHED}*"):
        name, _, kind = entry.name.removeprefix(".").rpartition(UNFINISHED)
        if kind.startswith(REPLACED) and not os.path.lexists(entry.with_name(name)):
            entry.rename(entry.with_name(name))
        else:
            _remove(entry)


def sync(path: Path) -> None:
    """Bring a file, or the names in a directory, to the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path`, which stays afterwards. It is free again when this process ends, however it ends.

    wait: until another process lets go. Raises BlockingIOError where another process has it and not `wait`, OSError
    where the file cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path, timeout=-1 if wait else 0, fallback_to_soft=False)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise BlockingIOError(f"{path} is held by another process") from error
    try:
        yield
    finally:
        with suppress(OSError):
            lock.release()


def shown_size(count: float) -> str:
    """Bytes in GB or MB (10^9 and 10^6), as messages show them."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.3f} MB"


def is_held(path: Path) -> bool:
    """Whether somebody holds the lock file `path`. Raises OSError where it cannot be read."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _remove(entry: Path) -> None:
    """A directory with all in it, or a file; of a link the link alone."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    else:
        entry.unlink()


def _unfinished(path: Path, kind: str = "") -> Path:
    return path.with_name(f".{path.name}{UNFINISHED}{kind}{secrets.token_hex(4)}")
