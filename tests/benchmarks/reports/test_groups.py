"""tau by group: the table, its notes, and what `run`, `sweep`, `compare` and `report` show of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cli import main
from benchmarks.harness.records import read_records
from benchmarks.reports.groups import LONGEST, group_notes, group_table, groups_text
from benchmarks.stats.summary import GroupedTask, summarize_groups
from tests.benchmarks.conftest import write_rows
from tests.benchmarks.stats.test_summary import record

Start = Callable[..., Any]

LANGUAGES = {"en": 4, "de": 2}


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Four English rows, two German ones, and one that does not say."""
    rows = [
        {"id": f"{language}{n}", "turns": [f"{language} {n}"], "language": language}
        for language, count in LANGUAGES.items()
        for n in range(count)
    ]
    write_rows(tmp_path / "mine.jsonl", [*rows, {"id": "x", "turns": ["neither"]}])
    return tmp_path / "mine.jsonl"


def run(url: str, mine: Path, out: Path, *more: str) -> int:
    return main(["run", "--base-url", url, "--prompts", str(mine), "--out", str(out), "--max-tokens", "32", *more])


def test_the_table_has_counts_tau_and_an_interval_from_three_prompts_on() -> None:
    english = [record(str(n), (n % 3, 4), 9, group="en") for n in range(3)]
    other = [record("o", (1, 1), 4, group=""), record("l", (1, 1), 4, group="x" * 99)]
    heading, *rows = group_table(summarize_groups([*english, *other]))
    assert heading == ["task", "group", "prompts", "requests", "failed", "tokens", "tau", "95 %", "micro"]
    assert [row[:6] for row in rows] == [
        ["gsm8k", "en", "3", "3", "0", "27"],
        ["gsm8k", "(missing)", "1", "1", "0", "4"],
        ["gsm8k", "x" * (LONGEST - 1) + "\u2026", "1", "1", "0", "4"],
    ]
    assert ".." in rows[0][7]
    assert [row[7] for row in rows[1:]] == ["-", "-"]


def test_groups_that_are_left_out_are_said() -> None:
    assert groups_text({}) == ""
    (note,) = group_notes({"t": GroupedTask(groups={}, others=4, others_prompts=9)})
    assert note == "t: 4 groups; the 0 with the most prompts are shown, the other 4 have 9 prompts"


def test_a_run_reports_tau_by_a_field_of_the_rows(
    fake: Start, mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(fake().url, mine, out, "--group-by", "language") == 0
    records = {record.prompt_id: record for record in read_records(out / "records.jsonl")}
    assert {id: record.group for id, record in records.items()} == {
        **{f"{language}{n}": language for language, count in LANGUAGES.items() for n in range(count)}, "x": ""
    }  # fmt: skip
    summary = json.loads((out / "summary.json").read_text())
    groups = summary["groups"]["mine.jsonl"]["groups"]
    assert {name: (of["prompts"], of["tau_interval"] is None) for name, of in groups.items()} == {
        "en": (4, False), "de": (2, True), "": (1, True)
    }  # fmt: skip
    assert groups["en"]["completion_tokens"] == sum(r.completion_tokens for r in records.values() if r.group == "en")
    printed = capsys.readouterr().out
    assert "rows without the field, (missing): mine.jsonl:7" in printed
    row = next(line.split() for line in printed.splitlines() if line.startswith("mine.jsonl  en "))
    assert row[:4] == ["mine.jsonl", "en", "4", "4"]


def test_a_page_and_a_sweep_show_the_same_groups(fake: Start, mine: Path, tmp_path: Path) -> None:
    out, server = tmp_path / "sweep", fake()
    flags = ["--prompts", str(mine), "--group-by", "language", "--max-tokens", "32", "--concurrency", "1,2"]
    assert main(["sweep", "--base-url", server.url, "--out", str(out), *flags]) == 0
    table = (out / "sweep.md").read_text()
    assert (
        "| AUF at 1 | mine.jsonl | en | 4 | 4 | 0 |" in table and "| AUF at 2 | mine.jsonl | (missing) | 1 |" in table
    )
    assert main(["report", str(out), "--out", str(tmp_path / "page")]) == 0
    section = (tmp_path / "page" / "report.md").read_text().split("## Tau by group")[1].split("\n## ")[0]
    assert "| sweep/auf-c1 | mine.jsonl | de | 2 | 2 | 0 |" in section
    assert "sweep/auf-c1: rows without the field, (missing): mine.jsonl:7." in section


@pytest.mark.usefixtures("fake_server_program")
def test_a_comparison_reports_tau_by_group(mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--prompts", str(mine), "--group-by", "language", "--max-tokens", "32", "--out", str(tmp_path / "out")]
    assert main(["compare", "--profile", "toy", *flags]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["groups"]["mine.jsonl"]["groups"]["en"]["prompts"] == 4
    assert summary["without_group"] == ["mine.jsonl:7"]
    assert "mine.jsonl  (missing) " in capsys.readouterr().out


def test_a_run_with_another_group_is_not_resumed_into_the_old_one(
    fake: Start, mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server, out = fake(), tmp_path / "run"
    assert run(server.url, mine, out) == 0
    for name in ("of this version", "of an earlier one"):
        assert run(server.url, mine, out, "--resume", "--group-by", "language") == 2, name
        assert "group_by = 'language'" in capsys.readouterr().err
        assert run(server.url, mine, out, "--resume") == 0
        before = json.loads((out / "run.json").read_text())
        before["config"].pop("group_by", None)
        (out / "run.json").write_text(json.dumps(before))


def test_records_and_runs_of_an_earlier_version_are_read(fake: Start, mine: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(fake().url, mine, out) == 0
    lines = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    for line in lines:
        del line["group"]
    write_rows(out / "records.jsonl", lines)
    content = json.loads((out / "run.json").read_text())
    del content["tasks"]["mine.jsonl"]["file"]["without_group"]
    (out / "run.json").write_text(json.dumps(content))
    assert main(["report", str(out), "--out", str(tmp_path / "page")]) == 0
    assert "Tau by group" not in (tmp_path / "page" / "report.md").read_text()


def test_groups_need_rows_of_ones_own(fake: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--tasks", "sample", "--group-by", "language", "--out", str(tmp_path / "run")]
    assert main(["run", "--base-url", fake().url, *flags]) == 2
    assert "--group-by without --prompts" in capsys.readouterr().err


def test_plain_decoding_has_no_groups(
    fake: Start, mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, server = tmp_path / "run", fake(speculative=False)
    assert run(server.url, mine, out, "--group-by", "language", "--plain") == 2
    assert "--group-by with --plain, which has no tau" in capsys.readouterr().err
    assert not out.exists()
