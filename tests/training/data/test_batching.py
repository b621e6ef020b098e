"""Batches: every row once, little padding, the same order in every arm, and the same rest after a resume."""

from __future__ import annotations

import random
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_auf.errors import ConfigError, DataError
from sglang_auf.training.data.batching import collate, plan_batches
from sglang_auf.training.data.conversations import Conversation

GENERATOR = random.Random(0)
LENGTHS = [GENERATOR.randint(20, 400) for _ in range(3000)]


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=80),
    multiple_of=st.integers(1, 8),
    batch_rows=st.none() | st.integers(1, 5),
    epoch=st.integers(0, 3),
)
def test_every_row_is_in_one_batch_within_the_budget(
    lengths: list[int], multiple_of: int, batch_rows: int | None, epoch: int
) -> None:
    if len(lengths) < multiple_of:
        return
    batches = plan_batches(
        lengths, batch_tokens=60, batch_rows=batch_rows, seed=1, epoch=epoch, multiple_of=multiple_of
    )
    rows = list(chain.from_iterable(batches))
    assert batches
    assert len(batches) % multiple_of == 0
    assert len(rows) == len(set(rows))
    if any(len(batch) > 1 for batch in batches):
        assert set(rows) == set(range(len(lengths)))
    else:  # one row each: no batch can be halved to fill the last step
        assert len(lengths) - len(rows) < multiple_of
    for batch in batches:
        assert batch
        assert len(batch) * max(lengths[row] for row in batch) <= 60
        assert len(batch) <= (batch_rows or 60)


def test_rows_of_similar_length_go_together_and_lengths_are_mixed_over_the_epoch() -> None:
    batches = plan_batches(LENGTHS, batch_tokens=4000, seed=3, epoch=0)
    padded = sum(len(batch) * max(LENGTHS[row] for row in batch) for batch in batches)
    assert padded < 1.05 * sum(LENGTHS)
    longest = [max(LENGTHS[row] for row in batch) for batch in batches]
    assert abs(sum(longest[:20]) / 20 - sum(longest) / len(longest)) < 60


def test_order_is_a_function_of_seed_and_epoch() -> None:
    plan = plan_batches(LENGTHS, batch_tokens=4000, seed=3, epoch=1)
    assert plan == plan_batches(list(LENGTHS), batch_tokens=4000, seed=3, epoch=1)
    assert plan != plan_batches(LENGTHS, batch_tokens=4000, seed=3, epoch=2)
    assert plan != plan_batches(LENGTHS, batch_tokens=4000, seed=4, epoch=1)
    assert [sorted(batch) for batch in plan] != sorted(sorted(batch) for batch in plan)


def test_order_does_not_change_between_versions() -> None:
    """A run that is resumed by a later version of Python or of this package must go on with the same batches."""
    lengths = [3, 9, 4, 8, 2, 7, 5, 6]
    assert plan_batches(lengths, batch_tokens=18, seed=42, epoch=0) == [[1], [4, 0, 2], [6, 7], [5, 3]]


def test_steps_are_full_and_the_same_rows_as_without_steps() -> None:
    lengths = [10, 11, 12, 13, 30, 31]
    free = plan_batches(lengths, batch_tokens=60, seed=3, epoch=0)
    stepped = plan_batches(lengths, batch_tokens=60, seed=3, epoch=0, multiple_of=4)
    assert sorted(map(sorted, free)) == [[0, 1, 2, 3], [4], [5]]
    assert sorted(map(sorted, stepped)) == [[0, 1], [2, 3], [4], [5]]


def test_rows_left_out_of_an_epoch_are_logged_and_other_ones_each_time(caplog: pytest.LogCaptureFixture) -> None:
    def left_out(epoch: int) -> set[int]:
        plan = plan_batches([10] * 9, batch_tokens=10, seed=1, epoch=epoch, multiple_of=4)
        return set(range(9)) - set(chain.from_iterable(plan))

    rows = [left_out(epoch) for epoch in range(5)]
    assert [len(some) for some in rows] == [1] * 5
    assert len(set(map(frozenset, rows))) > 1
    assert f"epoch 0 leaves out rows [[{rows[0].pop()}]]" in caplog.text


def test_impossible_plans() -> None:
    with pytest.raises(DataError, match=r"rows \[1\] of 3, up to 50 tokens long"):
        plan_batches([10, 50, 20], batch_tokens=40, seed=0, epoch=0)
    with pytest.raises(DataError, match="3 rows"):
        plan_batches([10, 50, 20], batch_tokens=80, seed=0, epoch=0, multiple_of=4)
    with pytest.raises(ConfigError):
        plan_batches([10], batch_tokens=80, seed=0, epoch=0, multiple_of=0)


def test_collate_pads_on_the_right() -> None:
    padded = collate(
        [Conversation("a", [5, 6], [False, True]), Conversation("b", [7, 8, 9, 4], [False, True, True, False])]
    )
    assert padded.input_ids.tolist() == [[5, 6, 0, 0], [7, 8, 9, 4]]
    assert padded.loss_mask.tolist() == [[False, True, False, False], [False, True, True, False]]
    assert padded.lengths.tolist() == [2, 4]
    assert str(padded.input_ids.dtype) == "torch.int64"
    assert str(padded.loss_mask.dtype) == "torch.bool"
