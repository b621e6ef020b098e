from __future__ import annotations

from benchmarks.reports.text import NAMED, broken_rows_text


def test_broken_rows_are_named_and_many_are_counted() -> None:
    assert broken_rows_text([]) == ""
    rows = [f"mine.jsonl:{line}: broken JSON" for line in range(1, NAMED + 3)]
    heading, *lines = broken_rows_text(rows).splitlines()
    assert f"not asked: {NAMED + 2}; expected: one JSON object a line" in heading
    assert lines == [*(f"- {row}" for row in rows[:NAMED]), "- and 2 more"]
