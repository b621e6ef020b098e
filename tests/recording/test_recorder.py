"""The queue before the files: nothing waits for it, and nothing is lost without a count."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_auf.errors import ConfigError
from sglang_auf.recording import recorder as module
from sglang_auf.recording.manifest import MANIFEST
from sglang_auf.recording.recorder import DROPPED, PREFIX, Recorder
from sglang_auf.recording.ring import Ring, row_files
from sglang_auf.recording.settings import RecordSettings
from tests.support.tiny_models import write_target
from tests.support.training_runs import limit_file_size

ROOT = Path(__file__).parents[2]


@pytest.fixture
def record(tmp_path: Path) -> Callable[..., Recorder]:
    """A recorder in tmp_path/rows, which has not been started."""
    target = write_target(tmp_path / "target")

    def make(**settings: Any) -> Recorder:
        return Recorder.opened(RecordSettings(directory=str(tmp_path / "rows"), **settings), target)

    return make


def rows(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in row_files(directory) for line in file.read_text().splitlines()]


def dropped(recorder: Recorder) -> dict[str, int]:
    return {reason: count for reason, count in recorder.snapshot()["dropped"].items() if count}


def test_answers_are_kept_in_their_order(record: Callable[..., Recorder]) -> None:
    recorder = record()
    recorder.start()
    for first in range(50):
        recorder.offer([1, 2, first], [first, 4, 5])
    recorder.stop()
    assert [(row["prompt_ids"], row["response_ids"]) for row in rows(recorder.directory)] == [
        ([1, 2, first], [first, 4, 5]) for first in range(50)
    ]
    figures = recorder.snapshot()
    assert (figures["rows"], figures["recorded"], figures["waiting_tokens"]) == (50, 50, 0)
    assert figures["bytes"] == sum(file.stat().st_size for file in row_files(recorder.directory))
    assert (figures["directory"], figures["share"], figures["error"]) == (str(recorder.directory), 1.0, None)
    assert set(figures["dropped"]) == set(DROPPED)


def test_the_same_beginning_of_an_answer_is_kept_once_also_over_restarts(record: Callable[..., Recorder]) -> None:
    prefix = list(range(PREFIX))
    for start in range(2):
        recorder = record()
        recorder.start()
        recorder.offer([1], [*prefix, 50])
        recorder.offer([1], [*prefix, 51, 52])
        recorder.offer([2], [*prefix, 50])
        recorder.offer([1], [*prefix[:-1], 60])
        recorder.stop()
        assert dropped(recorder) == {"duplicate": 4 if start else 1}
    assert len(rows(recorder.directory)) == 3


def test_short_and_long_answers_are_counted(record: Callable[..., Recorder]) -> None:
    recorder = record(max_bytes=2**12)
    recorder.start()
    recorder.offer([1], [3])
    recorder.offer([1], [])
    recorder.offer([1] * 2**12, [3, 4])
    recorder.stop()
    assert dropped(recorder) == {"short": 2, "large": 1}


def test_a_full_queue_drops_and_does_not_wait(record: Callable[..., Recorder], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUEUED_TOKENS", 100)
    recorder = record()  # not started: nothing empties the queue
    for first in range(10):
        recorder.offer([first] * 20, [1] * 10)
    assert dropped(recorder) == {"queue": 7}
    assert recorder.snapshot()["waiting_tokens"] == 90
    recorder.start()
    recorder.stop()
    assert len(rows(recorder.directory)) == 3
    assert recorder.snapshot()["waiting_tokens"] == 0


def test_a_full_disk_is_counted_and_said_once_and_recording_goes_on(
    record: Callable[..., Recorder], caplog: pytest.LogCaptureFixture
) -> None:
    recorder = record()
    recorder.start()
    recorder.offer([1], [2, 3])
    wait_until(lambda: recorder.snapshot()["recorded"] == 1)
    lift = limit_file_size(recorder.snapshot()["bytes"] + 10)
    try:
        recorder.offer([2], [3, 4])
        recorder.offer([3], [4, 5])
        wait_until(lambda: dropped(recorder).get("disk") == 2)
        assert recorder.snapshot()["error"] == "File too large"
    finally:
        lift()
    recorder.offer([4], [5, 6])
    recorder.stop()
    assert [row["prompt_ids"] for row in rows(recorder.directory)] == [[1], [4]]
    assert recorder.snapshot()["error"] is None
    assert caplog.text.count("answers are served and not kept") == 1


def test_rows_grow_old_while_nothing_is_served(
    record: Callable[..., Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "IDLE_SECONDS", 0.05)
    recorder = record(max_age=0.3 / 86400)
    recorder.start()
    recorder.offer([1], [2, 3])
    wait_until(lambda: recorder.snapshot()["recorded"] == 1)
    wait_until(lambda: recorder.snapshot()["rows"] == 0)
    assert row_files(recorder.directory) == []
    recorder.stop()


def test_a_row_grows_old_also_where_all_that_is_served_is_that_row(record: Callable[..., Recorder]) -> None:
    recorder = record(max_age=0.3 / 86400)
    recorder.start()

    def again() -> bool:
        recorder.offer([1], [2, 3])
        return bool(recorder.snapshot()["recorded"] == 2)

    wait_until(again)
    assert dropped(recorder)["duplicate"] > 0
    recorder.stop()


def test_a_recorder_that_never_started_lets_go_of_its_directory(record: Callable[..., Recorder]) -> None:
    record().stop()
    record().stop()


def test_a_directory_of_another_target_is_refused(record: Callable[..., Recorder], tmp_path: Path) -> None:
    record().stop()
    other = write_target(tmp_path / "other", head_dim=32)
    with pytest.raises(ConfigError, match="is a recording of target "):
        Recorder.opened(RecordSettings(directory=str(tmp_path / "rows")), other)


def test_threads_offer_without_losing_a_count(record: Callable[..., Recorder]) -> None:
    recorder = record()
    recorder.start()
    threads = [
        threading.Thread(target=lambda start=start: [recorder.offer([start, i], [i, start]) for i in range(100)])
        for start in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recorder.stop()
    assert len(rows(recorder.directory)) == recorder.snapshot()["recorded"] == 400


KILLED = """
import sys
from pathlib import Path
from sglang_auf.recording.recorder import Recorder
from sglang_auf.recording.settings import RecordSettings
recorder = Recorder.opened(RecordSettings(directory=sys.argv[2]), Path(sys.argv[1]))
recorder.start()
for first in range(10**9):
    recorder.offer([first], [first, first + 1] * 200)
