from __future__ import annotations

from benchmarks.reports.text import NAMED, broken_rows_text, task_table
from benchmarks.stats.summary import summarize_tasks
from tests.benchmarks.stats.test_summary import record


def test_broken_rows_are_named_and_many_are_counted() -> None:
    assert broken_rows_text([]) == ""
    rows = [f"mine.jsonl:{line}: broken JSON" for line in range(1, NAMED + 3)]
    heading, *lines = broken_rows_text(rows).splitlines()
    assert f"not asked: {NAMED + 2}; expected: one JSON object a line" in heading
    assert lines == [*(f"- {row}" for row in rows[:NAMED]), "- and 2 more"]


def test_the_cached_share_has_a_column_where_a_server_says_it() -> None:
    told = summarize_tasks([record("a", (1, 1), 4, prompt_tokens=8, cached_tokens=2), record("b", task="mbpp")])
    heading, *rows = [line.split() for line in task_table(told).splitlines()]
    assert heading[-1] == "cached"
    assert [row[-1] for row in rows] == ["%", "-"] and rows[0][-2] == "25"
    assert "cached" not in task_table(summarize_tasks([record("a", (1, 1), 4)]))
