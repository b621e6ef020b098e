"""One file of a Hugging Face data set repository, as rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_auf.errors import DataError


@dataclass(frozen=True, slots=True)
class HubFile:
    """revision: a commit, or "main" where none could be verified."""

    repo: str
    filename: str
    revision: str


def read_hub_rows(source: HubFile) -> tuple[list[dict[str, Any]], str]:
    """Download (or find in the hub's cache) and read: (rows in file order, the commit they came from)."""
    from huggingface_hub import hf_hub_download

    try:
        path = Path(hf_hub_download(source.repo, source.filename, repo_type="dataset", revision=source.revision))
    except Exception as error:  # the hub client raises its own, requests', httpx' and the system's errors
        raise DataError(
            f"{source.repo}/{source.filename} cannot be fetched: {type(error).__name__}: {error}",
            "a reachable hub, or the file in its cache",
            "give the rows as <task>.jsonl files with --data-dir, or use --tasks sample, which needs no network",
        ) from error
    return _read(path), _commit(path)


def _read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        from pyarrow import parquet

        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
        return rows
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        rows = json.loads(text)
        return rows
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _commit(path: Path) -> str:
    """The hub's cache keeps files as .../snapshots/<commit>/<filename>."""
    return path.parts[path.parts.index("snapshots") + 1]
