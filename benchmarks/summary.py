"""From records to figures. All of tau comes from sglang_auf.acceptance; this file groups, and adds throughput.

macro: prompts weigh equally inside a task and tasks equally (the paper's average; each MT-Bench turn counts as a
prompt). micro: ratio of sums. Failed requests and requests without a verify step have no tau; they are counted beside
it and never averaged in.

tokens_per_s: completion tokens of the answered requests / seconds during which at least one recorded request was in
flight, at the run's concurrency. In one uninterrupted closed loop that is the wall time of the recorded phase; warm-up,
server start and the pause between two sessions of a resumed run are not in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

from pydantic import BaseModel, ConfigDict

from benchmarks.manifest import Manifest
from benchmarks.records import Record
from sglang_auf.acceptance import Acceptance, macro_alpha, macro_tau, total


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TaskSummary(_Model):
    """tau, tau_verify, alpha: macro. prompts: conversations; requests: turns; without_steps: answered, but no tau."""

    prompts: int
    requests: int
    failed: int
    without_steps: int
    tau: float | None
    tau_micro: float | None
    tau_verify: float | None
    alpha: list[float | None]
    verify_steps: int
    accepted_histogram: list[int]
    completion_tokens: int


class MacroSummary(_Model):
    tau: float | None
    tau_verify: float | None


class MicroSummary(_Model):
    tau: float | None
    tau_verify: float | None
    alpha: list[float | None]
    verify_steps: int
    accepted_histogram: list[int]


class Throughput(_Model):
    tokens_per_s: float | None
    completion_tokens: int
    seconds: float
    concurrency: int
    requests: int
    failed: int


class RunSummary(_Model):
    """summary.json of one run. drafter, block_size and every tau are None for a plain baseline."""

    target: str
    drafter: str | None
    block_size: int | None
    device: str
    temperature: float
    max_tokens: int
    sessions: int
    tasks: dict[str, TaskSummary]
    macro: MacroSummary
    micro: MicroSummary
    throughput: Throughput


def summarize_run(manifest: Manifest, records: Sequence[Record]) -> RunSummary:
    """records: one a request. What run.json already says in full (prompts, versions, machine) is not repeated."""
    tasks = summarize_tasks(records)
    return RunSummary(
        target=manifest.server.model,
        drafter=manifest.server.drafter,
        block_size=manifest.server.block_size,
        device=manifest.server.device,
        temperature=manifest.config.temperature,
        max_tokens=manifest.config.max_tokens,
        sessions=len(manifest.sessions),
        tasks=tasks,
        macro=macro(tasks.values()),
        micro=micro(records),
        throughput=throughput(records, manifest.config.concurrency),
    )


def summarize_task(records: Sequence[Record]) -> TaskSummary:
    """Records of one task, one a request."""
    answered = [record for record in records if not record.failed]
    counted = _counted(answered)
    sum_of = total(counted)
    return TaskSummary(
        prompts=len({record.prompt_id for record in records}),
        requests=len(records),
        failed=len(records) - len(answered),
        without_steps=len(answered) - len(counted),
        tau=macro_tau(counted),
        tau_micro=sum_of.tau,
        tau_verify=_mean(request.tau_verify for request in counted),
        alpha=list(macro_alpha(counted)),
        verify_steps=sum_of.verify_steps,
        accepted_histogram=list(sum_of.histogram),
        completion_tokens=sum(record.completion_tokens for record in answered),
    )


def summarize_tasks(records: Sequence[Record]) -> dict[str, TaskSummary]:
    names = dict.fromkeys(record.task for record in records)
    return {name: summarize_task([record for record in records if record.task == name]) for name in names}


def macro(tasks: Iterable[TaskSummary]) -> MacroSummary:
    """Plain mean over the tasks that have a tau."""
    tasks = list(tasks)
    return MacroSummary(tau=_mean(task.tau for task in tasks), tau_verify=_mean(task.tau_verify for task in tasks))


def micro(records: Iterable[Record]) -> MicroSummary:
    sum_of = total(_counted(records))
    return MicroSummary(
        tau=sum_of.tau,
        tau_verify=sum_of.tau_verify,
        alpha=list(sum_of.alpha),
        verify_steps=sum_of.verify_steps,
        accepted_histogram=list(sum_of.histogram),
    )


def throughput(records: Sequence[Record], concurrency: int) -> Throughput:
    tokens = sum(record.completion_tokens for record in records if not record.failed)
    seconds = busy_seconds(records)
    return Throughput(
        tokens_per_s=tokens / seconds if seconds else None,
        completion_tokens=tokens,
        seconds=seconds,
        concurrency=concurrency,
        requests=len(records),
        failed=sum(record.failed for record in records),
    )


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """None where one of the two is unknown or the denominator is 0."""
    return numerator / denominator if numerator is not None and denominator else None


def busy_seconds(records: Iterable[Record]) -> float:
    """Length of the union of the requests' time spans, failed ones included: they took the server's time too."""
    busy, until = 0.0, float("-inf")
    for start, end in sorted((record.started_at, record.started_at + record.latency_s) for record in records):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy


def _counted(records: Iterable[Record]) -> list[Acceptance]:
    return [record.acceptance for record in records if record.acceptance.verify_steps]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
