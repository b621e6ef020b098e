"""What a user says about recording: the section `record` of a server's profile."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from sglang_auf.settings import Settings

RECORD_HEADER = "X-SGLang-AUF-Record"
"""The header of a request that says `on` or `off`: whether its answers may be recorded."""


class RecordSettings(Settings):
    """Which answers are kept for training, where and how long.

    directory: of the recording; None keeps nothing. share: of the answers that may be kept, drawn at random. opt_in:
    keep only answers to requests that ask for it; else all but those that refuse it. max_bytes: of all files together;
    the oldest go first. max_age: days after which a row is gone at the latest.
    """

    directory: str | None = Field(default=None, min_length=1)
    share: float = Field(default=1.0, ge=0, le=1)
    opt_in: bool = False
    max_bytes: int = Field(default=2**28, ge=2**12)
    max_age: float = Field(default=30.0, gt=0, lt=36500)

    @property
    def path(self) -> Path | None:
        """The directory, absolute."""
        return None if self.directory is None else Path(self.directory).expanduser().absolute()
