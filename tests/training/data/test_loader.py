"""Which conversations are trained on when, and with which anchors."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from sglang_auf.errors import DataError
from sglang_auf.training.data.conversations import Conversation
from sglang_auf.training.data.loader import Plan, anchor_generators
from tests.support.training_runs import tiny_recipe


def conversations(count: int) -> list[Conversation]:
    return [Conversation(f"row-{n}", [5] * (10 + n % 7), [True] * (10 + n % 7)) for n in range(count)]


def plan(count: int = 40, **sections: Any) -> Plan:
    return Plan(conversations(count), tiny_recipe("t", "d", **sections))


def rows(planned: Plan, step: int) -> list[int]:
    return [row for some in planned.at(step)[1] for row in some]


def test_every_conversation_comes_once_an_epoch() -> None:
    planned = plan(schedule={"epochs": 3, "max_steps": None})
    seen: dict[int, Counter[int]] = {0: Counter(), 1: Counter(), 2: Counter()}
    for step in range(planned.steps):
        epoch, batches = planned.at(step)
        assert len(batches) == 4
        seen[epoch].update(rows(planned, step))
    assert all(counts == Counter(range(40)) for counts in seen.values())
    assert [planned.at(step)[0] for step in range(planned.steps)] == sorted(
        planned.at(step)[0] for step in range(planned.steps)
    )


def test_max_steps_takes_as_many_epochs_as_it_needs() -> None:
    long, short = plan(schedule={"max_steps": 50}), plan(schedule={"max_steps": 1})
    assert (long.steps, short.steps) == (50, 1)
    assert long.at(49)[0] > 0 and rows(long, 0) == rows(short, 0)


def test_the_plan_is_the_seeds() -> None:
    first, again, other = plan(), plan(), plan(seed=7)
    assert [first.at(step) for step in range(6)] == [again.at(step) for step in range(6)]
    assert [first.at(step) for step in range(6)] != [other.at(step) for step in range(6)]


def test_too_few_conversations_for_a_step() -> None:
    with pytest.raises(DataError, match="3 rows"):
        plan(3)


def test_anchors_are_drawn_by_seed_epoch_and_id() -> None:
    def draws(ids: list[str], seed: int = 1, epoch: int = 0) -> list[list[int]]:
        return [torch.randperm(50, generator=each).tolist() for each in anchor_generators(ids, seed, epoch)]

    both = draws(["a", "b"])
    assert draws(["b", "c", "a"])[::2] == both[::-1]
    assert both[0] != both[1]
    assert draws(["a"], seed=2) != both[:1] and draws(["a"], epoch=1) != both[:1]
