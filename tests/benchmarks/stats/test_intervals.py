"""Intervals against the textbook, and against what a resample may and may not do."""

from __future__ import annotations

import math
import random
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
from scipy import stats

from benchmarks.harness.records import Record
from benchmarks.stats.intervals import (
    Interval,
    macro_tau_interval,
    mean_tau,
    paired_difference,
    speed_interval,
    speed_ratio_interval,
    t_interval,
    task_alpha_intervals,
    task_tau_interval,
)
from benchmarks.stats.summary import summarize_task


def record(prompt: str, histogram: list[int], task: str = "gsm8k", turn: int = 0, **fields: Any) -> Record:
    """One answer without a cut: its tokens are prefill's and the steps'."""
    tokens = 1 + sum(histogram) + sum(a * n for a, n in enumerate(histogram))
    return Record(
        task=task,
        prompt_id=prompt,
        turn=turn,
        temperature=0.0,
        accepted_histogram=histogram,
        completion_tokens=fields.pop("tokens", tokens),
        started_at=0.0,
        latency_s=1.0,
        **fields,
    )


def answers(count: int, seed: int, task: str = "gsm8k", lift: float = 0.0) -> list[Record]:
    """Answers of 20 steps with an acceptance of their own each."""
    chance = random.Random(seed)
    found = []
    for i in range(count):
        likely = 0.2 + lift + 0.4 * chance.random()
        steps = [0, 0, 0, 0]
        for _ in range(20):
            accepted = 0
            while accepted < 3 and chance.random() < likely:
                accepted += 1
            steps[accepted] += 1
        found.append(record(f"p{i:03}", steps, task))
    return found


@pytest.mark.parametrize("values", [[1.0, 2.0, 3.0], [0.012, 0.034, -0.01, 0.02], [-5.0, 1e-3], [0.0] * 3])
def test_the_interval_of_a_few_values_is_students(values: list[float]) -> None:
    half = stats.t.ppf(0.975, len(values) - 1) * stdev(values) / len(values) ** 0.5
    found = t_interval(values)
    assert found is not None
    assert (found.low, found.high) == pytest.approx((fmean(values) - half, fmean(values) + half), abs=1e-9)


def test_the_interval_of_one_two_three() -> None:
    """Mean 2, standard error 1 / sqrt 3, quantile 4.3027 at two degrees of freedom; one value has no interval."""
    found = t_interval([1.0, 2.0, 3.0])
    assert found is not None
    assert found.high - 2 == pytest.approx(4.3027 / 3**0.5, abs=1e-3)
    assert t_interval([1.0]) is None


