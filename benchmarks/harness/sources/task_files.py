"""Files <task>.jsonl with the prompts of a task, as they are sent: rows `{"id": str, "turns": [str, ...]}`."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.harness.sources.hub import Row
from sglang_auf.errors import DataError
from sglang_auf.training.text.rows import is_unicode


def read_task_rows(path: Path, task: str, sample: bool = False) -> list[Row]:
    """The rows of one task, in order. What a row has beside id and turns is not checked.

    sample: the file holds several tasks; take only the rows whose "task" is this one. Raises DataError.
    """
    if not path.is_file():
        raise DataError(
            f"no file {path}",
            f'{task}.jsonl with one {{"id": ..., "turns": [...]}} a line',
            "leave --data-dir out to download from the hub",
        )
    rows: dict[str, Row] = {}
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            row = _parse(path, number, line)
            if sample and row.get("task") != task:
                continue
            if row["id"] in rows:
                raise _bad_row(path, number, f"id {row['id']!r} for the second time")
            rows[row["id"]] = row
    return list(rows.values())


def _parse(path: Path, number: int, line: bytes) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise _bad_row(path, number, f"no JSON ({error})") from None
    if not isinstance(row, dict) or not isinstance(row.get("id"), str):
        raise _bad_row(path, number, "no object with a string id")
    turns = row.get("turns")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise _bad_row(path, number, "turns that are no list of non-empty strings")
    if not all(map(is_unicode, (row["id"], *turns))):
        raise _bad_row(path, number, "half a surrogate pair, which no server takes,")
    return row


def _bad_row(path: Path, number: int, found: str) -> DataError:
    return DataError(f"{found} in {path}, line {number}", '{"id": "...", "turns": ["...", ...]}')
