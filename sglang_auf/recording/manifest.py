"""Which target and tokenizer a recording is of. Its token ids mean nothing to others, so others are refused.

DIR/recording.json    the manifest, written when the directory is made
DIR/*.jsonl           rows (ring.py), in the order of time of their names
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Self

from sglang_auf.checkpoints.target_facts import TargetFacts, tokenizer_hash
from sglang_auf.errors import AufError, DataError
from sglang_auf.settings import Settings, checked

MANIFEST = "recording.json"


class Manifest(Settings):
    """target_name: for messages. target_hub_id: None where the target was no hub cache. target_config_hash: as in a
    drafter's card. tokenizer_hash: None where the target has no tokenizer.json."""

    format: Literal[1] = 1
    target_name: str
    target_hub_id: str | None
    target_config_hash: str
    tokenizer_hash: str | None

    @classmethod
    def of(cls, target: Path) -> Self:
        """Of a recording of the target in this directory. Raises TargetError."""
        facts = TargetFacts.of(target)
        return cls(
            target_name=facts.name,
            target_hub_id=facts.hub_id,
            target_config_hash=facts.config_hash,
            tokenizer_hash=tokenizer_hash(target),
        )

    def require(self, directory: Path, error: type[AufError]) -> None:
        """Raise `error` unless the recording in `directory` is of this target and tokenizer."""
        theirs = read_manifest(directory, error)
        different = [
            f"{name} {getattr(theirs, name)}, where it is {getattr(self, name)} here"
            for name in ("target_config_hash", "tokenizer_hash")
            if getattr(theirs, name) != getattr(self, name)
        ]
        names = (theirs.target_hub_id, self.target_hub_id)
        if None not in names and names[0] != names[1]:
            different.append(f"target {names[0]}, where it is {names[1]} here")
        if different:
            raise error(
                f"{directory} is a recording of {theirs.target_name} ({'; '.join(different)})",
                f"a recording of {self.target_name} with its tokenizer",
                "give another directory",
            )


def is_recording(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def read_manifest(directory: Path, error: type[AufError]) -> Manifest:
    """Raises `error` where the directory holds no recording."""
    try:
        content = (directory / MANIFEST).read_bytes()
    except OSError as problem:
        raise error(
            f"no recording in {directory} ({MANIFEST}: {problem.strerror})",
            "the directory that a server's record.directory named",
        ) from problem
    return checked(Manifest, content, str(directory / MANIFEST), "the manifest of a recording, format 1", "", error)


def require_target(sources: str | Path | Iterable[str | Path], target: Path) -> None:
    """Raise DataError for the first of the training sources that is a recording of another target or tokenizer, or that
    this user may not look into."""
    for source in [sources] if isinstance(sources, str | Path) else sources:
        directory = Path(source).expanduser()
        if is_readable_recording(directory):
            Manifest.of(target).require(directory, DataError)


def is_readable_recording(directory: Path) -> bool:
    """As `is_recording`. Raises DataError for what this user may not look into."""
    try:
        return is_recording(directory)
    except PermissionError as problem:
        raise DataError(
            f"{directory} cannot be looked into ({problem.strerror})",
            "data that this user may read; a recording is for the user alone whose server records it",
            "run the command as that user, or copy the recording",
        ) from problem
