"""Batches and anchors: every row once, little padding, the same in every arm, and the same rest after a resume."""

from __future__ import annotations

import random
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_auf.errors import ConfigError, DataError
from sglang_auf.training.data.batching import anchor_generators, anchor_positions, collate, draw_anchors, plan_batches
from sglang_auf.training.text.reader import Conversation

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


# --- anchors ---


def answers(*rows: str) -> torch.Tensor:
    """loss_mask from strings: 'a' a token of an answer, anything else not."""
    width = max(map(len, rows))
    return torch.tensor([[sign == "a" for sign in row.ljust(width)] for row in rows])


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_an_anchor_and_the_token_after_it_are_both_the_answers() -> None:
    found = anchor_positions(answers("uuaaaauaauau", "aaaaaaaaaaaa"))
    assert found[0].nonzero()[:, 0].tolist() == [2, 3, 4, 7]
    assert found[1].nonzero()[:, 0].tolist() == list(range(11))


def test_all_eligible_anchors_are_drawn_when_there_is_room() -> None:
    anchors, valid = draw_anchors(answers("uuaaaauaauau", "uuuuuuuuuaaa", "uuuuuuuuuuua"), 10, generators(0, 1, 2))
    assert [row[ok].tolist() for row, ok in zip(anchors, valid, strict=True)] == [[2, 3, 4, 7], [9, 10], []]
    assert anchors.shape == valid.shape == (3, 4)


@given(data=st.data())
def test_anchors_are_eligible_sorted_and_different(data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.text("ua", min_size=2, max_size=12), min_size=1, max_size=4))
    per_row = data.draw(st.integers(1, 8))
    mask = answers(*rows)
    anchors, valid = draw_anchors(mask, per_row, generators(*range(len(rows))))
    eligible = anchor_positions(mask)
    for row in range(len(rows)):
        drawn = anchors[row][valid[row]].tolist()
        assert drawn == sorted(set(drawn))
        assert all(eligible[row, anchor] for anchor in drawn)
        assert len(drawn) == min(per_row, int(eligible[row].sum()))
    assert anchors.shape[1] <= per_row
    assert anchors.max() < mask.shape[1]


def test_what_a_conversation_draws_does_not_depend_on_its_company() -> None:
    row = "uuaaaaaaaauu"
    alone, ok = draw_anchors(answers(row), 3, generators(7))
    for others in (["ua"], ["aaaaaaaaaaaaaaaaaaaa", "uuuuaa"], ["u", "u"]):
        anchors, valid = draw_anchors(answers(*others, row), 3, generators(*range(len(others)), 7))
        assert anchors[-1][valid[-1]].tolist() == alone[ok].tolist()


def test_a_generator_draws_anew_each_time_and_the_same_from_the_same_seed() -> None:
    mask = answers("u" + "a" * 40)
    generator = torch.Generator().manual_seed(3)
    epochs = [draw_anchors(mask, 5, [generator])[0].tolist() for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert draw_anchors(mask, 5, generators(3))[0].tolist() == epochs[0]


def test_every_anchor_is_as_likely_as_another() -> None:
    mask = answers("uaaaaaaa")  # 1..6
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(8)
    for _ in range(900):
        counts[draw_anchors(mask, 2, [generator])[0][0]] += 1
    assert counts[[0, 7]].tolist() == [0, 0]
    assert (counts[1:7] - 300).abs().max() < 60, "four standard deviations"


def test_anchors_are_drawn_by_seed_epoch_and_id() -> None:
    def draws(ids: list[str], seed: int = 1, epoch: int = 0) -> list[list[int]]:
        return [torch.randperm(50, generator=each).tolist() for each in anchor_generators(ids, seed, epoch)]

    both = draws(["a", "b"])
    assert draws(["b", "c", "a"])[::2] == both[::-1]
    assert both[0] != both[1]
    assert draws(["a"], seed=2) != both[:1] and draws(["a"], epoch=1) != both[:1]
