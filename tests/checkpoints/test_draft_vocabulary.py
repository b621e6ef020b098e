"""The list of tokens a drafter may propose: choosing, writing, reading, refusing."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from sglang_auf import env
from sglang_auf.checkpoints import draft_vocabulary
from sglang_auf.checkpoints.draft_vocabulary import FILE, DraftVocabulary, in_use, load, write
from sglang_auf.errors import CardError, ConfigError
from sglang_auf.training.data.frequent_tokens import most_frequent
from tests.support.tiny_models import drafter_config

ANSWERS = [[5, 5, 5, 9, 2], [9, 7, 2, 5], [2, 1]]  # 5 four times, 2 three, 9 two, 7 and 1 once


def test_what_was_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(tmp_path) is None
    vocabulary = most_frequent(ANSWERS, 3)
    assert write(vocabulary, tmp_path) == tmp_path / FILE
    assert [file.name for file in tmp_path.iterdir()] == [FILE]
    assert load(tmp_path) == in_use(tmp_path) == vocabulary
    monkeypatch.setenv(env.DRAFT_VOCABULARY.name, "0")
    assert in_use(tmp_path) is None


def test_an_earlier_list_is_kept_unless_told(tmp_path: Path) -> None:
    write(most_frequent(ANSWERS, 3), tmp_path)
    with pytest.raises(ConfigError, match="--force"):
        write(most_frequent(ANSWERS, 2), tmp_path)
    write(most_frequent(ANSWERS, 2), tmp_path, force=True)
    assert len(load(tmp_path).tokens) == 2  # type: ignore[union-attr]


def test_a_list_that_cannot_be_written_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(most_frequent(ANSWERS, 3), tmp_path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left"):
        write(most_frequent(ANSWERS, 2), tmp_path, force=True)
    assert load(tmp_path) == most_frequent(ANSWERS, 3)
    assert [file.name for file in tmp_path.iterdir()] == [FILE]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[1, 2]",
        '{"tokens": []}',
        '{"tokens": [3, 2]}',
        '{"tokens": [2, 2]}',
        '{"tokens": [-1, 2]}',
        '{"tokens": [1.5]}',
        '{"tokens": [true]}',
        '{"tokens": ["4"]}',
        '{"tokens": [1], "format": 2}',
        '{"tokens": [1], "words": []}',
    ],
)
def test_a_broken_list_is_refused_with_its_name(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(CardError, match=FILE):
        load(tmp_path)


@pytest.mark.parametrize(
    ("tokens", "dflash", "reason"),
    [((0, 64), {}, "token 64, where the vocabulary has 64"), ((0, 5), {"projector_type": "domino"}, "a domino head")],
    ids=["outside", "domino"],
)
def test_a_list_that_the_drafter_cannot_keep_to(tokens: tuple[int, ...], dflash: dict[str, Any], reason: str) -> None:
    with pytest.raises(CardError, match=reason):
        draft_vocabulary.check(DraftVocabulary(tokens=tokens), drafter_config(4, **dflash))
    draft_vocabulary.check(DraftVocabulary(tokens=(0, 63)), drafter_config(4))
