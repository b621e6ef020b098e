"""One page about finished runs. Nothing is measured here: every figure is computed from records on disk."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from benchmarks.harness.config import CommandConfig
from benchmarks.harness.manifest import RunManifest
from benchmarks.harness.records import Record, latest, read_records
from benchmarks.harness.run import MANIFEST, RECORDS
from benchmarks.reports import figures, paper
from benchmarks.reports.groups import group_sections
from benchmarks.reports.numbers import number, percent, with_interval
from benchmarks.reports.page import PageReport, Section, Table
from benchmarks.reports.positions import position_sections
from benchmarks.reports.text import (
    OPEN_LOOP,
    UNKNOWN,
    broken_rows_text,
    drafting_text,
    interrupted_text,
    load_text,
    percentiles,
    vllm_text,
)
from benchmarks.stats.intervals import by_task
from benchmarks.stats.summary import RunSummary, ratio, summarize_run
from sglang_auf.acceptance import alpha_from_survival, mean_survival
from sglang_auf.errors import DataError

METRICS = "metrics.jsonl"


class ReportConfig(CommandConfig):
    """One page of benchmark runs and training runs: tau, alpha_k, accepted lengths, speed-up, training, provenance."""

    runs: tuple[Path, ...] = Field(
        min_length=1, description="directories of `run`, `sweep` or `compare`, or of `sglang-auf train`"
    )
    paper: bool = Field(False, description="set the figures of arXiv 2607.01893 beside these")
    title: str = Field("Acceptance of a block drafter", description="the page's title")
    out: Path = Field(Path("runs/report"), description="directory for report.html, report.md and the pictures")


@dataclass(frozen=True, slots=True)
class MeasuredRun:
    """A benchmark run that was read from disk."""

    name: str
    manifest: RunManifest
    records: list[Record]
    summary: RunSummary

    @property
    def plain(self) -> bool:
        return self.manifest.config.plain

    @property
    def conditions(self) -> tuple[Any, ...]:
        """What was asked, how, and where, at whatever concurrency."""
        config, server = self.manifest.config, self.manifest.server
        prompts = tuple(sorted((name, origin.sha256) for name, origin in self.manifest.tasks.items()))
        asked = (prompts, config.temperature, config.max_tokens, config.thinking)
        how = (config.stream, config.record_steps, config.empty_cache, config.rate)
        machines = {json.dumps(session.machine, sort_keys=True) for session in self.manifest.sessions}
        return (*asked, *how, server.target, server.device, server.dtype, server.vllm, *sorted(machines))

    @property
    def questions(self) -> tuple[Any, ...]:
        """Two runs with equal questions may be compared in speed."""
        return (*self.conditions, self.manifest.config.concurrency)


def report_runs(config: ReportConfig) -> PageReport:
    """Raises ConfigError without matplotlib, DataError for a directory with no run, or one with no tau to show."""
    figures.require_matplotlib()
    measured, trained = load_runs(config.runs)
    sections = make_sections(measured, trained, with_paper=config.paper)
    return PageReport(title=config.title, sections=sections)


def load_runs(directories: Sequence[Path]) -> tuple[list[MeasuredRun], dict[str, list[dict[str, Any]]]]:
    """Benchmark runs, and the metrics of training runs by name.

    A directory of a sweep gives a run for each level, one of a comparison a run for each of its two servers.
    """
    measured: list[MeasuredRun] = []
    trained: dict[str, list[dict[str, Any]]] = {}
    for directory, name in zip(directories, _names(directories), strict=True):
        levels = sorted(path.parent for path in directory.glob(f"*-c*/{MANIFEST}"))
        levels += [directory / server for server in ("auf", "plain") if (directory / server / MANIFEST).is_file()]
        if (directory / METRICS).is_file():  # before run.json, which a training run has too
            lines = (directory / METRICS).read_text(encoding="utf-8").splitlines()
            trained[name] = [json.loads(line) for line in lines]
        elif (directory / MANIFEST).is_file():
            measured.append(_measured(directory, name))
        elif levels:
            measured += [_measured(level, f"{name}/{level.name}") for level in levels]
        else:
            found = f"{directory}, with neither {MANIFEST} nor {METRICS} nor levels of a sweep nor runs of a comparison"
            raise DataError(
                found if directory.is_dir() else f"no directory {directory}",
                "directories of `python -m benchmarks run`, `sweep` or `compare`, or of `sglang-auf train`",
            )
    return measured, trained


def make_sections(
    measured: Sequence[MeasuredRun], trained: Mapping[str, Sequence[Mapping[str, Any]]], with_paper: bool = False
) -> list[Section]:
    speculating = [run for run in measured if not run.plain]
    summaries = {run.name: run.summary for run in speculating}
    sections: list[Section] = []
    if speculating:
        alpha = {run.name: alpha_over_tasks(run.records) for run in speculating}
        sections += [
            Section("Tau", TAU_TEXT, tau_table(summaries), figures.png(figures.tau_by_task(summaries)), "tau.png"),
            *group_sections(summaries),
            Section("alpha_k", ALPHA_TEXT, _alpha_table(alpha), figures.png(figures.alpha_curves(alpha)), "alpha.png"),
            Section(
                "Accepted lengths",
                "Share of verify steps by the number of drafted tokens they accepted, over all requests.",
                picture=figures.png(figures.accepted_lengths(summaries)),
                picture_name="accepted.png",
            ),
        ]
        sections += position_sections({run.name: run.records for run in speculating})
    points = speedup_points(measured)
    interrupted = interrupted_text({run.name: run.summary.sessions for run in measured})
    if points:
        picture = figures.png(figures.speedups(points))
        text = _lines(SPEED_TEXT, interrupted)
        sections.append(Section("Speed-up by concurrency", text, None, picture, "speedup.png"))
    if measured:
        opened = OPEN_LOOP if any(run.summary.rate is not None for run in measured) else ""
        sections.append(Section("Speed", _lines(LATENCY_TEXT, opened, interrupted), _speed_table(measured)))
    if trained:
        picture = figures.png(figures.training_curves(trained))
        sections.append(Section("Training", TRAINING_TEXT, None, picture, "training.png"))
    if with_paper:
        sections.append(Section("The paper's figures", paper.LEVEL, _paper_table()))
    warnings = [f"{run.name}: {warning}" for run in measured for warning in run.manifest.warnings]
    warnings += [f"{run.name}: {text}" for run in measured if (text := broken_rows_text(run.manifest.broken_rows))]
    if warnings:
        sections.append(Section("Warnings", "\n".join(warnings)))
    if measured:
        sections.append(Section("Where the figures come from", "", _origin_table(measured), in_words=True))
    return sections


TAU_TEXT = (
    "tau = (completion tokens - 1) / verify steps of a request; of a task, the mean over its requests (each turn of "
    "MT-Bench is one); mean: tasks equally; micro: ratio of sums over all requests. Intervals: 95 %, bootstrap over "
    "prompts; other training seeds are not in them. cached, where servers say it: share of the prompts' tokens that "
    "the prefix cache had."
)
ALPHA_TEXT = (
    "alpha_k = P(at least k drafts accepted, given at least k-1), requests weighted equally inside a task and tasks "
    "equally."
)
SPEED_TEXT = "Tokens/s over those of plain decoding, asked the same prompts at the same concurrency."
LATENCY_TEXT = (
    "TTFT: time to the first token. ITL: time between the tokens of one answer after its first, its mean. Both of "
    "streamed answers, in milliseconds, as median / 90th / 99th percentile."
)
TRAINING_TEXT = "From the metrics of each training run, at its logging steps; tau by the trainer's walk."


def alpha_over_tasks(records: Sequence[Record]) -> tuple[float | None, ...]:
    """alpha_1, alpha_2, ... from the survival that is averaged inside each task and then over tasks."""
    curves = [mean_survival(record.acceptance for record in of_task) for of_task in by_task(records).values()]
    curves = [curve for curve in curves if curve]
    if not curves:
        return ()
    longest = max(map(len, curves))
    padded = [curve + [0.0] * (longest - len(curve)) for curve in curves]
    return alpha_from_survival([sum(column) / len(padded) for column in zip(*padded, strict=True)])


def speedup_points(runs: Sequence[MeasuredRun]) -> dict[str, list[tuple[int, float]]]:
    """Drafter and temperature -> (concurrency, speed-up), of runs with a plain run of the same questions.

    Runs of one line differ in nothing but concurrency; where two lines would have one name, the second has a run's too.
    """
    points: dict[str, list[tuple[int, float]]] = {}
    names: dict[tuple[Any, ...], str] = {}
    for run in runs:
        plain = next((other for other in runs if other.plain and other.questions == run.questions), None)
        if run.plain or plain is None or run.manifest.config.rate is not None:  # at a rate both have the same tokens/s
            continue
        faster = ratio(run.summary.throughput.tokens_per_s, plain.summary.throughput.tokens_per_s)
        if faster is not None:
            server, config = run.manifest.server, run.manifest.config
            drafter = "/".join(Path(server.drafter or "").parts[-2:])
            if server.vllm is not None:
                name = f"{vllm_text(server.vllm, run.summary.block_size)} (T={config.temperature:g})"
            else:
                name = f"{drafter} ({drafting_text(server)}, T={config.temperature:g})"
            line = (*run.conditions, server.model_copy(update={"swaps": None}))
            if server.vllm is not None:  # says no drafter: the levels of one sweep have one, and no other runs
                line = (*line, run.summary.block_size, run.name.removesuffix(f"/auf-c{config.concurrency}"))
            if line not in names:
                names[line] = f"{name}, {run.name}" if name in names.values() else name
            points.setdefault(names[line], []).append((config.concurrency, faster))
    return points


def tau_table(runs: Mapping[str, RunSummary]) -> Table:
    tasks = list(dict.fromkeys(task for run in runs.values() for task in run.tasks))
    cached = any(run.throughput.cached_share is not None for run in runs.values())
    rows = [["run", *tasks, "mean", "micro", *["cached"] * cached]]
    for name, run in runs.items():
        of_tasks = [run.tasks.get(task) for task in tasks]
        cells = [with_interval(task.tau, task.tau_interval) if task else "-" for task in of_tasks]
        rows.append([name, *cells, with_interval(run.macro.tau, run.macro.tau_interval), number(run.micro.tau)])
        rows[-1] += [percent(run.throughput.cached_share)] * cached
    return rows


def _alpha_table(alpha: Mapping[str, Sequence[float | None]]) -> Table:
    longest = max(map(len, alpha.values()), default=0)
    rows = [["run", *(f"alpha_{k}" for k in range(1, longest + 1))]]
    for name, values in alpha.items():
        rows.append([name, *map(number, values), *["-"] * (longest - len(values))])
    return rows


def _speed_table(runs: Sequence[MeasuredRun]) -> Table:
    """Open loops have columns of their own."""
    opened = any(run.summary.rate is not None for run in runs)
    rows = [["run", "concurrency", "requests", "failed", "tokens/s", "TTFT", "ITL"]]
    rows[0] += ["requests/s", "latency", "waited"] * opened
    for run in runs:
        speed, latency = run.summary.throughput, run.summary.latency
        counts = [speed.concurrency, speed.requests, speed.failed]
        rows.append([run.name, *map(str, counts), number(speed.tokens_per_s, 1)])
        rows[-1] += map(percentiles, (latency.ttft, latency.itl))
        if opened:
            rate = "-" if run.summary.rate is None else f"{run.summary.rate:g}"
            rows[-1] += [rate, *map(percentiles, (latency.latency, latency.waited))]
    return rows


def _paper_table() -> Table:
    rows = [["drafter, arm", "T", *paper.TASKS, "mean"]]
    for head, arms in (("DFlash", paper.DFLASH), ("Domino", paper.DOMINO)):
        for arm, by_temperature in arms.items():
            for temperature, row in enumerate(by_temperature):
                rows.append([f"{head} {arm}", str(temperature), *map(number, row), number(paper.mean(row))])
    return rows


def _origin_table(runs: Sequence[MeasuredRun]) -> Table:
    rows = [["run", "server", "asked", "when", "machine", "versions", "command"]]
    for run in runs:
        config, sessions = run.manifest.config, run.manifest.sessions
        thinking = "" if config.thinking == "server" or not run.manifest.rendered else f", thinking {config.thinking}"
        rows.append(
            [
                run.name,
                _server_text(run),
                f"T={config.temperature:g}, {config.max_tokens} tokens at most, "
                + load_text(config.concurrency, config.rate)
                + thinking
                + (f", {len(sessions)} sessions" if len(sessions) > 1 else ""),
                _different(session.started_at for session in sessions),
                _different(
                    f"{session.machine['cpu']}, {session.machine['cores']} cores, {session.machine['memory_gib']} GiB"
                    for session in sessions
                ),
                _different(
                    ", ".join(f"{name} {version}" for name, version in session.versions.items() if version)
                    for session in sessions
                ),
                _different(shlex.join(session.command) for session in sessions),
            ]
        )
    return rows


def _server_text(run: MeasuredRun) -> str:
    server = run.manifest.server
    if server.vllm is not None:
        return f"{server.model}, {vllm_text(server.vllm, run.summary.block_size)}"
    if server.sglang is None:
        return f"{server.model}, {UNKNOWN}"
    how = "plain decoding" if run.plain else f"{drafting_text(server)}, {server.drafter}"
    return f"{server.model} ({server.device}, {server.dtype}), {how}"


def _different(of_sessions: Iterable[str]) -> str:
    """What the sessions of a run say, each thing once."""
    return "; ".join(dict.fromkeys(of_sessions))


def _lines(*texts: str) -> str:
    return "\n".join(filter(None, texts))


def _measured(directory: Path, name: str) -> MeasuredRun:
    manifest = RunManifest.read(directory / MANIFEST)
    records = latest(read_records(directory / RECORDS))
    manifest.require_finished(directory, records)
    summary = summarize_run(manifest, records)
    if not manifest.config.plain and summary.macro.tau is None:
        raise DataError(f"{directory} without a verify step", "a run of a speculating server", "leave it out")
    return MeasuredRun(name, manifest, records, summary)


def _names(directories: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as make the names unique."""
    parts = [directory.resolve().parts for directory in directories]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise DataError("a directory that is named twice", "each run once")
