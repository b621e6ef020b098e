"""Sections of a report: tau and alpha by length of the prompt, and by position in the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.harness.records import Record
from benchmarks.reports import figures
from benchmarks.reports.numbers import number, with_interval
from benchmarks.reports.page import Section, Table
from benchmarks.stats.positions import FIRST, Bucket, by_position, by_prompt_length, without_steps

SHOWN = 4
"""alpha_1 to alpha_4 are in the tables."""

LENGTH_TEXT = (
    "Answers by tokens of their prompts, with the chat template and all turns before; mean over the answers of a "
    "bucket. Tasks have prompts of different lengths, so the tasks in a bucket differ too. Intervals: 95 %, bootstrap "
    "over prompts."
)
POSITION_TEXT = (
    "Verify steps by the position at which their first token stands in the answer. tau: tokens that the steps of an "
    "answer in a bucket emitted / these steps, mean over answers; micro: ratio of sums. Only long answers reach far "
    f"positions: tau at 1-{FIRST} is that of the same answers in their first {FIRST} tokens, so that the two compare. "
    "Intervals: 95 %, bootstrap over prompts."
)
NO_STEPS_TEXT = "Not known: no run recorded its steps. `run --record-steps` does (AUF servers, streamed chat answers)."


def position_sections(runs: Mapping[str, Sequence[Record]]) -> list[Section]:
    """runs: name -> records, of speculating runs."""
    lengths = {name: by_prompt_length(records) for name, records in runs.items()}
    positions = {name: buckets for name, records in runs.items() if (buckets := by_position(records))}
    sections = [_section("Tau by prompt length", LENGTH_TEXT, lengths, "tokens of the prompt", "prompt-length.png")]
    title = "Tau by position in the answer"
    if not positions:
        return [*sections, Section(title, NO_STEPS_TEXT)]
    unknown = {name: without_steps(records) for name, records in runs.items()}
    notes = [f"{name}: {count} answers without known steps are left out." for name, count in unknown.items() if count]
    text = "\n".join([POSITION_TEXT, *notes])
    return [*sections, _section(title, text, positions, "position in the answer", "position.png")]


def _section(title: str, text: str, runs: Mapping[str, Sequence[Bucket]], what: str, picture_name: str) -> Section:
    picture = figures.png(figures.by_bucket(runs, what))
    return Section(title, text, bucket_table(runs, what), picture, picture_name)


def bucket_table(runs: Mapping[str, Sequence[Bucket]], what: str) -> Table:
    """A row for each run and bucket. at_start has a column where a bucket knows it."""
    started = any(bucket.at_start is not None for buckets in runs.values() for bucket in buckets)
    longest = max((len(bucket.summary.alpha) for buckets in runs.values() for bucket in buckets), default=0)
    shown = min(longest, SHOWN)
    rows = [["run", what, "answers", "steps", "tau", *([f"tau at 1-{FIRST}"] if started else []), "micro"]]
    rows[0] += [f"alpha_{k}" for k in range(1, shown + 1)]
    for name, buckets in runs.items():
        for bucket in buckets:
            of = bucket.summary
            cells = [name, bucket.name, str(of.requests), str(of.verify_steps)]
            cells += [with_interval(of.tau, of.tau_interval), *([number(bucket.at_start)] if started else [])]
            cells.append(number(of.tau_micro))
            intervals = [*of.alpha_intervals, *[None] * len(of.alpha)]
            cells += [with_interval(*pair) for pair in zip(of.alpha[:shown], intervals, strict=False)]
            rows.append([*cells, *["-"] * (len(rows[0]) - len(cells))])
    return rows
