"""Which rows are trained on and which decide."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import pytest

from sglang_auf.errors import DataError
from sglang_auf.training.adapt.rows import HELD_OUT, OLD, OLD_HELD_OUT, TRAINED, write_rows
from sglang_auf.training.adapt.settings import AdaptSettings
from sglang_auf.training.recipe import Recipe
from tests.support.toy_tokenizer import toy_tokenizer
from tests.support.training_runs import tiny_recipe

TINY = tiny_recipe("target", "none")
RECIPE = TINY.model_copy(update={"data": TINY.data.model_copy(update={"overlong": "truncate"})})
OF_TEXT = RECIPE.model_copy(update={"data": RECIPE.data.model_copy(update={"max_length": 200})})


def written(
    directory: Path, rows: list[dict[str, Any]], recipe: Recipe = RECIPE, **changes: Any
) -> dict[str, list[dict[str, Any]]]:
    source = directory / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"drafter": "d", "recorded": source, "out": directory / "out", "min_rows": 20, **changes}
    counts = write_rows(AdaptSettings.model_validate(given), recipe, toy_tokenizer(), directory)
    files = {name: [json.loads(line) for line in (directory / name).read_text().splitlines()] for name in counts}
    assert counts == {name: len(rows) for name, rows in files.items()}
    return files


def row(number: int, prompt: list[int] | None = None, length: int = 10) -> dict[str, Any]:
    return {"id": f"row-{number}", "prompt_ids": prompt or [9, number], "response_ids": [7] * length}


def test_the_last_rows_decide(tmp_path: Path) -> None:
    rows = [row(number) for number in range(40)]
    files = written(tmp_path, rows, held_out=0.25)
    assert files == {TRAINED: rows[:30], HELD_OUT: rows[30:]}


def test_a_prompt_that_is_held_out_is_not_trained_on(tmp_path: Path) -> None:
    rows = [row(number, [5] if number % 8 == 0 else None) for number in range(40)]
    files = written(tmp_path, rows, held_out=0.25)
    assert [each["id"] for each in files[HELD_OUT]] == [f"row-{number}" for number in range(30, 40)]
    assert [each["id"] for each in files[TRAINED]] == [f"row-{number}" for number in range(30) if number % 8]


def test_rows_that_the_trainer_would_not_use_do_not_count(tmp_path: Path) -> None:
    long = row(98, [5] * 30, length=30)
    rows = [*(row(number) for number in range(20)), long, row(99, length=3)]
    files = written(tmp_path, rows)
    assert files[HELD_OUT][-1] == {**long, "response_ids": [7] * 10}, "cut to 40 tokens"
    assert sum(map(len, files.values())) == 21
    with pytest.raises(DataError, match=r"21 rows in .* that can be trained on; expected: 22 or more"):
        written(tmp_path, rows, min_rows=22)


def turns(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Say {number}."}, {"role": "assistant", "content": "Hi there."}]


def test_old_rows_of_any_form_have_their_share(tmp_path: Path) -> None:
    old = [{"id": f"old-{number}", "messages": turns(number), "note": number} for number in range(100)]
    source = tmp_path / "old.json"
    source.write_text(json.dumps([*old, "broken"]))
    files = written(tmp_path, [row(number) for number in range(50)], OF_TEXT, data=(str(source),), old_share=0.2)
    assert {name: len(rows) for name, rows in files.items()} == {TRAINED: 40, HELD_OUT: 10, OLD: 10, OLD_HELD_OUT: 10}
    assert all(
        each["messages"] == turns(each["note"]) and each["id"] == f"old/old-{each['note']}" for each in files[OLD]
    )
    source.write_text(json.dumps(old[::-1]))
    again = written(tmp_path, [row(number) for number in range(50)], OF_TEXT, data=(str(source),), old_share=0.2)
    assert again == files, "in any order of the rows"


def test_too_few_old_rows_are_all_used_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "old.jsonl.in"
    source.write_text("".join(json.dumps(row(number)) + "\n" for number in range(10)))
    files = written(tmp_path, [row(number) for number in range(50)], data=(str(source),))
    assert (len(files[OLD]), len(files[OLD_HELD_OUT])) == (8, 2)
    assert "--data has 8 rows to train on, where 40 were wanted" in caplog.text


def test_old_rows_that_give_held_out_answers_away_or_cannot_be_used_are_left_out(tmp_path: Path) -> None:
    source = tmp_path / "old.jsonl.in"
    usable = [{**row(number), "id": f"o{number}", "prompt_ids": [8, number]} for number in range(30)]
    asked = [{**row(number), "id": f"asked-{number}"} for number in range(40, 50)]  # those that decide
    questions = [{"id": f"q{number}", "messages": [{"role": "user", "content": "Hi?"}]} for number in range(30)]
    source.write_text("".join(json.dumps(each) + "\n" for each in [*asked, *questions, *usable]))
    files = written(tmp_path, [row(number) for number in range(50)], data=(str(source),))
    assert [each["id"] for each in files[HELD_OUT]] == [f"row-{number}" for number in range(40, 50)]
    old = {each["id"] for name in (OLD, OLD_HELD_OUT) for each in files[name]}
    assert old == {f"old/o{number}" for number in range(30)}

    source.write_text("".join(json.dumps(each) + "\n" for each in questions))
    with pytest.raises(DataError, match=r"can be trained on \(no answer"):
        written(tmp_path, [row(number) for number in range(50)], data=(str(source),))


def test_old_rows_with_dates_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"id": str(number), "messages": turns(number), "timestamp": datetime(2026, 1, 1)} for number in range(60)]
    data = datasets.Dataset.from_list(rows)
    monkeypatch.setattr("datasets.load_dataset", lambda *names, split, revision: data)
    files = written(tmp_path, [row(number) for number in range(50)], OF_TEXT, data=("someone/dates",))
    assert len(files[OLD]) == 40
    assert files[OLD][0]["timestamp"].startswith("2026-01-01")
