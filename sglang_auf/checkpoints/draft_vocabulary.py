"""Draft vocabulary: the tokens that a drafter may propose, where those are not the target's whole vocabulary.

A DFlash drafter chooses with the target's head, and reads all its rows for that, most of which are tokens that answers
hardly ever hold. With a list of the frequent ones beside its weights the others are not drafted (FR-Spec, arXiv
2502.14856, does so for EAGLE). They are still emitted: verification takes the target's choice among all tokens, so no
answer changes. A draft that the list rules out costs accepted tokens; what is left out saves time.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError, field_validator

from sglang_auf.checkpoints.weights import head_of, size
from sglang_auf.errors import CardError, ConfigError
from sglang_auf.files import read_json, write_whole

FILE = "draft_vocabulary.json"
"""Beside the drafter's weights."""

SWITCH = "SGLANG_AUF_DRAFT_VOCABULARY"
"""Environment variable: set to 0, a drafter chooses among all tokens whatever its list says."""


class DraftVocabulary(BaseModel):
    """tokens: ids, ascending. coverage: their share of the answer_tokens that were counted to choose them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    coverage: float | None = Field(default=None, gt=0, le=1)
    answer_tokens: int | None = Field(default=None, ge=1)
    tokens: tuple[StrictInt, ...] = Field(min_length=1)

    @field_validator("tokens")
    @classmethod
    def _ascending(cls, tokens: tuple[int, ...]) -> tuple[int, ...]:
        if tokens[0] < 0 or any(later <= earlier for earlier, later in pairwise(tokens)):
            raise ValueError("token ids of 0 and more, each larger than the one before it")
        return tokens


def load(drafter: Path) -> DraftVocabulary | None:
    """The list beside the weights, None where there is none. Raises CardError for a file that is no such list."""
    file = drafter / FILE
    if not file.is_file():
        return None
    try:
        return DraftVocabulary.model_validate(read_json(file, CardError))
    except ValidationError as problem:
        reasons = "; ".join(f"{'.'.join(map(str, e['loc'][:1]))}: {e['msg']}" for e in problem.errors()[:3])
        raise CardError(
            f"{file}: {reasons}",
            "a draft vocabulary, format 1",
            f"make it again: sglang-auf draft-vocabulary {drafter}",
        ) from problem


def in_use(drafter: Path) -> DraftVocabulary | None:
    """The list that the drafter is to choose from: None where there is none or SWITCH turns it off."""
    return load(drafter) if switched_on() else None


def switched_on() -> bool:
    """Whether drafters of this process keep to their lists."""
    return os.environ.get(SWITCH) != "0"


def check(vocabulary: DraftVocabulary, config: Mapping[str, Any]) -> None:
    """Raises CardError where a drafter with this config.json cannot keep to the list."""
    faults = []
    if vocabulary.tokens[-1] >= (of := size(config, "vocab_size")):
        faults.append(f"token {vocabulary.tokens[-1]}, where the vocabulary has {of}")
    if (head := head_of(config)) != "dflash":
        faults.append(f"a draft vocabulary for a {head} head, which has a choice of candidates of its own")
    if faults:
        raise CardError(
            f"{FILE}: {'; '.join(faults)}", "tokens that this drafter can choose", f"leave the drafter without {FILE}"
        )


def write(vocabulary: DraftVocabulary, drafter: Path, *, force: bool = False) -> Path:
    """Write the list beside the weights, whole or not at all.

    Raises ConfigError where there is one and not `force`, and where it cannot be written.
    """
    file = drafter / FILE
    if file.exists() and not force:
        raise ConfigError(f"{file} exists", "a drafter without one", "give --force to replace it")
    try:
        write_whole(file, vocabulary.model_dump_json() + "\n")
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}", "a directory to write to", "make room, or mend it") from error
    return file
