from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.cli import main
from benchmarks.reports.positions import bucket_table, position_sections
from benchmarks.stats.positions import by_position, by_prompt_length
from tests.benchmarks.stats.test_positions import answer

Start = Callable[..., Any]

RECORDS = [answer([n % 8, 3] * 15, f"p{n}", prompt_tokens=40 * n) for n in range(1, 6)]


def test_the_table_has_a_row_for_each_run_and_bucket() -> None:
    buckets = by_position(RECORDS)
    heading, *rows = bucket_table({"one": buckets, "two": buckets[:1]}, "position")
    assert heading[:7] == ["run", "position", "answers", "steps", "tau", "tau at 1-64", "micro"]
    assert heading[7:] == ["alpha_1", "alpha_2", "alpha_3", "alpha_4"]
    assert [row[:2] for row in rows] == [*(["one", bucket.name] for bucket in buckets), ["two", "1-64"]]
    assert all(len(row) == len(heading) for row in rows)
    first = buckets[0].summary
    assert first.tau_interval is not None
    assert rows[0][2:5] == [
        "5", str(first.verify_steps), f"{first.tau:.2f} ({first.tau_interval.low:.2f}..{first.tau_interval.high:.2f})"
    ]  # fmt: skip


def test_by_prompt_length_there_is_no_start() -> None:
    heading, *rows = bucket_table({"one": by_prompt_length(RECORDS)}, "tokens")
    assert "tau at 1-64" not in heading
    assert [row[1] for row in rows] == ["1-64", "65-128", "129-256"]


def test_a_page_without_recorded_steps_says_what_to_do() -> None:
    unknown = [record.model_copy(update={"accepted_by_step": None}) for record in RECORDS]
    by_length, by_place = position_sections({"run": unknown})
    assert by_length.table is not None
    assert by_length.picture is not None
    assert "--record-steps" in by_place.text
    assert by_place.table is None
    assert by_place.picture is None


def test_answers_that_are_left_out_are_counted() -> None:
    mixed = [RECORDS[0].model_copy(update={"accepted_by_step": None}), *RECORDS[1:]]
    _, by_place = position_sections({"run": mixed, "other": RECORDS})
    assert "run: 1 answers without known steps are left out." in by_place.text
    assert "other" not in by_place.text


def test_a_run_that_recorded_its_steps_is_reported_by_position(fake: Start, data_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["run", "--base-url", fake().url, "--tasks", "mt_bench", "--limit", "6", "--data-dir", str(data_dir)]
    assert main([*arguments, "--out", str(out), "--record-steps"]) == 0
    assert main(["report", str(out), "--out", str(tmp_path / "report")]) == 0
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    section = text.split("## Tau by position in the answer")[1].split("\n## ")[0]
    assert "| run | 1-64 | 12 |" in section
    assert "](position.png)" in section
    assert (tmp_path / "report" / "position.png").read_bytes().startswith(b"\x89PNG")
