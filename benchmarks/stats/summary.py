"""From records to figures. tau and alpha are computed by sglang_auf.acceptance; this file groups and adds throughput.

macro: prompts weigh equally inside a task, and tasks equally (the paper's average; each MT-Bench turn is a prompt).
micro: ratio of sums. Failed requests and requests without a verify step have no tau; they are counted separately and
never averaged in.

tokens_per_s: completion tokens of the answered requests / seconds during which at least one recorded request was in
flight, at the run's concurrency. In one uninterrupted closed loop these seconds are the wall time of the recorded
phase. They leave out warm-up, server start and the pause between two sessions of a resumed run. An open loop has times
without a request too, which a faster server has more of: its seconds are those from when the first request was due to
the end of the last one, in each session.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime
from statistics import fmean

import numpy as np
from pydantic import Field

from benchmarks.harness.manifest import RunManifest, Session
from benchmarks.harness.records import Record
from benchmarks.harness.results import StrictModel
from benchmarks.harness.sources.prompt import NO_GROUP
from benchmarks.stats.intervals import Interval, by_task, macro_tau_interval, task_alpha_intervals, task_tau_interval
from sglang_auf.acceptance import Acceptance, macro_alpha, macro_tau, total_acceptance

UNDRAFTED = 0.02
"""Share of tokens that no counted step gave, from which on a run says so."""
SHOWN_GROUPS = 30
"""Groups of one task that have figures of their own."""


class TaskSummary(StrictModel):
    """One task. prompts: conversations; requests: turns; without_steps: answered requests without tau.

    tau, tau_verify and alpha are macro. Intervals: 95 %, over prompts (intervals.py); None where prompts are too few.
    cached_share: of the prompts' tokens, what the prefix cache had; None where the server does not say it.
    """

    prompts: int
    requests: int
    failed: int
    without_steps: int
    tau: float | None
    tau_interval: Interval | None = None
    tau_micro: float | None
    tau_verify: float | None
    alpha: list[float | None]
    alpha_intervals: list[Interval | None] = Field(default_factory=list)
    verify_steps: int
    accepted_histogram: list[int]
    completion_tokens: int
    cached_share: float | None = None


class MacroSummary(StrictModel):
    tau: float | None
    tau_interval: Interval | None = None
    tau_verify: float | None


class MicroSummary(StrictModel):
    tau: float | None
    tau_verify: float | None
    alpha: list[float | None]
    verify_steps: int
    accepted_histogram: list[int]


class Throughput(StrictModel):
    """cached_share: as that of a task, over all of them."""

    tokens_per_s: float | None
    completion_tokens: int
    seconds: float
    concurrency: int
    requests: int
    failed: int
    cached_share: float | None = None


class Percentiles(StrictModel):
    """Seconds, over answered requests."""

    p50: float
    p90: float
    p99: float


class Latency(StrictModel):
    """ttft: time to the first token, of streamed answers. itl: mean time between the tokens of one answer after its
    first, of streamed answers of two tokens or more. latency: time of a complete answer. waited: in an open loop, what
    a request waited for room among those in flight, which ttft and latency have in them. None without such answers.
    """

    ttft: Percentiles | None
    itl: Percentiles | None
    latency: Percentiles | None
    waited: Percentiles | None = None


class GroupedTask(StrictModel):
    """One task by group of its prompts. groups: those with the most prompts first; NO_GROUP: of rows without one.

    others: groups that are left out, of which there are too many. others_prompts: in them.
    """

    groups: dict[str, TaskSummary]
    others: int
    others_prompts: int


class RunSummary(StrictModel):
    """What summary.json of one run holds. drafter, block_size and every tau are None for a plain baseline.

    target: the model's name. sglang, vllm: the version of a server that is one. Of a server that is not SGLang, device
    and drafter are not known, and block_size is what its replies say. warnings: how the run's conditions differ from
    those that the drafter was trained for, and what is not known of its server. broken_rows: of the user's own files,
    those that were not asked. rate: requests a second of an open loop. groups: of the tasks whose prompts are in
    groups. without_group: of the user's own files, rows that are in none.
    """

    target: str
    drafter: str | None
    block_size: int | None
    device: str | None
    sglang: str | None
    vllm: str | None = None
    temperature: float
    max_tokens: int
    rate: float | None = None
    sessions: int
    warnings: list[str] = Field(default_factory=list)
    broken_rows: list[str] = Field(default_factory=list)
    tasks: dict[str, TaskSummary]
    groups: dict[str, GroupedTask] = Field(default_factory=dict)
    without_group: list[str] = Field(default_factory=list)
    macro: MacroSummary
    micro: MicroSummary
    throughput: Throughput
    latency: Latency


def summarize_run(manifest: RunManifest, records: Sequence[Record]) -> RunSummary:
    """The figures of a run. records: one per request. What run.json says (prompts, versions, machine) stays there."""
    tasks = summarize_tasks(records)
    said = (record.block_size for record in records if record.block_size)
    return RunSummary(
        target=manifest.server.model,
        drafter=manifest.server.drafter,
        block_size=manifest.server.block_size or next(said, None),
        device=manifest.server.device,
        sglang=manifest.server.sglang,
        vllm=manifest.server.vllm,
        temperature=manifest.config.temperature,
        max_tokens=manifest.config.max_tokens,
        rate=manifest.config.rate,
        sessions=len(manifest.sessions),
        warnings=[*manifest.warnings, *_undrafted(manifest, records)],
        broken_rows=manifest.broken_rows,
        tasks=tasks,
        groups=summarize_groups(records),
        without_group=manifest.without_group,
        macro=macro(tasks.values(), records),
        micro=micro(records),
        throughput=throughput(
            records,
            manifest.config.concurrency,
            None if manifest.config.rate is None else open_loop_seconds(records, manifest.sessions),
        ),
        latency=latency(records),
    )


def _undrafted(manifest: RunManifest, records: Iterable[Record]) -> list[str]:
    """A warning where a vLLM server took steps without a draft, which its replies do not count."""
    if manifest.server.vllm is None or manifest.config.plain:
        return []
    answered = [record for record in records if record.completion_tokens and not record.failed]
    tokens = sum(record.completion_tokens - 1 for record in answered)
    share = 1 - sum(record.acceptance.emitted for record in answered) / tokens if tokens else 0.0
    if share < UNDRAFTED:
        return []
    return [f"{share:.0%} of the tokens come from steps that drafted nothing: tau is that of the other steps"]


def summarize_task(records: Sequence[Record]) -> TaskSummary:
    """The figures of one task. records: one per request, all of that task."""
    name = records[0].task if records else ""
    answered = [record for record in records if not record.failed]
    counted = _counted(answered)
    sum_of = total_acceptance(counted)
    return TaskSummary(
        prompts=len({record.prompt_id for record in records}),
        requests=len(records),
        failed=len(records) - len(answered),
        without_steps=len(answered) - len(counted),
        tau=macro_tau(counted),
        tau_interval=task_tau_interval(name, records),
        tau_micro=sum_of.tau,
        tau_verify=_mean(request.tau_verify for request in counted),
        alpha=list(macro_alpha(counted)),
        alpha_intervals=task_alpha_intervals(name, records),
        verify_steps=sum_of.verify_steps,
        accepted_histogram=list(sum_of.histogram),
        completion_tokens=sum(record.completion_tokens for record in answered),
        cached_share=cached_share(answered),
    )


def summarize_tasks(records: Sequence[Record]) -> dict[str, TaskSummary]:
    names = dict.fromkeys(record.task for record in records)
    return {name: summarize_task([record for record in records if record.task == name]) for name in names}


def summarize_groups(records: Sequence[Record]) -> dict[str, GroupedTask]:
    """The figures of each group of each task that has any; {} where no prompt is in a group, and of plain decoding."""
    if not any(record.verify_steps for record in records):
        return {}
    tasks = by_task(records)
    return {name: _grouped(of_task) for name, of_task in tasks.items() if any(r.group is not None for r in of_task)}


def _grouped(records: Sequence[Record]) -> GroupedTask:
    """records: one per request, all of one task."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[record.group or NO_GROUP].append(record)
    prompts = {name: len({record.prompt_id for record in of_group}) for name, of_group in groups.items()}
    names = sorted(groups, key=lambda name: (-prompts[name], name))
    return GroupedTask(
        groups={name: summarize_task(groups[name]) for name in names[:SHOWN_GROUPS]},
        others=len(names[SHOWN_GROUPS:]),
        others_prompts=sum(prompts[name] for name in names[SHOWN_GROUPS:]),
    )


