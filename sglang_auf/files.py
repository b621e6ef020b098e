"""Directories that hold a model: finding one by path or hub id, and reading the JSON in it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import snapshot_download

from sglang_auf.errors import AufError

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


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
