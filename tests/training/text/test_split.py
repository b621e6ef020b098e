"""What is held out, and what is left out for it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sglang_auf.errors import ConfigError, DataError
from sglang_auf.training.text.reader import Conversation
from sglang_auf.training.text.split import split_held_out


def conversations(count: int) -> list[Conversation]:
    return [Conversation(f"row/{i}", [i, 2], [False, True]) for i in range(count)]


def test_held_out_count() -> None:
    rows = conversations(50)
    train, held_out = split_held_out(rows, count=8)
    assert (len(train), len(held_out)) == (42, 8)
    reversed_train, reversed_held_out = split_held_out(rows[::-1], count=8)
    assert (reversed_train[::-1], reversed_held_out[::-1]) == (train, held_out)
    assert sorted(c.id for c in train + held_out) == sorted(c.id for c in rows)
    assert split_held_out(rows, count=8, seed=1)[1] != held_out


def test_what_a_held_out_row_asks_is_not_trained_on(caplog: pytest.LogCaptureFixture) -> None:
    rows = conversations(50)
    train, held_out = split_held_out(rows, count=8)
    asked = held_out[0].prompt
    again = [
        replace(held_out[0], id="again"),
        Conversation("another answer", [*asked, 3], [False] * len(asked) + [True]),
        Conversation("goes on", [*asked, 3, 4, 5], [False] * len(asked) + [True, False, True]),
    ]
    assert split_held_out([*rows, *again], count=8) == (train, held_out)
    assert "3 rows ask the same as one that is held out" in caplog.text
    # As it was split by the version that began a run.
    assert split_held_out([*rows, *again], count=8, apart="tokens") == ([*train, *again[1:]], held_out)


def test_a_later_answer_of_a_held_out_row_is_asked_for_too() -> None:
    """Rows of exact tokens hold one answer each, and other rows all answers of a conversation."""
    rows = conversations(50)
    train, held_out = split_held_out(rows, count=8)
    first = held_out[0]
    turns = replace(first, input_ids=[*first.input_ids, 7, 8], loss_mask=[*first.loss_mask, False, True])
    longer = [turns if row is first else row for row in rows]
    later = Conversation("later", [*first.input_ids, 7, 9], [False, False, False, True])
    assert split_held_out([*longer, later], count=8)[0] == train


def test_a_prompt_that_all_rows_share_asks_nothing() -> None:
    rows = [Conversation(f"row/{i}", [1, 1, i + 5], [False, False, True]) for i in range(50)]
    train, held_out = split_held_out([*rows, replace(rows[9], id="again")], count=3)
    assert [row.id for row in held_out] == ["row/9", "row/18", "row/19"]
    assert len(train) == 47


def test_held_out_rows_do_not_change_between_versions() -> None:
    """A run that is resumed by a later version must not train on what it held out."""
    assert [c.id for c in split_held_out(conversations(50), count=3)[1]] == ["row/9", "row/18", "row/19"]


@pytest.mark.parametrize("count", [0, -1])
def test_held_out_count_below_one(count: int) -> None:
    with pytest.raises(ConfigError, match=f"{count} conversations"):
        split_held_out(conversations(10), count=count)


def test_held_out_needs_rows_on_both_sides() -> None:
    with pytest.raises(DataError, match="0 rows to train on and 4 held out"):
        split_held_out(conversations(4), count=4)
