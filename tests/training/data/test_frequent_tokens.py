"""The most frequent tokens of answers, and the command that lists them for a drafter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sglang_auf.checkpoints.draft_vocabulary import FILE, load
from sglang_auf.cli import main
from sglang_auf.errors import ConfigError
from sglang_auf.training.data.frequent_tokens import most_frequent
from tests.support.tiny_models import write_drafter, write_target
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
