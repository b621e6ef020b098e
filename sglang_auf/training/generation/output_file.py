"""The JSONL file that `regenerate` appends answers to: what is in it survives a kill, and nothing is asked twice.

One row a line, written whole with one flush. A kill in the middle of a write leaves a last line without its newline: it
is cut off when the file is opened again, and its row is not counted as done. A manifest beside the file says what made
it, and a run with other settings is refused, since a mix of two would look like data of one.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from sglang_auf.errors import DataError

log = logging.getLogger(__name__)


class Manifest(BaseModel):
    """What decides the answers in a file.

    input_sha256: of the prompts. version: of this package; it is there for the record, and may differ.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    model: str
    temperature: float
    max_tokens: int
    seed: int
    thinking: str
    input_sha256: str
    version: str


class AnswerFile:
    """Open it with `with`, which raises DataError where the file cannot be continued. done: ids of its rows."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.done: set[str] = set()
        self._manifest = manifest
        self._descriptor = -1
        self._size = 0

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._size = os.fstat(self._descriptor).st_size
            self._check_manifest()
            self._read()
        except BlockingIOError:
            self._close()
            raise DataError(
                f"{self.path} is being written by another process", "one writer", "wait for it, or give another --out"
            ) from None
        except OSError as error:
            self._close()
            raise self._unwritable(error) from error
        except DataError:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise self._unwritable(error) from error
        finally:
            self._close()

    def append(self, row: Mapping[str, Any]) -> None:
        """One finished row. If it cannot be written whole (disk full), what was written of it is taken back."""
        rest = memoryview(json.dumps(row).encode() + b"\n")
        size = self._size + len(rest)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            with suppress(OSError):  # a torn line is cut off when the file is opened again
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
                    "a new file, or one that this command has begun",
                    "give another --out",
                )
            _write_atomically(file, self._manifest.model_dump_json(indent=2) + "\n")
            return
        try:
            before = Manifest.model_validate_json(file.read_bytes())
        except ValidationError as error:
            problem = error.errors()[0]
            raise DataError(
                f"{file}: {'.'.join(map(str, problem['loc']))} {problem['msg']}",
                "a manifest written by this version",
                "give another --out",
            ) from None
        was, now = before.model_dump(exclude={"version"}), self._manifest.model_dump(exclude={"version"})
        differences = [f"{name} was {was[name]} and is {now[name]}" for name in now if was[name] != now[name]]
        if differences:
            raise DataError(
                f"{self.path} was begun with other settings: {'; '.join(differences)}",
                "the settings it was begun with",
                "give those, or another --out",
            )

    def _read(self) -> None:
        """Collect the ids of complete lines, and cut a torn last line off."""
        complete = 0
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith(b"\n"):
                    log.warning("%s: line %d was torn by a kill; it is cut off and asked again", self.path, number)
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

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def manifest_path(path: Path) -> Path:
    return path.with_name(path.name + ".manifest.json")


def _write_atomically(file: Path, text: str) -> None:
    """The whole file or none, whenever the process or the machine stops."""
    draft = file.with_name(file.name + ".tmp")
    with draft.open("w", encoding="utf-8") as output:
        output.write(text)
        output.flush()
        os.fsync(output.fileno())
    draft.replace(file)
