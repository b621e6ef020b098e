"""Paired differences against the textbook."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from sglang_auf.stats.bootstrap import Difference, drawn_sums, paired_difference


def test_many_pairs_have_the_normal_interval() -> None:
    generator = np.random.default_rng(1)
    ours = generator.normal(2.0, 1.0, 400)  # spread widely between answers, and little inside a pair
    theirs = ours + generator.normal(0.1, 0.2, 400)
    found = paired_difference("answers", ours.tolist(), theirs.tolist())
    expected = stats.ttest_1samp(theirs - ours, 0).confidence_interval(0.95)
    assert found.mean == pytest.approx((theirs - ours).mean())
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.003)


def test_equal_pairs_have_no_spread_and_two_pairs_no_interval() -> None:
    assert paired_difference("a", [1.0, 2.0, 5.0], [1.5, 2.5, 5.5]) == Difference(0.5, 0.5, 0.5)
    assert paired_difference("a", [1.0, 2.0], [2.0, 2.0]) == Difference(0.5, None, None)


def test_the_draws_depend_on_the_name_and_the_number_of_rows_alone() -> None:
    rows = np.arange(10.0)[:, None]
    first, again = drawn_sums("a", rows), drawn_sums("a", rows + 5)
    assert first is not None and again is not None
    assert np.array_equal(first + 5 * 9, again), "nine of ten rows are drawn"
    assert not np.array_equal(first, drawn_sums("b", rows))
