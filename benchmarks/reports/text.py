"""Parts of what `run`, `compare` and `lossless` print: figures of the JSON file that they write, and no others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tabulate import tabulate

from benchmarks.reports.numbers import interval_text, number
from benchmarks.stats.lossless import Losslessness
from benchmarks.stats.summary import MacroSummary, MicroSummary, TaskSummary, Throughput

NOTE = (
    "tau = (completion tokens - 1) / verify steps; macro: mean over prompts, then over tasks; micro: ratio of sums;\n"
    "alpha_k = P(k drafts accepted | k - 1 accepted), prompts weighted equally; 95 %: by bootstrap over prompts"
)


def asked_text(target: str, drafter: str | None, block_size: int | None, temperature: float, max_tokens: int) -> str:
    """What was asked, and how it was decoded."""
    decoding = "plain decoding" if block_size is None else f"drafter {drafter}, block {block_size}"
    return f"{target}, {decoding}, temperature {temperature:g}, at most {max_tokens} new tokens"


def task_table(tasks: Mapping[str, TaskSummary]) -> str:
    rows = [["task", "prompts", "requests", "failed", "no step", "tokens", "tau", "95 %", "micro", "tau_verify"]]
    for name, task in tasks.items():
        counts = [task.prompts, task.requests, task.failed, task.without_steps, task.completion_tokens]
        tau = [number(task.tau), interval_text(task.tau_interval)]
        rows.append([name, *map(str, counts), *tau, *map(number, (task.tau_micro, task.tau_verify))])
    return _aligned(rows)


def tau_text(tasks: Mapping[str, TaskSummary], macro: MacroSummary, micro: MicroSummary) -> str:
    """tau over all tasks, alpha_k by task, and what the two are."""
    tau = (
        f"tau         macro {number(macro.tau)} {interval_text(macro.tau_interval)}, micro {number(micro.tau)} "
        f"(tau_verify: macro {number(macro.tau_verify)}, micro {number(micro.tau_verify)})"
    )
    alpha = [["alpha_k", *map(str, range(1, len(micro.alpha) + 1))]]
    alpha += [[name, *map(number, task.alpha)] for name, task in tasks.items()]
    alpha.append(["micro", *map(number, micro.alpha)])
    return "\n\n".join([tau, _aligned(alpha), NOTE])


def speed_line(name: str, speed: Throughput) -> str:
    failed = f", {speed.failed} FAILED" if speed.failed else ""
    return (
        f"{name:<11} {number(speed.tokens_per_s, 1)} tokens/s at concurrency {speed.concurrency} "
        f"({speed.completion_tokens} tokens of {speed.requests} requests in {speed.seconds:.1f} s{failed})"
    )


def lossless_text(result: Losslessness) -> str:
    bar = "equality" if result.exact else f"a near-tie of at most {result.near_tie_bar:g} in logits"
    outcome = "passed" if result.passed else "FAILED"
    counts = f"{result.identical} identical, {result.near_tie} near-tie, {result.fault} fault"
    lines = [f"lossless    {counts} ({outcome}; the bar is {bar})"]
    if result.follow_up:
        lines.append(f"            {result.follow_up} later turns not compared: their history forked")
    if result.missing:
        lines.append(f"            {result.missing} requests failed or absent in one of the runs")
    lines += [
        f"            {part.verdict}: {part.task} {part.prompt_id} turn {part.turn} token {part.position}: "
        f"{part.speculating} for {part.plain}, {number(part.gap, 3)} below the best"
        for part in result.differences
    ]
    return "\n".join(lines)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """First column to the left, the others to the right; short rows are allowed."""
    columns = ["left", *["right"] * (max(map(len, rows)) - 1)]
    return str(tabulate(rows, tablefmt="plain", disable_numparse=True, colalign=columns))
