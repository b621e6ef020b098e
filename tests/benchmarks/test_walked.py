"""The walk over a plain server's answers, against the trainer's own walk over the same ones."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from benchmarks.records import Record
from benchmarks.walked import Walker
from sglang_auf.acceptance import total
from sglang_auf.errors import DataError
from sglang_auf.training.evaluate import evaluate_drafter
from tests.tiny_models import VOCABULARY, write_drafter
from tests.training.runs import write_models


def answer(number: int, dice: random.Random, **changes: object) -> Record:
    tokens = [dice.randrange(5, VOCABULARY - 5) for _ in range(dice.randrange(4, 30))]
    fields = {
        "task": "gsm8k" if number % 2 else "mbpp",
        "prompt_id": f"p{number}",
        "turn": 0,
        "temperature": 0.0,
        "prompt_ids": [dice.randrange(5, VOCABULARY - 5) for _ in range(dice.randrange(3, 12))],
        "output_ids": tokens,
        "completion_tokens": len(tokens),
        "started_at": 0.0,
        "latency_s": 1.0,
    }
    return Record.model_validate({**fields, **changes})


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_models(tmp_path_factory.mktemp("walked"))[0]


@pytest.fixture(scope="module")
def records() -> list[Record]:
    dice = random.Random(5)
    return [answer(number, dice) for number in range(9)]


def test_counts_are_the_trainers_walk(target: str, records: list[Record], tmp_path: Path) -> None:
    drafter = write_drafter(tmp_path / "drafter", block_size=4)
    walked = Walker(target, records).walk(drafter)
    assert [record.key for record in walked] == [record.key for record in records]
    rows = [
        {"id": record.prompt_id, "prompt_ids": record.prompt_ids, "response_ids": record.output_ids}
        for record in records
    ]
    data = tmp_path / "answers.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = evaluate_drafter(str(drafter), target, str(data))
    assert total(record.acceptance for record in walked).histogram == expected.histogram
    for record, given in zip(walked, records, strict=True):
        assert record.completion_tokens == given.completion_tokens
        assert record.acceptance.emitted == given.completion_tokens - 1
        assert record.output_ids is None


def test_features_are_shared_by_drafters_with_the_same_taps(
    target: str, records: list[Record], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walker = Walker(target, records)
    first = walker.walk(write_drafter(tmp_path / "one", block_size=4))
    monkeypatch.setattr(Walker, "_batches", None)
    assert walker.walk(tmp_path / "one") == first


def test_answers_that_failed_or_have_one_token_are_left_out(target: str, records: list[Record], tmp_path: Path) -> None:
    dice = random.Random(6)
    more = [answer(20, dice, error="500"), answer(21, dice, completion_tokens=1, output_ids=[7])]
    drafter = write_drafter(tmp_path / "drafter")
    assert [r.key for r in Walker(target, [*records, *more]).walk(drafter)] == [r.key for r in records]


@pytest.mark.parametrize("changes", [{"output_ids": None}, {"prompt_ids": None}, {"temperature": 1.0}])
def test_answers_that_cannot_be_walked_are_refused(target: str, changes: dict[str, object]) -> None:
    with pytest.raises(DataError, match="p3"):
        Walker(target, [answer(3, random.Random(1), **changes)])


def test_no_answers_are_refused(target: str) -> None:
    with pytest.raises(DataError, match="no answer"):
        Walker(target, [])
