"""tau and alpha_k by length of the prompt and by position in the answer: does acceptance decay?

A bucket is read as a task is: mean over its answers, with an interval by bootstrap over prompts (intervals.py). By
prompt length an answer is in one bucket. By position it is cut into parts: a step belongs to the bucket in which the
first token that it emits stands, and tau of a part is its emitted tokens over its steps. Position 1 is the token of
prefill, which belongs to no step.

Long answers are other answers than short ones, so that a bucket may differ from the first one because of who is still
in it. `at_start` shows that: tau of the same answers' parts in the first bucket.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.harness.records import Key, Record
from benchmarks.stats.summary import TaskSummary, summarize_task
from sglang_auf.acceptance import macro_tau

FIRST = 64
"""Tokens of the first bucket; each further one ends at twice the end of the one before."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Tokens or positions low..high. summary: its requests are answers, or parts of answers.

    at_start: by position, tau of the parts of the same answers in the first bucket; None by prompt length.
    """

    low: int
    high: int
    summary: TaskSummary
    at_start: float | None = None

    @property
    def name(self) -> str:
        return f"{self.low}-{self.high}"


def by_prompt_length(records: Iterable[Record]) -> list[Bucket]:
    """The answers with a verify step, by tokens of their prompts."""
    found: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        if record.acceptance.verify_steps:
            found[_end_of_bucket(record.prompt_tokens)].append(record)
    return [_bucket(high, found[high]) for high in sorted(found)]


def by_position(records: Iterable[Record]) -> list[Bucket]:
    """The parts of the answers whose steps are known (`Record.accepted_by_step`), by position in the answer."""
    found: dict[int, dict[Key, Record]] = defaultdict(dict)
    for record in records:
        if not record.failed:
            for high, part in parts_of(record).items():
                found[high][record.key] = part
    buckets = []
    for high in sorted(found):
        starts = [found[FIRST][key].acceptance for key in found[high] if key in found.get(FIRST, {})]
        buckets.append(_bucket(high, list(found[high].values()), macro_tau(starts)))
    return buckets


def parts_of(record: Record) -> dict[int, Record]:
    """End of a bucket -> the answer's part in it, as an answer of its own: one token more than its steps emitted.

    {} where the steps are not known.
    """
    histograms: dict[int, list[int]] = {}
    emitted: dict[int, int] = defaultdict(int)
    position = 2
    for accepted in record.accepted_by_step or ():
        high = _end_of_bucket(position)
        tokens = min(accepted + 1, record.completion_tokens + 1 - position)  # a stop may have cut the last step
        histograms.setdefault(high, [0] * len(record.accepted_histogram))[accepted] += 1
        emitted[high] += tokens
        position += tokens
    return {
        high: record.model_copy(
            update={
                "accepted_histogram": histogram,
                "verify_steps": sum(histogram),
                "completion_tokens": emitted[high] + 1,
                "proposed": None,
            }
        )
        for high, histogram in histograms.items()
    }


def without_steps(records: Iterable[Record]) -> int:
    """Answers with verify steps that are not known one by one."""
    return sum(record.acceptance.verify_steps > 0 and record.accepted_by_step is None for record in records)


def _bucket(high: int, records: Sequence[Record], at_start: float | None = None) -> Bucket:
    low = 1 if high == FIRST else high // 2 + 1
    # Its records are drawn as those of one task; prompts of two tasks may have one id.
    alike = [
        record.model_copy(update={"task": str(high), "prompt_id": f"{record.task}/{record.prompt_id}"})
        for record in records
    ]
    return Bucket(low, high, summarize_task(alike), at_start)


def _end_of_bucket(count: int) -> int:
    high = FIRST
    while high < count:
        high *= 2
    return high
