"""Parts of what `run` and `compare` print: figures of the JSON file that they write, and no others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tabulate import tabulate

from benchmarks.harness.server_info import ServerFacts
from benchmarks.harness.sources.files import CHATS, TEXTS
from benchmarks.reports.numbers import interval_text, number, percent
from benchmarks.stats.summary import MacroSummary, MicroSummary, Percentiles, TaskSummary, Throughput

NAMED = 20
"""Broken rows that are named."""

NOTE = (
    "tau = (completion tokens - 1) / verify steps; macro: mean over prompts, then over tasks; micro: ratio of sums;\n"
    "alpha_k = P(k drafts accepted | k - 1 accepted), prompts weighted equally; 95 %: by bootstrap over prompts"
)


UNKNOWN = "a server that is not SGLang, decoding not known"


def decoding_text(drafter: str | None, block_size: int | None) -> str:
    """How an SGLang server decodes."""
    return "plain decoding" if block_size is None else f"drafter {drafter}, block {block_size}"


def vllm_text(version: str, block_size: int | None) -> str:
    """How a server of vLLM decodes."""
    return f"vLLM {version}, " + ("plain decoding" if block_size is None else f"block {block_size}")


def asked_text(target: str, decoding: str, temperature: float, max_tokens: int) -> str:
    """What was asked, and how it was decoded."""
    return f"{target}, {decoding}, temperature {temperature:g}, at most {max_tokens} new tokens"


def drafting_text(server: ServerFacts) -> str:
    """How a server drafts, as far as it says: "AUF, block 8, tree, 8192 tokens drafted, weights 0f1e2d3c"."""
    parts = [str(server.algorithm), f"block {server.block_size}"]
    if server.tree is not None:
        parts.append("chain" if not server.tree else f"tree of {server.tree_nodes}" if server.tree_nodes else "tree")
    if server.draft_vocabulary is not None:
        parts.append(f"{server.draft_vocabulary} tokens drafted")
    if server.weights is not None:
        parts.append(f"weights {server.weights[:8]}")
    return ", ".join(parts)


def task_table(tasks: Mapping[str, TaskSummary]) -> str:
    """The column `cached` is there where a server says how much of the prompts its prefix cache had."""
    rows = [["task", "prompts", "requests", "failed", "no step", "tokens", "tau", "95 %", "micro", "tau_verify"]]
    cached = any(task.cached_share is not None for task in tasks.values())
    rows[0] += ["cached"] * cached
    for name, task in tasks.items():
        counts = [task.prompts, task.requests, task.failed, task.without_steps, task.completion_tokens]
        tau = [number(task.tau), interval_text(task.tau_interval)]
        rows.append([name, *map(str, counts), *tau, *map(number, (task.tau_micro, task.tau_verify))])
        rows[-1] += [percent(task.cached_share)] * cached
    return aligned(rows)


def tau_text(tasks: Mapping[str, TaskSummary], macro: MacroSummary, micro: MicroSummary) -> str:
    """tau over all tasks, alpha_k by task, and what the two are."""
    tau = (
        f"tau         macro {number(macro.tau)} {interval_text(macro.tau_interval)}, micro {number(micro.tau)} "
        f"(tau_verify: macro {number(macro.tau_verify)}, micro {number(micro.tau_verify)})"
    )
    alpha = [["alpha_k", *map(str, range(1, len(micro.alpha) + 1))]]
    alpha += [[name, *map(number, task.alpha)] for name, task in tasks.items()]
    alpha.append(["micro", *map(number, micro.alpha)])
    return "\n\n".join([tau, aligned(alpha), NOTE])


OPEN_LOOP = (
    "Requests come at random times (Poisson), whether earlier ones are answered or not. Times count from when a "
    "request was due, waiting for room among those in flight included; tokens/s are what was asked for, unless the "
    "server falls behind."
)


def load_text(concurrency: int, rate: float | None) -> str:
    """How many requests are sent, in a closed loop or in an open one."""
    return f"concurrency {concurrency}" if rate is None else f"{rate:g} requests/s, at most {concurrency} in flight"


def speed_line(name: str, speed: Throughput, rate: float | None = None) -> str:
    """rate: requests a second of an open loop."""
    more = f", {speed.failed} FAILED" if speed.failed else ""
    if speed.cached_share is not None:
        more += f", {percent(speed.cached_share)} of the prompts' tokens from the prefix cache"
    return (
        f"{name:<11} {number(speed.tokens_per_s, 1)} tokens/s at {load_text(speed.concurrency, rate)} "
        f"({speed.completion_tokens} tokens of {speed.requests} requests in {speed.seconds:.1f} s{more})"
    )


def percentiles(seconds: Percentiles | None) -> str:
    """ "12 / 30 / 41", in milliseconds; "-" where there are none."""
    return "-" if seconds is None else " / ".join(f"{1000 * value:.0f}" for _, value in seconds)


def interrupted_text(sessions: Mapping[str, int]) -> str:
    """What is said of runs whose speed is not that of one uninterrupted run. sessions: of each run, by name."""
    found = [f"{name} ({count})" for name, count in sessions.items() if count > 1]
    if not found:
        return ""
    return f"Finished in several sessions, at whose ends fewer requests were in flight: {', '.join(found)}."


def broken_rows_text(rows: Sequence[str]) -> str:
    """Rows of a user's own files that were not asked; "" where there is none. The JSON file has all of them."""
    if not rows:
        return ""
    more = [f"- and {len(rows) - NAMED} more"] if len(rows) > NAMED else []
    heading = f"broken rows of --prompts, not asked: {len(rows)}; expected: {CHATS}; with --raw-prompts {TEXTS}"
    return "\n".join([heading, *(f"- {row}" for row in rows[:NAMED]), *more])


def aligned(rows: Sequence[Sequence[str]], names: int = 1) -> str:
    """The first columns (`names` of them) to the left, the others to the right; short rows are allowed."""
    columns = [*["left"] * names, *["right"] * (max(map(len, rows)) - names)]
    return str(tabulate(rows, tablefmt="plain", disable_numparse=True, colalign=columns))