def macro(tasks: Iterable[TaskSummary], records: Iterable[Record] = ()) -> MacroSummary:
    """Mean over the tasks that have a tau. records: the records of these tasks, for the interval."""
    tasks = list(tasks)
    return MacroSummary(
        tau=_mean(task.tau for task in tasks),
        tau_interval=macro_tau_interval(records),
        tau_verify=_mean(task.tau_verify for task in tasks),
    )


def micro(records: Iterable[Record]) -> MicroSummary:
    sum_of = total_acceptance(_counted(records))
    return MicroSummary(
        tau=sum_of.tau,
        tau_verify=sum_of.tau_verify,
        alpha=list(sum_of.alpha),
        verify_steps=sum_of.verify_steps,
        accepted_histogram=list(sum_of.histogram),
    )


def throughput(records: Sequence[Record], concurrency: int, seconds: float | None = None) -> Throughput:
    """seconds: that these tokens took; None: those of a closed loop."""
    tokens = sum(record.completion_tokens for record in records if not record.failed)
    seconds = busy_seconds(records) if seconds is None else seconds
    return Throughput(
        tokens_per_s=tokens / seconds if seconds else None,
        completion_tokens=tokens,
        seconds=seconds,
        concurrency=concurrency,
        requests=len(records),
        failed=sum(record.failed for record in records),
        cached_share=cached_share(records),
    )


