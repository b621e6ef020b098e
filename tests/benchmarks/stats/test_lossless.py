from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.harness.records import Key, Record
from benchmarks.stats.lossless import Candidates, Fork, Losslessness, compare, first_fork, near_tie_bar
from sglang_auf.errors import DataError

BAR = near_tie_bar(24.0)


def record(prompt_id: str, ids: list[int] | None, turn: int = 0, **fields: Any) -> Record:
    given_fields = {
        "task": "t",
        "prompt_id": prompt_id,
        "turn": turn,
        "temperature": 0.0,
        "started_at": 0.0,
        "latency_s": 1.0,
        "prompt_ids": [9],
        "output_ids": ids,
    }
    return Record.model_validate({**given_fields, **fields})


def keyed(*records: Record) -> dict[Key, Record]:
    return {one.key: one for one in records}


def never(plain: Record, fork: Fork) -> Candidates:
    raise AssertionError(f"asked about {fork}")


def says(gap: float) -> Any:
    return lambda plain, fork: Candidates(speculating=-1.0 - gap, plain=-1.0, best=-1.0)


def judged(gap: float, exact: bool = False) -> Losslessness:
    return compare(keyed(record("a", [1, 2])), keyed(record("a", [1, 3])), says(gap), BAR, exact)


@pytest.mark.parametrize(("scale", "bar"), [(16.0, 0.25), (22.0, 0.25), (31.9, 0.25), (32.0, 0.5), (10.0, 0.125)])
def test_the_bar_is_two_bf16_steps(scale: float, bar: float) -> None:
    assert near_tie_bar(scale) == bar


def test_the_bf16_step_is_torchs() -> None:
    torch = pytest.importorskip("torch")
    for scale in (5.0, 22.0, 40.0):
        here = torch.tensor(scale, dtype=torch.bfloat16)
        step = float(torch.nextafter(here, torch.tensor(1e4, dtype=torch.bfloat16)) - here)
        assert near_tie_bar(scale) == 2 * step


@pytest.mark.parametrize(
    ("ours", "plain", "fork"),
    [
        ([1, 2], [1, 2], None),
        ([], [], None),
        ([1, 2, 3], [1, 5, 3], Fork(1, 2, 5)),
        ([1, 2], [1, 2, 3], Fork(2, None, 3)),
        ([1, 2, 3], [1, 2], Fork(2, 3, None)),
    ],
)
def test_the_first_difference(ours: list[int], plain: list[int], fork: Fork | None) -> None:
    assert first_fork(ours, plain) == fork


@given(st.lists(st.integers(0, 3)), st.lists(st.integers(0, 3)))
def test_a_fork_ends_the_common_prefix(ours: list[int], plain: list[int]) -> None:
    fork = first_fork(ours, plain)
    if fork is None:
        assert ours == plain
    else:
        assert ours[: fork.position] == plain[: fork.position]
        assert ours[fork.position : fork.position + 1] != plain[fork.position : fork.position + 1]


def test_equal_tokens_are_identical_and_nobody_is_asked() -> None:
    result = compare(keyed(record("a", [1, 2])), keyed(record("a", [1, 2])), never, BAR, exact=True)
    assert (result.identical, result.near_tie, result.fault, result.passed) == (1, 0, 0, True)


@pytest.mark.parametrize(("gap", "near_tie", "fault"), [(0.0, 1, 0), (0.25, 1, 0), (0.26, 0, 1), (float("nan"), 0, 1)])
def test_a_fork_within_rounding_is_a_near_tie(gap: float, near_tie: int, fault: int) -> None:
    result = judged(gap)
    assert (result.near_tie, result.fault, result.passed) == (near_tie, fault, not fault)


def test_two_equal_candidates_below_the_best_are_a_fault() -> None:
    result = compare(
        keyed(record("a", [1])), keyed(record("a", [2])), lambda plain, fork: Candidates(-3.0, -3.0, -1.0), BAR, False
    )
    assert result.fault == 1


def test_where_equality_is_promised_a_near_tie_fails() -> None:
    result = judged(0.0, exact=True)
    assert (result.near_tie, result.fault, result.passed) == (1, 0, False)


def test_an_answer_that_ends_early_is_a_fault() -> None:
    result = compare(keyed(record("a", [1])), keyed(record("a", [1, 2])), never, BAR, exact=False)
    assert result.fault == 1
    assert result.differences[0].gap is None


def test_later_turns_of_a_forked_conversation_are_not_held_against_it() -> None:
    ours = keyed(record("a", [1]), record("a", [7], turn=1, prompt_ids=[9, 1]), record("b", [4]))
    plain = keyed(record("a", [2]), record("a", [8], turn=1, prompt_ids=[9, 2]), record("b", [4]))
    result = compare(ours, plain, says(0.0), BAR, exact=False)
    assert (result.identical, result.near_tie, result.fault, result.follow_up) == (1, 1, 0, 1)


def test_requests_without_an_answer_in_both_runs_do_not_pass() -> None:
    ours = keyed(record("a", [1]), record("b", None, error="500"))
    plain = keyed(record("a", [1]), record("b", [1]), record("c", [1]))
    result = compare(ours, plain, never, BAR, exact=False)
    assert (result.identical, result.missing, result.passed) == (1, 2, False)


def test_texts_are_no_proof() -> None:
    with pytest.raises(DataError, match="without token ids"):
        compare(keyed(record("a", None)), keyed(record("a", None)), never, BAR, exact=False)


def test_different_prompt_tokens_are_no_comparison() -> None:
    with pytest.raises(DataError, match="different prompt tokens"):
        compare(keyed(record("a", [1])), keyed(record("a", [1], prompt_ids=[8])), never, BAR, exact=False)


def test_the_same_tokens_that_end_for_another_reason_are_a_fault() -> None:
    ours, plain = record("a", [1, 2], finish_reason="length"), record("a", [1, 2], finish_reason="stop")
    result = compare(keyed(ours), keyed(plain), never, BAR, exact=False)
    assert (result.identical, result.fault, result.passed) == (0, 1, False)
    assert "finished by 'length' and not 'stop'" in result.text()
    assert compare(keyed(plain), keyed(plain), never, BAR, exact=True).passed


def test_nothing_that_was_compared_does_not_pass() -> None:
    assert not compare({}, {}, never, BAR, exact=True).passed


def test_it_is_said_how_many_tokens_were_compared() -> None:
    """Up to the first difference, itself included; neither what follows it nor later turns nor failed answers."""
    ours = [record("a", [1, 2, 3]), record("b", [1, 7, 8, 9]), record("b", [5], 1), record("c", [1, 2, 3])]
    plain = [record("a", [1, 2, 3]), record("b", [1, 5, 5, 5]), record("b", [6, 6], 1), record("c", [1, 2])]
    failed = record("d", [1, 2, 3], error="down")
    result = compare(keyed(*ours, failed), keyed(*plain, record("d", [1])), says(0.0), BAR, False)
    assert (result.compared_tokens, result.tokens) == (3 + 2 + 0 + 2, 3 + 4 + 2 + 2)
    assert "7 of 11 tokens compared" in result.text()
