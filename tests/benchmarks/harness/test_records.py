from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.records import Record, RecordWriter, drop_torn_line, latest, read_records
from sglang_auf.errors import DataError


def record(prompt_id: str = "a", **fields: Any) -> Record:
    given = {"task": "gsm8k", "prompt_id": prompt_id, "turn": 0, "temperature": 0.0, "started_at": 1.0}
    return Record.model_validate({**given, "latency_s": 1.0, **fields})


def write(path: Path, *records: Record) -> None:
    with RecordWriter(path) as writer:
        for one in records:
            writer.write(one)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    kept = [record("a", output_text="über\n\u2028", output_ids=[1, 2]), record("b", accepted_histogram=[1, 2])]
    write(path, kept[0])
    write(path, kept[1])
    assert read_records(path) == kept


def test_a_record_is_on_disk_before_the_writer_closes(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    with RecordWriter(path) as writer:
        writer.write(record())
        assert read_records(path) == [record()]


@pytest.mark.parametrize("cut", [1, 20])
def test_a_torn_last_line_is_dropped_and_said_so(tmp_path: Path, caplog: pytest.LogCaptureFixture, cut: int) -> None:
    path = tmp_path / "records.jsonl"
    write(path, record("a"), record("b"))
    path.write_bytes(path.read_bytes()[:-cut])
    assert read_records(path) == [record("a")]
    assert "torn" in caplog.text


def test_after_a_torn_line_is_dropped_the_next_record_stands_alone(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    write(path, record("a"))
    with path.open("ab") as file:
        file.write(b'{"task": "gsm')
    drop_torn_line(path)
    write(path, record("c"))
    assert read_records(path) == [record("a"), record("c")]


def test_a_broken_line_in_the_middle_is_no_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    write(path, record("a"))
    path.write_bytes(path.read_bytes() + b'{"task": 3}\n')
    write(path, record("b"))
    with pytest.raises(DataError, match="line 2: task"):
        read_records(path)


def test_the_last_record_of_a_request_counts() -> None:
    failed, answered = record("a", error="500"), record("a", completion_tokens=3)
    assert latest([failed, record("b"), answered]) == [answered, record("b")]


def test_a_failed_request_has_no_acceptance() -> None:
    assert record(error="500", accepted_histogram=[1], completion_tokens=5).acceptance.verify_steps == 0
