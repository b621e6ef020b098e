"""95 % intervals: of tau and alpha_k by bootstrap over prompts, and of the mean of a few seeds by Student's t.

The bootstrap (sglang_auf/stats/bootstrap.py) shows how far a figure would move with other prompts. It does not cover
other training seeds or machines. It draws conversations with replacement inside each task, so every task keeps its
weight, and both turns of an MT-Bench prompt are drawn together. The draws of a task depend on its name and its number
of conversations only, so that the difference of two runs of the same prompts is a paired one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from pydantic import ConfigDict

from benchmarks.harness.records import Record
from benchmarks.harness.results import StrictModel
from sglang_auf.acceptance import reached_at_least
from sglang_auf.stats.bootstrap import LEVEL, Floats, bounds, drawn_sums

Conversations = dict[str, Floats]
"""prompt id -> sums over its requests: [requests, tau, survival 0, survival 1, ...]"""


class Interval(StrictModel):
    """low, high: bounds of an interval that leaves (1 - LEVEL) / 2 on either side."""

    model_config = ConfigDict(frozen=True)

    low: float
    high: float

    @classmethod
    def of(cls, resampled: Floats) -> Interval:
        """The percentiles of a resampled figure."""
        low, high = bounds(resampled)
        return cls(low=low, high=high)


def t_interval(values: Sequence[float]) -> Interval | None:
    """Student's t interval of the mean of a few values; None with fewer than two."""
    if len(values) < 2:
        return None
    from scipy import stats

    low, high = stats.ttest_1samp(values, 0).confidence_interval(LEVEL)
    return Interval(low=float(low), high=float(high))


def task_tau_interval(task: str, records: Iterable[Record]) -> Interval | None:
    """The interval of one task's macro tau; None with fewer than three conversations that have a tau."""
    resampled = _resampled_tau(task, _conversations(records))
    return None if resampled is None else Interval.of(resampled)


def task_alpha_intervals(task: str, records: Iterable[Record]) -> list[Interval | None]:
    """The intervals of one task's alpha_1, alpha_2, ...; None where alpha_k is undefined in some resample."""
    conversations = _conversations(records)
    drawn = _drawn_sums(task, conversations)
    if drawn is None:
        return []
    survival = drawn[:, 2:]
    known = [bool((survival[:, k - 1] > 0).all()) for k in range(1, survival.shape[1])]
    return [
        Interval.of(survival[:, k] / survival[:, k - 1]) if known[k - 1] else None for k in range(1, survival.shape[1])
    ]


def macro_tau_interval(records: Iterable[Record]) -> Interval | None:
    """The interval of tau's mean over tasks; None where a task has no interval."""
    means = [_resampled_tau(task, _conversations(of_task)) for task, of_task in by_task(records).items()]
    known = [mean for mean in means if mean is not None]
    return Interval.of(np.mean(known, axis=0)) if known and len(known) == len(means) else None


def mean_tau(runs: Sequence[Sequence[Record]]) -> dict[str, tuple[float, Interval | None]]:
    """tau averaged over runs of the same prompts: task -> (mean, interval). Tasks that a run lacks are left out."""
    found: dict[str, list[tuple[float, Floats | None]]] = defaultdict(list)
    for run in runs:
        for task, records in by_task(run).items():
            if conversations := _conversations(records):
                found[task].append((_tau(conversations), _resampled_tau(task, conversations)))
    return {task: _with_interval(*_mean(each)) for task, each in found.items() if len(each) == len(runs)}