def test_an_interval_of_many_prompts_is_the_normal_one() -> None:
    records = answers(150, seed=1)
    taus = np.array([r.acceptance.tau for r in records], dtype=float)
    half = 1.96 * taus.std(ddof=1) / math.sqrt(len(taus))
    found = task_tau_interval("gsm8k", records)
    assert found is not None
    assert found.low == pytest.approx(taus.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(taus.mean() + half, abs=0.1 * half)


def test_turns_of_a_conversation_are_drawn_together() -> None:
    """Two equal turns tell no more than one: the interval is that of the conversations."""
    once = answers(40, seed=2)
    twice = [*once, *(r.model_copy(update={"turn": 1}) for r in once)]
    assert task_tau_interval("gsm8k", twice) == task_tau_interval("gsm8k", once)


def test_an_interval_depends_on_the_prompts_alone_not_on_their_order() -> None:
    records = answers(30, seed=3)
    assert task_tau_interval("gsm8k", records[::-1]) == task_tau_interval("gsm8k", records)


def test_equal_answers_have_an_interval_of_no_width_and_one_answer_has_none() -> None:
    equal = [record(f"p{i}", [2, 2]) for i in range(5)]
    assert task_tau_interval("gsm8k", equal) == Interval(low=1.5, high=1.5)
    assert task_tau_interval("gsm8k", equal[:2]) is None
    assert task_tau_interval("gsm8k", []) is None


def test_failures_and_answers_without_a_step_are_not_drawn() -> None:
    records = answers(20, seed=4)
    more = [*records, record("x", [9, 0], error="500"), record("y", [0, 0], tokens=1)]
    assert task_tau_interval("gsm8k", more) == task_tau_interval("gsm8k", records)


def test_the_macro_interval_weighs_tasks_equally() -> None:
    wide, narrow = answers(5, seed=5, task="mbpp"), [record(f"n{i}", [3, 3]) for i in range(200)]
    of_wide, macro = task_tau_interval("mbpp", wide), macro_tau_interval([*wide, *narrow])
    assert of_wide is not None and macro is not None
    assert macro.low == pytest.approx((of_wide.low + 1.5) / 2)
    assert macro.high == pytest.approx((of_wide.high + 1.5) / 2)


def test_a_task_without_an_interval_leaves_the_macro_mean_without_one() -> None:
    assert macro_tau_interval([*answers(5, seed=6), record("m", [1, 1], task="mbpp")]) is None
    assert macro_tau_interval([]) is None


def test_alpha_intervals_hold_the_summarys_alpha() -> None:
    records = answers(60, seed=7)
    alpha = summarize_task(records).alpha
    intervals = task_alpha_intervals("gsm8k", records)
    assert len(intervals) == len(alpha) == 3
    for value, interval in zip(alpha, intervals, strict=True):
        assert interval is not None and value is not None
        assert interval.low < value < interval.high


def test_a_position_that_no_step_reached_has_no_interval() -> None:
    intervals = task_alpha_intervals("gsm8k", [record(f"p{i}", [4, 0, 0]) for i in range(4)])
    assert intervals == [Interval(low=0.0, high=0.0), None]


def test_the_mean_of_runs_has_the_interval_of_one_run_with_its_means() -> None:
    """Runs are of the same prompts, which are drawn together: the interval does not shrink with more runs."""
    run = [*answers(12, seed=1), record("m", [1, 1], task="mbpp")]
    one, many = mean_tau([run]), mean_tau([run, run])
    assert one == many
    assert one["gsm8k"] == (summarize_task(run[:12]).tau, task_tau_interval("gsm8k", run[:12]))
    assert one["mbpp"] == (1.5, None)
    found, _ = mean_tau([answers(12, seed=1), answers(12, seed=2)])["gsm8k"]
    assert found == pytest.approx(fmean(summarize_task(answers(12, seed=seed)).tau for seed in (1, 2)))  # type: ignore[misc]
    assert "mbpp" not in mean_tau([run, run[:12]])


def test_a_difference_is_paired_by_prompt() -> None:
    """The same prompts, each better by the same amount: no doubt is left, however much the prompts differ."""
    theirs = [record(f"p{i}", [10, i, 0, 0]) for i in range(12)]
    ours = [record(f"p{i}", [0, 10, i, 0]) for i in range(12)]  # one more of each step
    difference, interval = paired_difference([(ours, theirs)])["gsm8k"]
    assert difference == pytest.approx(1.0)
    assert interval is not None
    assert interval.high - interval.low < 1e-9
    alone = task_tau_interval("gsm8k", theirs)
    assert alone is not None and alone.high - alone.low > 0.1


def test_a_difference_is_taken_over_shared_prompts_and_all_tasks() -> None:
    ours = [*answers(30, seed=8, lift=0.2), *answers(30, seed=9, task="mbpp", lift=0.2), record("only", [1, 9])]
    theirs = [*answers(30, seed=8), *answers(30, seed=9, task="mbpp"), *answers(3, seed=1, task="alpaca")]
    found = paired_difference([(ours, theirs)])
    assert list(found) == ["gsm8k", "mbpp", "macro"]
    assert found["macro"][0] == pytest.approx((found["gsm8k"][0] + found["mbpp"][0]) / 2)
    interval = found["macro"][1]
    assert interval is not None and 0 < interval.low < found["macro"][0] < interval.high
    assert paired_difference([(ours, [])]) == {}


def test_differences_of_several_pairs_are_meaned() -> None:
    base = answers(20, seed=10)
    pairs = [(answers(20, seed=11, lift=0.1), base), (answers(20, seed=12, lift=0.3), base)]
    single = [paired_difference([pair])["gsm8k"] for pair in pairs]
    mean, interval = paired_difference(pairs)["gsm8k"]
    assert mean == pytest.approx((single[0][0] + single[1][0]) / 2)
    assert interval is not None and interval.low < mean < interval.high


def timed(latencies: list[float], tokens: int = 30) -> list[Record]:
    return [
        record(f"p{number}", [1], tokens=tokens + number).model_copy(update={"latency_s": latency})
        for number, latency in enumerate(latencies)
    ]


def test_the_interval_of_a_speed_holds_the_ratio_of_sums() -> None:
    latencies = [0.5 + 0.1 * (number % 7) for number in range(40)]
    found = timed(latencies)
    interval = speed_interval("kind", found)
    assert interval is not None
    speed = sum(one.completion_tokens for one in found) / sum(latencies)
    assert interval.low < speed < interval.high
    assert interval.high - interval.low < 0.5 * speed
    assert speed_interval("kind", found[:2]) is None
    assert speed_interval("kind", []) is None


def test_a_ratio_of_speeds_is_a_paired_one() -> None:
    """Every answer takes twice as long, so that no draw has another ratio than 2, though answers differ."""
    latencies = [0.5 + 0.3 * (number % 5) for number in range(20)]
    quick, slow = timed(latencies), timed([2 * latency for latency in latencies])
    interval = speed_ratio_interval("kind", quick, slow)
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx((2, 2))
    slow[3] = slow[3].model_copy(update={"error": "failed", "latency_s": 1000.0})
    interval = speed_ratio_interval("kind", quick, slow)
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx((2, 2)), "a request that one of them failed is left out"
