from __future__ import annotations

from benchmarks.reports.numbers import interval_text, number
from benchmarks.stats.intervals import Interval


def test_a_number_has_its_decimals_and_an_unknown_one_a_dash() -> None:
    assert [number(2.0), number(1234.56, 1), number(0.0, 0), number(None)] == ["2.00", "1234.6", "0", "-"]


def test_an_interval_of_a_difference_has_signs() -> None:
    interval = Interval(low=-0.051, high=1.25)
    assert interval_text(interval) == "-0.05..1.25"
    assert interval_text(interval, digits=3) == "-0.051..1.250"
    assert interval_text(interval, digits=3, of_difference=True) == "[-0.051, +1.250]"
    assert interval_text(None) == interval_text(None, of_difference=True) == "-"