def paired_difference(
    pairs: Sequence[tuple[Sequence[Record], Sequence[Record]]],
) -> dict[str, tuple[float, Interval | None]]:
    """tau of the first minus tau of the second run of each pair, averaged over pairs: task -> (difference, interval).

    The key "macro" holds the mean over tasks. Each pair is compared on the conversations that have a tau in both, and
    tasks that a pair lacks are left out.
    """
    found: dict[str, list[tuple[float, Floats | None]]] = defaultdict(list)
    for ours, theirs in pairs:
        left, right = by_task(ours), by_task(theirs)
        for task in (name for name in left if name in right):
            mine, its = _conversations(left[task]), _conversations(right[task])
            shared = [prompt for prompt in mine if prompt in its]
            if shared:
                mine, its = ({prompt: each[prompt] for prompt in shared} for each in (mine, its))
                resampled = [_resampled_tau(task, each) for each in (mine, its)]
                spread = None if resampled[0] is None or resampled[1] is None else resampled[0] - resampled[1]
                found[task].append((_tau(mine) - _tau(its), spread))
    means = {task: _mean(each) for task, each in found.items() if len(each) == len(pairs)}
    if means:
        means["macro"] = _mean(list(means.values()))
    return {task: _with_interval(*mean) for task, mean in means.items()}


def speed_interval(name: str, records: Iterable[Record]) -> Interval | None:
    """The interval of tokens/s of requests that were asked one at a time: tokens over latencies, by prompt.

    None with fewer than three answers. It covers other prompts, not another hour of the machine.
    """
    resampled = _resampled_speed(name, records)
    return None if resampled is None else Interval.of(resampled)


def speed_ratio_interval(name: str, ours: Sequence[Record], theirs: Sequence[Record]) -> Interval | None:
    """The interval of the ratio of two such speeds, on the requests that both answered, drawn together."""
    answered = [{record.key for record in records if not record.failed} for records in (ours, theirs)]
    shared = answered[0] & answered[1]
    mine, its = (
        _resampled_speed(name, [record for record in records if record.key in shared]) for records in (ours, theirs)
    )
    return None if mine is None or its is None else Interval.of(mine / its)


def _resampled_speed(name: str, records: Iterable[Record]) -> Floats | None:
    rows = [
        [float(record.completion_tokens), record.latency_s]
        for record in sorted(records, key=lambda record: record.key)
        if not record.failed
    ]
    drawn = drawn_sums(name, np.array(rows)) if rows else None
    return None if drawn is None else drawn[:, 0] / drawn[:, 1]


def _with_interval(mean: float, spread: Floats | None) -> tuple[float, Interval | None]:
    return mean, None if spread is None else Interval.of(spread)


def _mean(parts: Sequence[tuple[float, Floats | None]]) -> tuple[float, Floats | None]:
    spreads = [spread for _, spread in parts if spread is not None]
    spread = np.mean(spreads, axis=0) if len(spreads) == len(parts) else None
    return float(np.mean([mean for mean, _ in parts])), spread


def by_task(records: Iterable[Record]) -> dict[str, list[Record]]:
    tasks: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        tasks[record.task].append(record)
    return dict(tasks)


def _conversations(records: Iterable[Record]) -> Conversations:
    """The requests that have a tau, by prompt id, sorted."""
    rows: dict[str, list[Floats]] = defaultdict(list)
    for record in records:
        counts = record.acceptance
        if counts.tau is not None:
            survival = np.array(reached_at_least(counts.histogram)) / counts.verify_steps
            rows[record.prompt_id].append(np.concatenate([[1.0, counts.tau], survival]))
    return {prompt: np.sum(rows[prompt], axis=0) for prompt in sorted(rows)}


def _tau(conversations: Mapping[str, Floats]) -> float:
    requests, taus = np.sum(list(conversations.values()), axis=0)[:2]
    return float(taus / requests)


def _resampled_tau(task: str, conversations: Conversations) -> Floats | None:
    drawn = _drawn_sums(task, conversations)
    return None if drawn is None else drawn[:, 1] / drawn[:, 0]


def _drawn_sums(task: str, conversations: Conversations) -> Floats | None:
    """[RESAMPLES, figures]: sums over conversations drawn with replacement; None with fewer than three."""
    return drawn_sums(task, np.stack(list(conversations.values()))) if conversations else None
