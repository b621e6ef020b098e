"""The exceptions a user meets. Each says what was found, what was expected and, where it adds something, what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class AufError(Exception):
    """A mistake that the user can fix.

    found: what is wrong; expected: what would be right; remedy: the command or the change that fixes it, left out where
    `expected` says it already.
    """

    exit_code = 2

    def __init__(self, found: str, expected: str, remedy: str = "") -> None:
        self.found = found
        self.expected = expected
        self.remedy = remedy
        super().__init__(f"found: {found}; expected: {expected}" + (f"; to fix it: {remedy}" if remedy else ""))


class CompatError(AufError):
    """The installed SGLang is not the one this plugin was written for."""


class ConfigError(AufError):
    """A flag, profile or configuration value that cannot be honoured."""


class CardError(AufError):
    """The drafter does not fit the target, or its files are not what they claim to be."""


class TargetError(AufError):
    """The target model cannot be made or loaded."""


class DataError(AufError):
    """An input data file is missing or broken."""


class ServerError(AufError):
    """A server did not start, died, or is not speculating."""


class TrainingError(AufError):
    """A training run that cannot start, go on or be resumed."""


@contextmanager
def noting(doing: str) -> Iterator[None]:
    """Add what was being done to the notes of an error that leaves the block, which is otherwise as it was."""
    try:
        yield
    except Exception as error:
        error.add_note(doing)
        raise