def cached_share(records: Iterable[Record]) -> float | None:
    """Share of the prompts' tokens that the prefix cache had, over the answered requests whose replies say it."""
    said = [record for record in records if not record.failed and record.cached_tokens is not None]
    return ratio(sum(record.cached_tokens or 0 for record in said), sum(record.prompt_tokens for record in said))


def latency(records: Iterable[Record]) -> Latency:
    answered = [record for record in records if not record.failed]
    streamed = [(record, record.ttft_s) for record in answered if record.ttft_s is not None]
    return Latency(
        ttft=_percentiles([first for _, first in streamed]),
        itl=_percentiles(
            [
                (record.latency_s - first) / (record.completion_tokens - 1)
                for record, first in streamed
                if record.completion_tokens > 1
            ]
        ),
        latency=_percentiles([record.latency_s for record in answered]),
        waited=_percentiles([record.waited_s for record in answered if record.waited_s is not None]),
    )


def _percentiles(seconds: Sequence[float]) -> Percentiles | None:
    if not seconds:
        return None
    p50, p90, p99 = (float(value) for value in np.percentile(seconds, [50, 90, 99]))
    return Percentiles(p50=p50, p90=p90, p99=p99)


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """None where one of the two is unknown or the denominator is 0."""
    return numerator / denominator if numerator is not None and denominator else None


def busy_seconds(records: Iterable[Record]) -> float:
    """Length of the union of the requests' time spans. Failed requests count: they took the server's time too."""
    busy, until = 0.0, float("-inf")
    for start, end in sorted((record.started_at, record.started_at + record.latency_s) for record in records):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy


def open_loop_seconds(records: Iterable[Record], sessions: Iterable[Session]) -> float:
    """From when the first request was due to the end of the last one, added up over sessions."""
    begun = sorted(datetime.fromisoformat(session.started_at).timestamp() for session in sessions)
    spans: dict[int, list[float]] = defaultdict(list)
    for record in records:
        spans[bisect_right(begun, record.started_at)] += record.started_at, record.started_at + record.latency_s
    return sum(max(times) - min(times) for times in spans.values())


def _counted(records: Iterable[Record]) -> list[Acceptance]:
    return [record.acceptance for record in records if record.acceptance.verify_steps]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
