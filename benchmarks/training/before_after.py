"""Tau and speed on one kind of prompt, with the drafter that was served and with the one that took its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from benchmarks.harness.records import Record
from benchmarks.harness.results import StrictModel
from benchmarks.reports.numbers import UNKNOWN, interval_text, with_interval
from benchmarks.stats.intervals import Interval, paired_difference, speed_interval, speed_ratio_interval
from benchmarks.stats.summary import macro, ratio, summarize_tasks, throughput

HEADING = ["kind", "prompts", "tau before", "tau after", "difference", "tokens/s before", "tokens/s after", "ratio"]


class Figures(StrictModel):
    """Of one drafter on one kind. tau: macro. tokens_per_s: at concurrency 1. Intervals: 95 %, over prompts."""

    tau: float | None
    tau_interval: Interval | None
    tokens_per_s: float | None
    tokens_per_s_interval: Interval | None


class BeforeAfter(StrictModel):
    """One kind of prompt. after, gain (of tau) and speedup: None without a new drafter, else on the same prompts.

    Intervals of the last two: both answers to a prompt are drawn together.
    """

    name: str
    prompts: int
    before: Figures
    after: Figures | None = None
    gain: float | None = None
    gain_interval: Interval | None = None
    speedup: float | None = None
    speedup_interval: Interval | None = None

    @classmethod
    def of(cls, name: str, before: Sequence[Record], after: Sequence[Record]) -> Self:
        """after: empty without a new drafter."""
        kind = cls(name=name, prompts=len(before), before=_figures(name, before))
        if not after:
            return kind
        kind.after = _figures(name, after)
        kind.gain, kind.gain_interval = paired_difference([(after, before)]).get("macro", (None, None))
        kind.speedup = ratio(kind.after.tokens_per_s, kind.before.tokens_per_s)
        kind.speedup_interval = speed_ratio_interval(name, after, before)
        return kind

    def row(self) -> list[str]:
        after = self.after
        return [
            self.name,
            str(self.prompts),
            with_interval(self.before.tau, self.before.tau_interval),
            UNKNOWN if after is None else with_interval(after.tau, after.tau_interval),
            UNKNOWN
            if self.gain is None
            else f"{self.gain:+.2f} {interval_text(self.gain_interval, of_difference=True)}",
            with_interval(self.before.tokens_per_s, self.before.tokens_per_s_interval),
            UNKNOWN if after is None else with_interval(after.tokens_per_s, after.tokens_per_s_interval),
            with_interval(self.speedup, self.speedup_interval),
        ]


def _figures(name: str, records: Sequence[Record]) -> Figures:
    tau = macro(summarize_tasks(records).values(), records)
    return Figures(
        tau=tau.tau,
        tau_interval=tau.tau_interval,
        tokens_per_s=throughput(records, 1).tokens_per_s,
        tokens_per_s_interval=speed_interval(name, records),
    )
