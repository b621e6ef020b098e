"""The files of a recording: rows are added to the newest, and the oldest go when they are too many bytes or too old.

    {"id":"<32 hex digits>","prompt_ids":[...],"response_ids":[...]}

A row is one answer. The response is what the target generated, and the only part that carries loss; the form is one
that every training command reads. A file is named after the time of its first row. Files go as a whole, so each holds
a part of what is allowed.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from sglang_auf.errors import ConfigError, DataError
from sglang_auf.files import UNFINISHED, is_held, listing, locked, remove_unfinished, write_whole
from sglang_auf.recording.manifest import MANIFEST, Manifest, is_recording

logger = logging.getLogger(__name__)

LOCK = ".lock"
NAME = re.compile(r"\d{8}T\d{12}Z\.jsonl")
_TIME = "%Y%m%dT%H%M%S%fZ.jsonl"
_ID = re.compile(rb'\{"id":"([0-9a-f]{32})"')
WRITTEN = datetime(2026, 11, 30, tzinfo=UTC)
"""When this was written. A clock that shows less is wrong."""
PARTS = 8
"""A file is at most this part of the bytes and of the days that are allowed."""

State = Literal["new", "at rest", "held"]
"""Of a recording: still to be made, free to go on in, or held by a server that records into it."""


def row_files(directory: Path) -> list[Path]:
    """The files with rows, oldest first."""
    return sorted(path for path in directory.glob("*.jsonl") if NAME.fullmatch(path.name))


def require_at_rest(sources: Iterable[str | Path]) -> None:
    """Raise DataError for the first of the training sources that is a recording which a server adds rows to now.

    One that this user may not look into is left to `require_target`.
    """
    for source in sources:
        directory, held = Path(source).expanduser(), False
        with suppress(PermissionError):
            held = is_recording(directory) and is_held(directory / LOCK)
        if held:
            raise DataError(
                f"{directory}, into which a server records now",
                "rows that stay the same, as the training that uses them has to read them again",
                f"give a copy: cp -r {directory} COPY",
            )


def look_at(directory: Path, manifest: Manifest) -> State:
    """What `Ring.open` would find in a directory, given by an absolute path. Nothing is made, changed or kept locked.

    Raises ConfigError where `open` would, but not for a recording of this target that another server holds.
    """
    with _refusals(directory):
        there = next(path for path in (directory, *directory.parents) if os.path.lexists(path))
        # Only a try tells: root may write everywhere, but not on a disk that is read-only or in /proc. It has no name.
        tempfile.TemporaryFile(dir=there).close()
        if there != directory:
            return "new"
        _require_ours(directory)
        if not is_recording(directory):
            return "new"
        manifest.require(directory, ConfigError)
        return "held" if is_held(directory / LOCK) else "at rest"


def _require_ours(directory: Path) -> None:
    """Raise ConfigError for a directory that is no recording and holds something."""
    ours = (LOCK, MANIFEST, f".{MANIFEST}{UNFINISHED}")
    if not is_recording(directory) and not all(entry.name.startswith(ours) for entry in directory.iterdir()):
        raise ConfigError(
            f"record.directory {directory} is no recording; it holds {listing(directory)}",
            "a new directory, or that of an earlier recording",
            "name another directory",
        )


@contextmanager
def _refusals(directory: Path) -> Iterator[None]:
    """Say what the disk refuses as a ConfigError."""
    try:
        yield
    except BlockingIOError as error:
        raise ConfigError(
            f"another server records into {directory}", "one server a directory", "name another directory"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"record.directory {directory} cannot be written ({error.strerror or error})",
            "a directory with room, which this user may write",
        ) from error


@dataclass(slots=True, eq=False)
class RowFile:
    """begun: when its first row was added. ids: of its rows, as numbers. unread: it could not be read, so its rows are
    not known and none is added."""

    path: Path
    begun: datetime
    size: int = 0
    ids: set[int] = field(default_factory=set)
    unread: bool = False


class Ring:
    """The rows of one directory, for one writer. `open`, then `load`, then the rest; `close` at the end."""

    def __init__(self, directory: Path, max_bytes: int, max_age: float, now: Callable[[], float] = time.time) -> None:
        """max_age: days. now: seconds since 1970."""
        self.directory = directory
        self._max_bytes, self._max_age = max_bytes, timedelta(days=max_age)
        self._now = now
        self._files: list[RowFile] = []
        self._descriptor: int | None = None
        self._held = ExitStack()

    @property
    def size(self) -> int:
        """Bytes of all rows."""
        return sum(file.size for file in self._files)

    @property
    def rows(self) -> int:
        return sum(len(file.ids) for file in self._files)

    @property
    def unread(self) -> int:
        """Files that could not be read. They count and go as the others do."""
        return sum(file.unread for file in self._files)

    @property
    def oldest(self) -> datetime | None:
        """When the oldest file was begun."""
        return self._files[0].begun if self._files else None

    def open(self, manifest: Manifest) -> None:
        """Make the directory, or go on in it. Raises ConfigError where that is not possible."""
        try:
            with _refusals(self.directory):
                self._open(manifest)
        except ConfigError:
            self.close()
            raise

    def _open(self, manifest: Manifest) -> None:
        directory = self.directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _require_ours(directory)
        directory.chmod(0o700)
        self._held.enter_context(locked(directory / LOCK))
        remove_unfinished(directory / MANIFEST)
        if is_recording(directory):
            manifest.require(directory, ConfigError)
        else:
            write_whole(directory / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
        for name in (MANIFEST, LOCK):
            (directory / name).chmod(0o600)

    def load(self) -> None:
        """Read which rows there are, and cut off what a kill tore. Raises OSError."""
        self._files = []
        for path in row_files(self.directory):
            file = RowFile(path, datetime.strptime(path.name, _TIME).replace(tzinfo=UTC))
            try:
                self._read(file)
            except FileNotFoundError:  # removed meanwhile
                continue
            except OSError as problem:
                logger.warning("%s cannot be read (%s): its rows are not known", path, problem.strerror or problem)
                file.size, file.unread = path.stat().st_size, True
            self._files.append(file)
        self.expire()

    def _read(self, file: RowFile) -> None:
        with file.path.open("rb+") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    logger.warning("%s: a row that a kill tore is cut off", file.path)
                    lines.truncate(file.size)
                    break
                file.size += len(line)
                if found := _ID.match(line):
                    file.ids.add(int(found[1], 16))
        file.path.chmod(0o600)

    def holds(self, id: int) -> bool:
        return any(id in file.ids for file in self._files)

    def fits(self, line: bytes) -> bool:
        """Whether a row may be kept at all."""
        return len(line) <= self._max_bytes

    def append(self, id: int, line: bytes) -> None:
        """Add a row, whole or not at all. Raises OSError."""
        self.expire(len(line))
        descriptor, file = self._writable(len(line)), self._files[-1]
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        except OSError:
            with suppress(OSError):  # otherwise it is cut off when the recording is opened again
                os.ftruncate(descriptor, file.size)
            raise
        file.size += len(line)
        file.ids.add(id)

    def expire(self, room: int = 0) -> None:
        """Remove what is too old, and the oldest until `room` bytes more fit. Raises OSError.

        A file named as far in the future is from a clock that was wrong: when it grows too old, nobody knows. A clock
        that is wrong now, as before a machine without a battery has asked for the time, removes nothing by age.
        """
        self._forget_removed()
        now = datetime.fromtimestamp(self._now(), UTC)
        if self._descriptor is not None and self._full(self._files[-1], room, now):
            self._end()
        for file in [file for file in self._files if now > WRITTEN and abs(now - file.begun) > self._max_age]:
            self._remove(file)
        while self._files and self.size + room > self._max_bytes:
            self._remove(self._files[0])

    def _remove(self, file: RowFile) -> None:
        if file is self._files[-1]:
            self._end()
        file.path.unlink(missing_ok=True)
        self._files.remove(file)

    def _forget_removed(self) -> None:
        """Of files that somebody else has removed or moved away no row is kept, and none may follow."""
        there = [file for file in self._files if file.path.exists()]
        if there[-1:] != self._files[-1:]:
            self._end()
        self._files = there

    def _full(self, file: RowFile, room: int, now: datetime) -> bool:
        large, old = file.size + room > self._max_bytes // PARTS, now - file.begun > self._max_age / PARTS
        return file.unread or large or old

    def close(self) -> None:
        """Bring the rows to the disk and let go of the directory."""
        self._end()
        self._held.close()

    def _writable(self, room: int) -> int:
        """The descriptor of the newest file, or of a new one where that is full."""
        if self._descriptor is None:
            now = datetime.fromtimestamp(self._now(), UTC)
            if not self._files or self._full(self._files[-1], room, now):
                if self._files:  # a clock that went back must not change the order
                    now = max(now, self._files[-1].begun + timedelta(microseconds=1))
                self._files.append(RowFile(self.directory / now.strftime(_TIME), now))
            self._descriptor = os.open(self._files[-1].path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        return self._descriptor

    def _end(self) -> None:
        if self._descriptor is not None:
            with suppress(OSError):
                os.fsync(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = None


def encoded(id: int, prompt: array[int], response: array[int]) -> bytes:
    """A row as a line."""
    row = {"id": f"{id:032x}", "prompt_ids": prompt.tolist(), "response_ids": response.tolist()}
    return json.dumps(row, separators=(",", ":")).encode() + b"\n"
