"""The text a command ends with. It shows what the JSON beside it holds, nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.serving.compare import Comparison
from benchmarks.stats.intervals import Interval
from benchmarks.stats.lossless import Losslessness
from benchmarks.stats.summary import MacroSummary, MicroSummary, Percentiles, RunSummary, TaskSummary, Throughput
from benchmarks.training.demo import Served, TrainDemo

NOTE = (
    "tau = (completion tokens - 1) / verify steps; macro: mean over prompts, then over tasks; micro: ratio of sums;\n"
    "alpha_k = P(k drafts accepted | k - 1 accepted), prompts weighted equally; 95 %: by bootstrap over prompts"
)


def run_text(summary: RunSummary) -> str:
    head = _head(summary.target, summary.drafter, summary.block_size, summary.temperature, summary.max_tokens)
    parts = [head, _task_table(summary.tasks)]
    if summary.micro.verify_steps:
        parts += [_tau_line(summary.macro, summary.micro), _alpha_table(summary.tasks, summary.micro), NOTE]
    parts += [f"warning: {warning}" for warning in summary.warnings]
    if summary.sessions > 1:
        parts.append(f"written in {summary.sessions} sessions: throughput is not that of one uninterrupted run")
    lines = [_speed_line("throughput", summary.throughput)]
    lines += [_latency_line(name, part) for name, part in summary.latency if part is not None]
    return "\n\n".join([*parts, "\n".join(lines)])


def comparison_text(result: Comparison) -> str:
    config = result.config
    lines = [_speed_line("plain", result.plain), _speed_line("AUF", result.auf)]
    if result.speedup is not None:
        rounds = ", ".join(_number(part.speedup) for part in result.rounds)
        lines.append(f"speed-up    {result.speedup:.2f} at concurrency {config.concurrency} (by round: {rounds})")
    parts = [
        _head(result.target, result.drafter, result.block_size, config.temperature, config.max_tokens),
        _task_table(result.tasks),
        _tau_line(result.macro, result.micro),
        _alpha_table(result.tasks, result.micro),
        NOTE,
        "\n".join(lines),
    ]
    if result.lossless is not None:
        parts.append(lossless_text(result.lossless))
    return "\n\n".join(parts)


def train_demo_text(result: TrainDemo) -> str:
    config = result.config
    lines = [
        f"{result.answers} answers of {config.profile} to prompts from templates, {result.answer_tokens:,} tokens; "
        f"recipe {config.recipe}",
        f"held-out tau at the best checkpoint, by the trainer's walk: {result.held_out_tau:.3f}",
        "",
        "served: the bundled sample tasks, greedy, concurrency 1",
        _served_line("before", result.before),
        _served_line("after", result.after),
        "",
        "seconds: " + ", ".join(f"{part} {seconds:.0f}" for part, seconds in result.seconds.items()),
        f"loss curve: {result.curves}",
    ]
    return "\n".join(lines)


def _served_line(name: str, served: Served) -> str:
    return (
        f"{name:8} tau {_number(served.tau_macro)} macro, {_number(served.tau_micro)} micro; speed-up "
        f"{_number(served.speedup)}; {served.identical} of {served.compared} answers are plain decoding's"
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
        f"{part.speculating} for {part.plain}, {_number(part.gap, 3)} below the best"
        for part in result.differences
    ]
    return "\n".join(lines)


def _head(target: str, drafter: str | None, block_size: int | None, temperature: float, max_tokens: int) -> str:
    decoding = "plain decoding" if block_size is None else f"drafter {drafter}, block {block_size}"
    return f"{target}, {decoding}, temperature {temperature:g}, at most {max_tokens} new tokens"


def _task_table(tasks: Mapping[str, TaskSummary]) -> str:
    rows = [["task", "prompts", "requests", "failed", "no step", "tokens", "tau", "95 %", "micro", "tau_verify"]]
    for name, task in tasks.items():
        counts = [task.prompts, task.requests, task.failed, task.without_steps, task.completion_tokens]
        tau = [_number(task.tau), _interval(task.tau_interval)]
        rows.append([name, *map(str, counts), *tau, *map(_number, (task.tau_micro, task.tau_verify))])
    return _aligned(rows)


def _alpha_table(tasks: Mapping[str, TaskSummary], micro: MicroSummary) -> str:
    rows = [["alpha_k", *map(str, range(1, len(micro.alpha) + 1))]]
    rows += [[name, *map(_number, task.alpha)] for name, task in tasks.items()]
    return _aligned([*rows, ["micro", *map(_number, micro.alpha)]])


def _tau_line(macro: MacroSummary, micro: MicroSummary) -> str:
    return (
        f"tau         macro {_number(macro.tau)} {_interval(macro.tau_interval)}, micro {_number(micro.tau)} "
        f"(tau_verify: macro {_number(macro.tau_verify)}, micro {_number(micro.tau_verify)})"
    )


def _speed_line(name: str, speed: Throughput) -> str:
    failed = f", {speed.failed} FAILED" if speed.failed else ""
    return (
        f"{name:<11} {_number(speed.tokens_per_s, 1)} tokens/s at concurrency {speed.concurrency} "
        f"({speed.completion_tokens} tokens of {speed.requests} requests in {speed.seconds:.1f} s{failed})"
    )


def _latency_line(name: str, seconds: Percentiles) -> str:
    figures = ", ".join(f"{share} {1000 * value:.0f} ms" for share, value in seconds)
    return f"{name:<11} {figures}"


def _interval(interval: Interval | None) -> str:
    return "-" if interval is None else f"{interval.low:.2f}..{interval.high:.2f}"


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """First column to the left, the others to the right; short rows are allowed."""
    width = [max((len(row[i]) for row in rows if i < len(row)), default=0) for i in range(max(map(len, rows)))]
    return "\n".join(
        "  ".join([row[0].ljust(width[0]), *(cell.rjust(width[i]) for i, cell in enumerate(row[1:], start=1))])
        for row in rows
    )
