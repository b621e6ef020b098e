"""The list of tokens a drafter may propose: choosing, writing, reading, refusing."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from sglang_auf.checkpoints import draft_vocabulary
from sglang_auf.checkpoints.draft_vocabulary import FILE, SWITCH, DraftVocabulary, in_use, load, most_frequent, write
from sglang_auf.cli import main
from sglang_auf.errors import CardError, ConfigError
from tests.support.tiny_models import drafter_config, write_drafter, write_target
from tests.support.toy_tokenizer import toy_tokenizer

ANSWERS = [[5, 5, 5, 9, 2], [9, 7, 2, 5], [2, 1]]  # 5 four times, 2 three, 9 two, 7 and 1 once


@pytest.mark.parametrize(
    ("count", "tokens", "coverage"),
    [(1, (5,), 4 / 11), (2, (2, 5), 7 / 11), (4, (1, 2, 5, 9), 10 / 11), (9, (1, 2, 5, 7, 9), 1.0)],
    ids=["one", "two", "of equally frequent ones the lower id", "no more than there are"],
)
def test_the_most_frequent_tokens_in_order_of_their_ids(count: int, tokens: tuple[int, ...], coverage: float) -> None:
    found = most_frequent(ANSWERS, count)
    assert (found.tokens, found.answer_tokens) == (tokens, 11)
    assert found.coverage == pytest.approx(coverage)


@pytest.mark.parametrize(("answers", "count"), [([], 4), ([[]], 4), (ANSWERS, 0), (ANSWERS, -1)])
def test_nothing_to_choose_from(answers: list[list[int]], count: int) -> None:
    with pytest.raises(ConfigError, match="--size"):
        most_frequent(answers, count)


def test_what_was_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(tmp_path) is None
    vocabulary = most_frequent(ANSWERS, 3)
    assert write(vocabulary, tmp_path) == tmp_path / FILE
    assert [file.name for file in tmp_path.iterdir()] == [FILE]
    assert load(tmp_path) == in_use(tmp_path) == vocabulary
    monkeypatch.setenv(SWITCH, "0")
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


def test_the_command_counts_answers_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of rows that are tokens already: prompts are not counted."""
    target, drafter = write_target(tmp_path / "target"), write_drafter(tmp_path / "drafter", 4)
    toy_tokenizer().save_pretrained(target)
    rows = [
        {"id": str(row), "prompt_ids": [11, 11, 11, 11, 11, 11], "response_ids": answer, "finish_reason": "length"}
        for row, answer in enumerate(ANSWERS)
    ]
    data = tmp_path / "answers.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["draft-vocabulary", str(drafter), str(target), "--data", str(data), "--size", "3"]
    assert main(command) == 0
    assert load(drafter) == most_frequent(ANSWERS, 3)
    assert "3 tokens" in capsys.readouterr().out
    assert main(command) == 2
    assert "--force" in capsys.readouterr().err
    (drafter / FILE).write_text("broken")
    assert main([*command, "--force"]) == 0
    assert load(drafter) == most_frequent(ANSWERS, 3)
