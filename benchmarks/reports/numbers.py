"""Numbers and intervals as reports, tables and the terminal print them."""

from __future__ import annotations

from benchmarks.stats.intervals import Interval

UNKNOWN = "-"


def number(value: float | None, digits: int = 2) -> str:
    """`value` with that many decimals, "-" where it is unknown."""
    return UNKNOWN if value is None else f"{value:.{digits}f}"


def with_interval(value: float | None, interval: Interval | None) -> str:
    """ "2.00 (1.90..2.10)"; the value alone where it has no interval."""
    return number(value) + (f" ({interval_text(interval)})" if interval else "")


def interval_text(interval: Interval | None, digits: int = 2, of_difference: bool = False) -> str:
    """ "1.90..2.10", or "[-0.10, +0.10]" where the interval is of a difference; "-" where it is unknown."""
    if interval is None:
        return UNKNOWN
    if of_difference:
        return f"[{interval.low:+.{digits}f}, {interval.high:+.{digits}f}]"
    return f"{interval.low:.{digits}f}..{interval.high:.{digits}f}"


def percent(share: float | None) -> str:
    """ "41 %"; "-" where it is unknown."""
    return UNKNOWN if share is None else f"{share:.0%}".replace("%", " %")
