"""The bootstrap behind every interval of a mean: how far it would move with other answers or prompts.

It draws n - 1 of n rows with replacement, which makes the variance of a mean unbiased: with n draws it is too small by
a factor (n-1)/n. With few rows the percentile bootstrap is too narrow; it has no Student-t tails.

The draws depend on a name and on the number of rows only. Two runs over the same rows are therefore resampled alike,
and their difference is a paired one. `scipy.stats.bootstrap` cannot pair and stratify at once.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LEVEL = 0.95
SEED = 42

Floats = NDArray[np.float64]


def drawn_sums(name: str, rows: Floats) -> Floats | None:
    """[RESAMPLES, figures]: sums over n - 1 rows drawn with replacement from rows [n, figures]; None where n < 3."""
    count = len(rows)
    if count < 3:
        return None
    generator = np.random.default_rng([SEED, zlib.crc32(name.encode())])
    times = generator.multinomial(count - 1, np.full(count, 1 / count), size=RESAMPLES)
    return times.astype(np.float64) @ rows


def bounds(resampled: Floats) -> tuple[float, float]:
    """The percentiles of a resampled figure that leave (1 - LEVEL) / 2 on either side."""
    low, high = np.percentile(resampled, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)


@dataclass(frozen=True, slots=True)
class Difference:
    """mean: of theirs minus ours. low, high: its interval; None with fewer than three pairs."""

    mean: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        interval = "" if self.low is None or self.high is None else f" [{self.low:+.4f}, {self.high:+.4f}]"
        return f"{self.mean:+.4f}{interval}"


def interval_of_mean(name: str, values: Sequence[float]) -> tuple[float, float] | None:
    """Of the mean of values, by draws that depend on `name` and their number; None with fewer than three."""
    drawn = drawn_sums(name, np.array(values, dtype=np.float64)[:, None])
    return None if drawn is None else bounds(drawn[:, 0] / (len(values) - 1))


def paired_difference(name: str, ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """How much larger the second value of each pair is, in the mean. Pairs are drawn together."""
    apart = np.array(theirs, dtype=np.float64) - np.array(ours, dtype=np.float64)
    return Difference(float(apart.mean()), *(interval_of_mean(name, list(apart)) or (None, None)))
