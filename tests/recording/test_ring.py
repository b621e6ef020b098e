"""The files of a recording: their bounds, their modes, and what kills and full disks leave."""

from __future__ import annotations

import json
import shutil
import stat
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang_auf.errors import ConfigError, DataError
from sglang_auf.recording.manifest import MANIFEST, Manifest
from sglang_auf.recording.ring import PARTS, Ring, encoded, look_at, require_at_rest, row_files
from tests.support.training_runs import limit_file_size

MANIFEST_OF_A_TARGET = Manifest(target_name="t", target_hub_id=None, target_config_hash="c0", tokenizer_hash="t0")
DAY = 86400.0
BYTES = 2**12


class Clock:
    """Seconds since 1970, moved by hand."""

    def __init__(self) -> None:
        self.at = 1.8e9

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def clock() -> Clock:
    return Clock()


def opened(directory: Path, clock: Clock, max_bytes: int = BYTES, max_age: float = 8.0) -> Ring:
    ring = Ring(directory, max_bytes, max_age, clock)
    ring.open(MANIFEST_OF_A_TARGET)
    ring.load()
    return ring


def add(ring: Ring, id: int, tokens: int = 10) -> None:
    ring.append(id, encoded(id, array("i", [1, 2]), array("i", [7] * tokens)))


def rows(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in row_files(directory) for line in file.read_text().splitlines()]


def ids(directory: Path) -> list[int]:
    return [int(row["id"], 16) for row in rows(directory)]


def test_a_recording_is_at_rest_when_no_server_has_it(tmp_path: Path, clock: Clock) -> None:
    ring = opened(tmp_path / "rows", clock)
    add(ring, 1)
    with pytest.raises(DataError, match="into which a server records now") as refused:
        require_at_rest(["answers.jsonl", str(tmp_path / "rows")])
    assert f"cp -r {tmp_path / 'rows'} COPY" in refused.value.remedy
    copy = shutil.copytree(tmp_path / "rows", tmp_path / "copy")
    require_at_rest([copy])
    ring.close()
    require_at_rest([tmp_path / "rows"])


def test_a_look_changes_nothing_and_tells_who_has_the_directory(tmp_path: Path, clock: Clock) -> None:
    directory = tmp_path / "new" / "rows"
    assert look_at(directory, MANIFEST_OF_A_TARGET) == "new"
    assert not directory.parent.exists()
    directory.mkdir(parents=True, mode=0o755)
    assert look_at(directory, MANIFEST_OF_A_TARGET) == "new"
    assert (list(directory.iterdir()), stat.S_IMODE(directory.stat().st_mode)) == ([], 0o755)
    ring = opened(directory, clock)
    assert look_at(directory, MANIFEST_OF_A_TARGET) == "held"
    add(ring, 1)
    ring.close()
    held = sorted(directory.iterdir())
    assert look_at(directory, MANIFEST_OF_A_TARGET) == "at rest"
    assert sorted(directory.iterdir()) == held
    opened(directory, clock).close()


@pytest.mark.parametrize("begun", [False, True])
def test_a_look_refuses_another_targets_recording_also_while_a_server_holds_it(
    begun: bool, tmp_path: Path, clock: Clock
) -> None:
    ring = opened(tmp_path / "rows", clock)
    if not begun:
        ring.close()
    with pytest.raises(ConfigError, match="is a recording of t "):
        look_at(tmp_path / "rows", MANIFEST_OF_A_TARGET.model_copy(update={"target_config_hash": "c1"}))


def unusable(scratch: Path) -> list[Path]:
    """What no server could record into, root's neither."""
    (scratch / "file").touch()
    (scratch / "link").symlink_to("nowhere")
    (scratch / "full").mkdir()
    (scratch / "full" / "something").touch()
    return [*(scratch / name for name in ("file", "file/below", "link", "full")), Path("/proc/nothing/here")]


@pytest.mark.parametrize("which", range(5))
def test_a_look_refuses_what_a_server_could_not_open_with_the_same_words(which: int, tmp_path: Path) -> None:
    directory = unusable(tmp_path)[which]
    with pytest.raises(ConfigError) as looked:
        look_at(directory, MANIFEST_OF_A_TARGET)
    with pytest.raises(ConfigError) as opening:
        Ring(directory, BYTES, 8.0).open(MANIFEST_OF_A_TARGET)
    assert str(directory) in looked.value.found
    assert looked.value.expected == opening.value.expected


def test_a_row_holds_token_ids_and_nothing_else(tmp_path: Path, clock: Clock) -> None:
    ring = opened(tmp_path / "rows", clock)
    ring.append(5, encoded(5, array("i", [1, 2]), array("i", [3, 4])))
    ring.close()
    assert rows(tmp_path / "rows") == [{"id": f"{5:032x}", "prompt_ids": [1, 2], "response_ids": [3, 4]}]


