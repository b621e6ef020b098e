"""Tables for documents: what `identity`, `speed` and others print and write beside their JSON."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from benchmarks.harness.results import Measured
from benchmarks.serving.failover import FailoverReport
from benchmarks.serving.identity import IdentityReport
from benchmarks.serving.interleaved import Agreement
from benchmarks.serving.soak import SoakReport
from benchmarks.serving.speed import SpeedReport
from benchmarks.serving.sweep import Sweep
from benchmarks.serving.variants import VariantsReport
from benchmarks.stats.summary import Percentiles, RunSummary

NAMES = {"auf": "AUF", "plain": "plain", "dflash": "DFLASH"}


def identity_markdown(report: IdentityReport) -> str:
    config = report.config
    rows = [["variant", "concurrency", "prompts", "identical", "forks", "tokens/s", "tau"]]
    for row in report.rows:
        compared = None if row.identical is None else row.identical + len(row.forks)
        identical = "reference" if row.identical is None else f"{row.identical} of {compared}"
        prompts = f"{row.prompts} ({row.failed} FAILED)" if row.failed else str(row.prompts)
        forks = "-" if row.identical is None else str(len(row.forks))
        figures = [markdown_number(row.tokens_per_s, 1), markdown_number(row.tau)]
        rows.append([row.variant, str(row.concurrency), prompts, identical, forks, *figures])
    asked = f"{config.profile}, temperature 0, at most {config.max_tokens} new tokens, {', '.join(config.tasks)}"
    outcome = "passed" if report.passed else "FAILED"
    notes = [
        f"Identity {outcome}. The reference of `unconstrained`, which promises nothing, is itself alone; of the others "
        "it is plain decoding at concurrency 16. Speeds compare at concurrency 16.",
        *(
            f"- fork: {row.variant} at {row.concurrency}, {fork.prompt_id} token {fork.position}: "
            f"{fork.token} for {fork.reference}"
            for row in report.rows
            for fork in row.forks
        ),
    ]
    return "\n\n".join([asked, markdown_table(rows), "\n".join(notes), markdown_origin(report)]) + "\n"


def speed_markdown(report: SpeedReport) -> str:
    config, auf = report.config, report.servers["auf"]
    rows = [["concurrency", "prompts", *(f"{name} tokens/s" for name in NAMES.values())]]
    rows[0] += ["AUF / plain", "AUF / DFLASH", "tau AUF", "tau DFLASH"]
    for level in report.levels:
        prompts = f"{level.prompts} ({level.failed} FAILED)" if level.failed else str(level.prompts)
        speeds = [markdown_number(level.tokens_per_s[name], 1) for name in NAMES]
        ratios = [level.auf_over_plain, level.auf_over_dflash, level.tau["auf"], level.tau["dflash"]]
        rows.append([str(level.concurrency), prompts, *speeds, *map(markdown_number, ratios)])
    asked = (
        f"{config.profile} ({auf.device}, block {auf.block_size}), temperature 0, at most {config.max_tokens} new "
        f"tokens, {', '.join(report.tasks)}; medians of {config.rounds} interleaved rounds"
    )
    lines = []
    for level in report.levels:
        with_dflash, with_plain = level.auf_and_dflash, level.auf_and_plain
        lines.append(
            f"- at concurrency {level.concurrency}: AUF gave the tokens of DFLASH in {_same(with_dflash)} answers, its "
            f"accepted histogram in {with_dflash.same_histogram}, and the tokens of plain in {_same(with_plain)}"
        )
    if (cost := report.step_cost) is not None:
        lines.append(
            f"- step cost at concurrency 1: AUF {_milliseconds(cost.auf_s)} a verify step, DFLASH "
            f"{_milliseconds(cost.dflash_s)}, plain {_milliseconds(cost.plain_s)} a token; AUF / plain "
            f"{markdown_number(cost.ratio)}"
        )
    return "\n\n".join([asked, markdown_table(rows), "\n".join(lines), markdown_origin(report)]) + "\n"


def variants_markdown(report: VariantsReport) -> str:
    config = report.config
    rows = [["server", "block", "concurrency", "prompts", "tokens/s", "of plain", "of the profile", "tau"]]
    rows[0] += ["step", "of plain's", "tokens of plain"]
    for row in report.rows:
        prompts = f"{row.prompts} ({row.failed} FAILED)" if row.failed else str(row.prompts)
        cells = [" ".join(row.settings) or row.name, str(row.block_size or "-"), str(row.concurrency), prompts]
        ratios = [row.over_plain, row.over_profile, row.tau]
        cells += [markdown_number(row.tokens_per_s, 1), *map(markdown_number, ratios)]
        cells += [_milliseconds(row.step_s), markdown_number(row.step_over_plain), _same(row.plain_tokens)]
        rows.append(cells)
    asked = (
        f"{config.profile}, temperature 0, at most {config.max_tokens} new tokens, {', '.join(report.tasks)}; medians "
        f"of {config.rounds} interleaved rounds. A step: a verify step with its drafting, or a token of plain decoding"
    )
    return "\n\n".join([asked, markdown_table(rows), markdown_origin(report)]) + "\n"


def sweep_markdown(sweep: Sweep) -> str:
    config, first = sweep.config, sweep.levels[0].auf
    names = ["AUF", "plain"] if config.plain_url else ["AUF"]
    rows = [["concurrency", "requests", "tau", *(f"{name} tokens/s" for name in names)]]
    rows[0] += [*(["speed-up"] if config.plain_url else []), *(f"{name} TTFT p50 / p90 / p99 ms" for name in names)]
    rows[0] += [f"{name} ITL p50 / p90 / p99 ms" for name in names]
    for level in sweep.levels:
        runs: list[RunSummary] = [run for run in (level.auf, level.plain) if run is not None]
        failed = sum(run.throughput.failed for run in runs)
        requests = f"{level.auf.throughput.requests}" + (f" ({failed} FAILED)" if failed else "")
        speeds = [markdown_number(run.throughput.tokens_per_s, 1) for run in runs]
        speedup = [markdown_number(level.speedup)] if config.plain_url else []
        times = [_milliseconds_of(seconds) for run in runs for seconds in [run.latency.ttft]]
        times += [_milliseconds_of(seconds) for run in runs for seconds in [run.latency.itl]]
        rows.append([str(level.concurrency), requests, markdown_number(level.auf.macro.tau), *speeds, *speedup, *times])
    asked = (
        f"{first.target} ({first.device}, block {first.block_size}), temperature {config.temperature:g}, at most "
        f"{config.max_tokens} new tokens, {', '.join(first.tasks)}, streamed"
    )
    note = (
        "ITL: time between the tokens of one answer after its first, its mean; a block's tokens arrive together. "
        "Answers are streamed: where the client shares the server's machine, its work for each chunk (a token of plain "
        "decoding, a step of AUF) raises the speed-up. `compare` and `speed` do not."
    )
    return "\n\n".join([asked, markdown_table(rows), note, markdown_origin(sweep)]) + "\n"


def failover_markdown(report: FailoverReport) -> str:
    config = report.config
    rows = [["", "requests", "sent", "retried", "lost", "wrong", "verify steps", "emitted tokens"]]
    for name, load in (("both servers up", report.both), ("one killed", report.killed)):
        figures = [load.asked, load.sent, load.retried, load.lost, load.wrong, load.verify_steps, load.emitted]
        rows.append([name, *map(str, figures)])
    asked = (
        f"{config.profile}, two servers behind sglang-router, {config.clients} clients, {config.max_tokens} tokens an "
        f"answer, the openai client with {config.retries} retries; one server killed after {report.answered_before} of "
        f"{report.killed.asked} answers"
    )
    shares = " and ".join(f"{server['verify_steps']} verify steps" for server in report.totals)
    notes = [
        f"Failover {'passed' if report.passed else 'FAILED'}. The servers' totals in the first part, {shares}, "
        f"{'add up to' if report.adds_up else 'DO NOT ADD UP TO'} what the replies say.",
        *(f"- {what}" for what in report.both.named + report.killed.named),
    ]
    return "\n\n".join([asked, markdown_table(rows), "\n".join(notes), markdown_origin(report)]) + "\n"


def soak_markdown(report: SoakReport) -> str:
    config, total = report.config, report.acceptance["total"]
    rows = [["", "idle before", "idle after", "under load, at most"]]
    for name, unit, what in (
        ("memory_mib", "MiB", "resident memory"),
        ("files", "", "open files"),
        ("kv_tokens", "", "KV slots in use"),
        ("running", "", "running requests"),
        ("waiting", "", "waiting requests"),
    ):
        most = max(getattr(sample, name) for sample in report.samples)
        figures = [getattr(report.before, name), getattr(report.after, name), most]
        rows.append([what, *(f"{figure:.0f} {unit}".strip() for figure in figures)])
    asked = (
        f"{config.profile}, {config.minutes:g} minutes, {config.clients} clients: {sum(report.asked.values())} "
        f"requests ({', '.join(f'{count} {kind}' for kind, count in sorted(report.asked.items()))})"
    )
    faults = ", ".join(f"{count} {what}" for what, count in report.faults.items()) or "no wrong answer, no server error"
    notes = [
        f"Soak {'passed' if report.passed else 'FAILED'}: {faults}; {'; '.join(report.leaks) or 'nothing leaked'}.",
        f"Memory in the last fifth of the time against 20 to 40 % of it: {report.growth:+.1%}. Tau of "
        f"{total['requests']} answers with a verify step: {markdown_number(total['tau'])}.",
        *(f"- {fault}" for fault in report.named),
    ]
    return "\n\n".join([asked, markdown_table(rows), "\n".join(notes), markdown_origin(report)]) + "\n"


def _milliseconds_of(seconds: Percentiles | None) -> str:
    return "-" if seconds is None else " / ".join(f"{1000 * value:.0f}" for _, value in seconds)


def _same(agreement: Agreement) -> str:
    return f"{agreement.same_tokens} of {agreement.compared}"


def markdown_origin(report: Measured) -> str:
    machine = report.machine
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in report.versions.items())
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB"
    return f"Machine: {', '.join([where, *machine['gpus']])}.\n{versions}.\nCommand: `{shlex.join(report.command)}`"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *("---:" for _ in rows[0][1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]])


def markdown_number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.1f} ms"
