"""Draft vocabulary: the tokens that a drafter may propose, where these are only a part of the target's vocabulary.

A DFlash drafter chooses with the target's head and reads all rows of it, although most tokens are rare in answers. A
list of the frequent tokens beside the weights restricts the drafts to these (FR-Spec, arXiv 2502.14856, does so for
EAGLE). Other tokens are still emitted: verification takes the target's choice among all tokens, so no answer changes.
A shorter list saves time, and costs accepted tokens where it rules out a right draft.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError, field_validator

from sglang_auf import env
from sglang_auf.checkpoints.drafter_settings import head_of
from sglang_auf.checkpoints.weights import config_size
from sglang_auf.errors import CardError, ConfigError
from sglang_auf.files import read_json, remove_unfinished, write_whole

FILE = "draft_vocabulary.json"
"""Beside the drafter's weights."""


class DraftVocabulary(BaseModel):
    """tokens: ids, ascending. coverage: their share of the `answer_tokens` tokens that were counted to choose them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    coverage: float | None = Field(default=None, gt=0, le=1)
    answer_tokens: int | None = Field(default=None, ge=1)
    tokens: tuple[StrictInt, ...] = Field(min_length=1)

    @field_validator("tokens")
    @classmethod
    def _ascending(cls, tokens: tuple[int, ...]) -> tuple[int, ...]:
        if tokens[0] < 0 or any(later <= earlier for earlier, later in pairwise(tokens)):
            raise ValueError("token ids of 0 or more, each larger than the one before it")
        return tokens


def load(drafter: Path) -> DraftVocabulary | None:
    """The list beside the weights, None without one. Raises CardError for a file that is no such list."""
    file = drafter / FILE
    if not file.is_file():
        return None
    try:
        return DraftVocabulary.model_validate(read_json(file, CardError))
    except ValidationError as problem:  # of a list of thousands: shown are the first complaints, and no values
        reasons = "; ".join(f"{'.'.join(map(str, e['loc'][:1]))}: {e['msg']}" for e in problem.errors()[:3])
        raise CardError(
            f"{file}: {reasons}",
            "a draft vocabulary, format 1",
            f"make it again: sglang-auf draft-vocabulary {drafter}",
        ) from problem


def in_use(drafter: Path) -> DraftVocabulary | None:
    """The list that the drafter keeps to in this process, None without one or where env.DRAFT_VOCABULARY is off."""
    return load(drafter) if env.DRAFT_VOCABULARY.is_on() else None


def check(vocabulary: DraftVocabulary, config: Mapping[str, Any]) -> None:
    """Raises CardError where a drafter with this config.json cannot keep to the list."""
    faults = []
    if vocabulary.tokens[-1] >= (of := config_size(config, "vocab_size")):
        faults.append(f"token {vocabulary.tokens[-1]}, where the vocabulary has {of}")
    if (head := head_of(config)) != "dflash":
        faults.append(f"a draft vocabulary for a {head} head, which chooses its candidates itself")
    if faults:
        raise CardError(
            f"{FILE}: {'; '.join(faults)}", "tokens that this drafter can choose", f"leave the drafter without {FILE}"
        )


def written(vocabulary: DraftVocabulary) -> str:
    """The content of FILE."""
    return vocabulary.model_dump_json() + "\n"


def write(vocabulary: DraftVocabulary, drafter: Path, *, force: bool = False) -> Path:
    """Write the list beside the weights, completely or not at all.

    Raises ConfigError where a list exists and `force` is not set, and where it cannot be written.
    """
    file = drafter / FILE
    if file.exists() and not force:
        raise ConfigError(f"{file} exists", "a drafter without one", "give --force to replace it")
    try:
        remove_unfinished(file)
        write_whole(file, written(vocabulary))
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}", "a directory that can be written to") from error
    return file
