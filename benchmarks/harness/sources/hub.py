"""Files of data sets on the Hugging Face hub, each at a pinned commit."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_auf.errors import DataError

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a Hugging Face data set. revision: a commit, or "main" where none could be verified."""

    repo: str
    filename: str
    revision: str


def read_hub_rows(source: HubFile) -> tuple[list[Row], str]:
    """The rows of a hub file in file order, and the commit that they come from. Raises DataError.

    Not `datasets.load_dataset`, which says nothing of the commit that "main" was, and cannot read a file that only
    the hub's cache has.
    """
    from huggingface_hub import hf_hub_download

    try:
        path = Path(hf_hub_download(source.repo, source.filename, repo_type="dataset", revision=source.revision))
    except Exception as error:  # the hub client raises its own, requests', httpx' and the system's errors
        raise DataError(
            f"{source.repo}/{source.filename} cannot be fetched: {type(error).__name__}: {error}",
            "a reachable hub, or the file in its cache",
            "give the rows as <task>.jsonl files with --data-dir, or use --tasks sample, which needs no network",
        ) from error
    commit = path.parts[-1 - len(Path(source.filename).parts)]  # .../snapshots/<commit>/<filename>
    return _rows_of(path), commit


def _rows_of(path: Path) -> list[Row]:
    if path.suffix == ".parquet":
        from pyarrow import parquet

        rows: list[Row] = parquet.read_table(path).to_pylist()
        return rows
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        rows = json.loads(text)
        return rows
    return [json.loads(line) for line in text.split("\n") if line.strip()]