def test_only_the_owner_may_read(tmp_path: Path, clock: Clock) -> None:
    directory = tmp_path / "rows"
    directory.mkdir(mode=0o755)
    ring = opened(directory, clock)
    add(ring, 1)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()} == {0o600}


def test_bytes_are_bounded_and_the_oldest_go(tmp_path: Path, clock: Clock) -> None:
    ring = opened(tmp_path, clock)
    for id in range(200):
        clock.at += 1
        add(ring, id)
        files = row_files(tmp_path)
        assert ring.size == sum(file.stat().st_size for file in files) <= BYTES
        assert all(file.stat().st_size <= BYTES // PARTS for file in files)
    kept = ids(tmp_path)
    assert kept == list(range(200 - len(kept), 200))
    assert ring.size > BYTES * (1 - 1 / PARTS) - 100, "no more goes than must"
    assert [ring.holds(id) for id in (0, kept[0] - 1, kept[0], 199)] == [False, False, True, True]


def test_a_row_larger_than_a_file_has_one_of_its_own_and_one_larger_than_all_is_none(
    tmp_path: Path, clock: Clock
) -> None:
    ring = opened(tmp_path, clock)
    for id in range(4):
        add(ring, id, tokens=BYTES // PARTS)
    assert ids(tmp_path) == [1, 2, 3]
    assert len(row_files(tmp_path)) == 3
    assert not ring.fits(b"x" * (BYTES + 1))


def test_no_row_is_older_than_the_limit(tmp_path: Path, clock: Clock) -> None:
    ring = opened(tmp_path, clock, max_bytes=2**20)
    begun: dict[int, float] = {}
    for id in range(40):
        clock.at += DAY / 2
        add(ring, id)
        begun[id] = clock.at
        assert all(clock.at - begun[kept] <= 8 * DAY for kept in ids(tmp_path))
    assert len(ids(tmp_path)) > 12
    clock.at += 8.1 * DAY
    ring.expire()
    assert (row_files(tmp_path), ring.rows, ring.size, ring.oldest) == ([], 0, 0, None)
    add(ring, 99)
    assert ids(tmp_path) == [99]


def test_old_rows_go_at_the_start_too(tmp_path: Path, clock: Clock) -> None:
    ring = opened(tmp_path, clock)
    add(ring, 1)
    ring.close()
    clock.at += 9 * DAY
    assert opened(tmp_path, clock).rows == 0
    assert row_files(tmp_path) == []


def test_a_clock_that_goes_back_changes_no_order(tmp_path: Path, clock: Clock) -> None:
    ring = opened(tmp_path, clock)
    for id in range(60):
        clock.at -= 10
        add(ring, id)
    assert ids(tmp_path) == sorted(ids(tmp_path))
    assert len(row_files(tmp_path)) > 2


def test_a_clock_that_is_years_behind_removes_nothing(tmp_path: Path, clock: Clock) -> None:
    """A machine without a battery for its clock begins in 1970, until it has asked for the time."""
    ring = opened(tmp_path, clock)
    ring.append(7, encoded(7, array("q", [1]), array("q", [2])))
    ring.close()
    now, clock.at = clock.at, 100.0
    opened(tmp_path, clock).close()
    assert ids(tmp_path) == [7]
    clock.at = now + 9 * DAY
    opened(tmp_path, clock).close()
    assert ids(tmp_path) == []


def test_a_clock_that_was_ahead_does_not_keep_rows_for_longer(tmp_path: Path, clock: Clock) -> None:
    """Neither the rows of that time nor those that come after it, in the same file or in files behind it."""
    ring = opened(tmp_path, clock, max_bytes=2**20)
    add(ring, 0)
    clock.at += 365 * DAY
    ring.close()
    (first,) = row_files(tmp_path)
    ring = opened(tmp_path, clock, max_bytes=2**20, max_age=400)
    add(ring, 1)
    ring.close()
    clock.at -= 365 * DAY
    ring = opened(tmp_path, clock, max_bytes=2**20)
    assert row_files(tmp_path) == [first], "the age of the others is not known"
    add(ring, 2)
    assert ids(tmp_path) == [0, 2]
    clock.at += 8.1 * DAY
    ring.expire()
    assert (row_files(tmp_path), ring.rows) == ([], 0)


def test_a_torn_row_is_cut_off_and_the_others_stay(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    ring = opened(tmp_path, clock)
    add(ring, 1)
    add(ring, 2)
    ring.close()
    [file] = row_files(tmp_path)
    file.write_bytes(file.read_bytes() + b'{"id":"0000')
    again = opened(tmp_path, clock)
    assert (again.rows, again.size) == (2, file.stat().st_size)
    assert "a row that a kill tore is cut off" in caplog.text
    add(again, 3)
    assert ids(tmp_path) == [1, 2, 3]
    assert row_files(tmp_path) == [file], "a small file is continued"


def test_a_full_disk_leaves_no_half_row(tmp_path: Path, clock: Clock) -> None:
    ring = opened(tmp_path, clock, max_bytes=2**20)
    add(ring, 1)
    lift = limit_file_size(ring.size + 20)
    try:
        with pytest.raises(OSError, match="too large"):
            add(ring, 2)
    finally:
        lift()
    add(ring, 3)
    assert ids(tmp_path) == [1, 3]
    assert (ring.rows, ring.holds(2)) == (2, False)


def unreadable(file: Path, directory: Path) -> int:
    """Make a file one that nobody can read, root neither; returns the bytes that it has now."""
    file.unlink()
    directory.mkdir()
    file.symlink_to(directory)
    return file.stat().st_size


def test_a_file_that_cannot_be_read_counts_and_goes_as_the_others_do(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    ring = opened(tmp_path / "rows", clock, max_bytes=2**20)
    for id in range(4):
        clock.at += 2 * DAY
        add(ring, id)
    ring.close()
    files = row_files(tmp_path / "rows")
    size = sum(file.stat().st_size for file in files) - files[1].stat().st_size
    size += unreadable(files[1], tmp_path / "elsewhere")
    again = opened(tmp_path / "rows", clock, max_bytes=2**20)
    assert (again.rows, again.size, again.unread) == (3, size, 1)
    assert f"{files[1]} cannot be read (Is a directory)" in caplog.text
    assert [again.holds(id) for id in range(4)] == [True, False, True, True]
    clock.at += 5 * DAY
    again.expire()
    assert (row_files(tmp_path / "rows"), again.rows, again.unread) == (files[2:], 2, 0)


def test_no_row_is_added_to_a_file_that_cannot_be_read(tmp_path: Path, clock: Clock) -> None:
    ring = opened(tmp_path / "rows", clock)
    add(ring, 1)
    ring.close()
    [file] = row_files(tmp_path / "rows")
    unreadable(file, tmp_path / "elsewhere")
    again = opened(tmp_path / "rows", clock, max_bytes=2**20)
    add(again, 2)
    assert (again.rows, again.unread, len(row_files(tmp_path / "rows"))) == (1, 1, 2)


@pytest.mark.parametrize("go", [Path.unlink, lambda file: file.rename(file.with_suffix(".moved"))])
def test_rows_follow_no_file_that_somebody_else_removed(
    go: Callable[[Path], Any], tmp_path: Path, clock: Clock
) -> None:
    ring = opened(tmp_path, clock, max_bytes=2**20)
    for id in range(3):
        add(ring, id)
        clock.at += 2 * DAY
    for file in row_files(tmp_path):
        go(file)
    ring.expire()
    assert (ring.rows, ring.size, ring.oldest) == (0, 0, None)
    for id in range(2):
        add(ring, id)
    for file in row_files(tmp_path):
        go(file)
    add(ring, 1)
    assert ids(tmp_path) == [1]
    assert (ring.rows, ring.holds(0), ring.holds(1)) == (1, False, True)


def test_two_servers_do_not_share_a_directory(tmp_path: Path, clock: Clock) -> None:
    first = opened(tmp_path, clock)
    with pytest.raises(ConfigError, match="another server records into"):
        opened(tmp_path, clock)
    first.close()
    opened(tmp_path, clock).close()


def test_other_files_and_other_targets_are_not_touched(tmp_path: Path, clock: Clock) -> None:
    used, recorded = tmp_path / "used", tmp_path / "recorded"
    used.mkdir(mode=0o755)
    (used / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"used is no recording; it holds thesis\.txt"):
        opened(used, clock)
    assert [path.name for path in used.iterdir()] == ["thesis.txt"]
    assert stat.S_IMODE(used.stat().st_mode) == 0o755

    opened(recorded, clock).close()
    other = MANIFEST_OF_A_TARGET.model_copy(update={"target_name": "u", "tokenizer_hash": "t1"})
    with pytest.raises(ConfigError, match="is a recording of t "):
        Ring(recorded, BYTES, 1.0).open(other)
    opened(recorded, clock).close()


@pytest.mark.parametrize("place", ["file/rows", "/proc/rows"])
def test_a_directory_that_cannot_be_written_is_an_error_at_the_start(tmp_path: Path, clock: Clock, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"record\.directory .* cannot be written"):
        opened(tmp_path / place, clock)


def test_a_manifest_that_a_kill_left_half_written_is_begun_anew(tmp_path: Path, clock: Clock) -> None:
    (tmp_path / f".{MANIFEST}.writing-0123abcd").write_text("{")
    opened(tmp_path, clock).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", MANIFEST]
