from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.harness.sources.task_files import read_task_rows
from sglang_auf.errors import DataError


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"id": "b", "turns": ["x"]', "no JSON"),
        ("\xff", "no JSON"),
        ('["b"]', "no object with a string id"),
        ('{"turns": ["x"]}', "no object with a string id"),
        ('{"id": "b"}', "no list of non-empty strings"),
        ('{"id": "b", "turns": []}', "no list of non-empty strings"),
        ('{"id": "b", "turns": ["x", 3]}', "no list of non-empty strings"),
        ('{"id": "b", "turns": [" "]}', "no list of non-empty strings"),
        ('{"id": "b", "turns": ["x", "\\ud83d"]}', "half a surrogate pair"),
        ('{"id": "\\ud83d", "turns": ["x"]}', "half a surrogate pair"),
        ('{"id": "a", "turns": ["x"]}', "'a' for the second time"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, line: str, found: str) -> None:
    path = tmp_path / "gsm8k.jsonl"
    path.write_bytes(b'{"id": "a", "turns": ["x"]}\n\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(DataError, match=f"{found}.*line 3"):
        read_task_rows(path, "gsm8k")


def test_separators_inside_a_text_do_not_split_its_row(tmp_path: Path) -> None:
    path = tmp_path / "gsm8k.jsonl"
    path.write_text('{"id": "a", "turns": ["one\u2028two"]}\n', encoding="utf-8")
    assert read_task_rows(path, "gsm8k")[0]["turns"] == ["one\u2028two"]
