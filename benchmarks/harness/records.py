"""One JSON line per request, written so that a killed run loses at most the line that it was writing."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import ConfigDict, Field

from benchmarks.harness.results import StrictModel
from sglang_auf.acceptance import Acceptance
from sglang_auf.errors import DataError
from sglang_auf.settings import checked

logger = logging.getLogger(__name__)

Key = tuple[str, str, int]
"""task, prompt id, turn"""


class Record(StrictModel):
    """One request and its answer. Times in seconds; started_at is Unix time. error: None where it was answered.

    waited_s: in an open loop, from when it was due until it was sent; its times count from when it was due, started_at
    too. None in a closed loop, and for a later turn of a conversation, which is due when the answer before is there.

    accepted_by_step: accepted drafts of each verify step, in order; None where it was not asked for or is not known.
    strict_tools: a tool of the request is `strict`, so that a grammar may have forbidden tokens.
    cached_tokens: of the prompt, those that the prefix cache had; None where the server does not say it.
    group: the prompt's (sources/prompt.py); None where the prompts of its task are in no groups. output_text: "" for a
    prompt of token ids, which others have asked: its tokens are kept, and no text.
    """

    model_config = ConfigDict(frozen=True)

    task: str
    prompt_id: str
    turn: int
    group: str | None = None
    seed: int | None = None
    temperature: float
    prompt_ids: list[int] | None = None
    output_ids: list[int] | None = None
    output_text: str = ""
    finish_reason: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int | None = None
    completion_tokens: int = 0
    verify_steps: int = 0
    accepted_histogram: list[int] = Field(default_factory=list)
    accepted_by_step: list[int] | None = None
    proposed: int | None = None
    block_size: int | None = None
    strict_tools: bool = False
    started_at: float
    ttft_s: float | None = None
    latency_s: float
    waited_s: float | None = None
    error: str | None = None

    @property
    def key(self) -> Key:
        return (self.task, self.prompt_id, self.turn)

    @property
    def failed(self) -> bool:
        return self.error is not None

    @property
    def acceptance(self) -> Acceptance:
        """Its counts of verify steps; the empty sum for a failed request and for one without a verify step."""
        if self.failed:
            return Acceptance()
        return Acceptance.of_request(self.accepted_histogram, self.completion_tokens, self.proposed)


def latest(records: Iterable[Record]) -> list[Record]:
    """The last record of each request: a resumed run asks again what failed before."""
    return list({record.key: record for record in records}.values())


def read_records(path: Path) -> list[Record]:
    """All complete lines of a record file. A last line without its newline was cut by a kill and is left out.

    Raises DataError.
    """
    if not path.is_file():
        raise DataError(f"no file {path}", "the records of a run that has started")
    complete, torn = _split(path)
    if torn:
        logger.warning("%s: the last line was torn when the run was interrupted; it is dropped", path)
    return [_parse(path, number, line) for number, line in enumerate(complete.split(b"\n")[:-1], start=1)]


def drop_torn_line(path: Path) -> None:
    """Remove a torn last line, so that the next record starts on a line of its own."""
    complete, torn = _split(path)
    if torn:
        with path.open("r+b") as file:
            file.truncate(len(complete))


def _split(path: Path) -> tuple[bytes, bytes]:
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    return content[:end], content[end:]


def _parse(path: Path, number: int, line: bytes) -> Record:
    return checked(
        Record,
        line,
        f"{path}, line {number}",
        "a record written by this version of the benchmark",
        "remove the line, or start the run again in another directory",
        DataError,
    )


class RecordWriter:
    """Appends records, and flushes each to the system before its conversation goes on."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")

    def write(self, record: Record) -> None:
        self._file.write(record.model_dump_json().encode() + b"\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