"""


def test_a_kill_loses_what_waited_and_nothing_that_was_written(record: Callable[..., Recorder], tmp_path: Path) -> None:
    directory = tmp_path / "rows"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "target"), str(directory)], cwd=ROOT)
    wait_until(lambda: (directory / MANIFEST).exists() and sum(f.stat().st_size for f in row_files(directory)) > 2**16)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    written = sum(file.read_bytes().count(b"\n") for file in row_files(directory))
    recorder = record()
    recorder.start()
    recorder.offer([-1], [1, 2])
    recorder.stop()
    kept = rows(directory)
    assert len(kept) == written + 1
    assert [row["prompt_ids"] for row in kept] == [*([first] for first in range(written)), [-1]]


def wait_until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_mistake_of_ours_ends_the_recording_and_is_said(
    record: Callable[..., Recorder], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "QUEUED_TOKENS", 10)
    monkeypatch.setattr(Ring, "holds", lambda *_: 1 / 0)
    recorder = record()
    recorder.start()
    for _ in range(5):
        recorder.offer([1], [2, 3])
    wait_until(lambda: recorder.snapshot()["error"] is not None)
    assert dropped(recorder)["queue"] == 2, "what cannot be written does not pile up"
    assert "ZeroDivisionError" in caplog.text
    recorder.stop()


def test_a_file_that_cannot_be_read_is_said_for_as_long_as_it_is_there(
    record: Callable[..., Recorder], tmp_path: Path
) -> None:
    record().stop()
    (tmp_path / "rows" / "20200101T000000000000Z.jsonl").symlink_to(tmp_path)
    recorder = record(max_age=10**4)
    recorder.start()
    recorder.offer([1], [2, 3])
    recorder.stop()
    figures = recorder.snapshot()
    assert (figures["recorded"], figures["rows"], figures["unread"], figures["error"]) == (1, 1, 1, None)


def test_the_thread_survives_files_that_cannot_be_read(
    record: Callable[..., Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Ring) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Ring, "load", broken)
    recorder = record()
    recorder.start()
    recorder.offer([1], [2, 3])
    recorder.stop()
    assert recorder.snapshot()["recorded"] == 1
