"""The JSONL file that `prompts` and `regenerate` append rows to. It survives a kill, and nothing in it is asked twice.

Each row is one line, written at once. A kill in the middle of a write leaves a last line without its newline; that line
is cut off when the file is opened again. A manifest beside the file holds the settings that made it. A run with other
settings is refused, because the file would mix rows of both.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from sglang_auf.errors import DataError
from sglang_auf.files import locked, remove_unfinished, write_whole
from sglang_auf.settings import Settings, checked

logger = logging.getLogger(__name__)


class OutputManifest(Settings):
    """What decides the rows of a file.

    input_sha256: digest of what is asked. version: of this package, recorded only; it may differ.
    """

    format: Literal[1] = 1
    model: str
    temperature: float
    max_tokens: int
    seed: int
    thinking: str
    input_sha256: str
    version: str


class OutputFile:
    """Used in a `with`, which raises DataError if the file cannot be continued. done: ids of its rows."""

    def __init__(self, path: Path, manifest: OutputManifest) -> None:
        self.path = path
        self.done: set[str] = set()
        self._manifest = manifest
        self._opened = ExitStack()
        self._descriptor = -1
        self._size = 0

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            try:
                real = self.path.resolve()  # one file has one lock, also through a link
                opened.enter_context(locked(real.with_name(f".{real.name}.lock")))
                self._descriptor = opened.enter_context(self.path.open("ab", buffering=0)).fileno()
                self._size = os.fstat(self._descriptor).st_size
                self._check_manifest()
                self._read()
            except BlockingIOError:
                raise DataError(
                    f"{self.path} is being written by another process",
                    "one writer",
                    "wait for it, or give another --out",
                ) from None
            except OSError as error:
                raise self._unwritable(error) from error
            self._opened = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._opened:
            try:
                os.fsync(self._descriptor)
            except OSError as error:
                raise self._unwritable(error) from error

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one finished row. If it cannot be written completely (disk full), nothing of it stays."""
        rest = memoryview(json.dumps(row).encode() + b"\n")
        size = self._size + len(rest)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            with suppress(OSError):  # otherwise the line is cut off when the file is opened again
                os.ftruncate(self._descriptor, self._size)
            raise self._unwritable(error) from error
        self._size = size
        self.done.add(row["id"])

    def _check_manifest(self) -> None:
        file = manifest_path(self.path)
        if not file.exists():
            if self._size:
                raise DataError(
                    f"{self.path} has rows, and no {file.name} says what made them",
                    "a new file, or one that this command began",
                    "give another --out",
                )
            remove_unfinished(file)
            write_whole(file, self._manifest.model_dump_json(indent=2) + "\n")
            return
        expected = "a manifest written by this version"
        before = checked(OutputManifest, file.read_bytes(), str(file), expected, "give another --out", DataError)
        was, now = before.model_dump(exclude={"version"}), self._manifest.model_dump(exclude={"version"})
        differences = [f"{name} was {was[name]} and is {now[name]}" for name in now if was[name] != now[name]]
        if differences:
            raise DataError(
                f"{self.path} was begun with other settings: {'; '.join(differences)}",
                "the same settings",
                "give those, or another --out",
            )

    def _read(self) -> None:
        """Collect the ids of complete lines, and cut off an incomplete last line."""
        complete = 0
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    logger.warning("%s: line %d is incomplete; it is cut off and asked again", self.path, number)
                    os.ftruncate(self._descriptor, complete)
                    break
                complete += len(line)
                self.done.add(self._id(number, line))
        self._size = complete

    def _id(self, number: int, line: bytes) -> str:
        try:
            found = json.loads(line)["id"]
        except (ValueError, KeyError, TypeError):
            found = None
        if not isinstance(found, str):
            raise DataError(
                f"line {number} of {self.path} is no row", "rows that this command wrote", "remove the line"
            )
        return found

    def _unwritable(self, error: OSError) -> DataError:
        return DataError(
            f"{self.path} cannot be written: {error.strerror or error}; its {len(self.done)} rows are kept",
            "room and permission to write",
            "make room, then run the same command again: it asks only what is missing",
        )


def manifest_path(path: Path) -> Path:
    return path.with_name(path.name + ".manifest.json")
