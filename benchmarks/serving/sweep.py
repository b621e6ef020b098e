"""Ask one server, and a plain one beside it, at several concurrencies or rates: what speculation gains as load grows.

Each level of a server is an ordinary run with its own directory. A finished one is not asked again. The two
servers are asked one after the other, never at once; where they share a machine, an idle one should take no CPU.
SGLang's bench_serving and guidellm measure latency under load too, but not tau.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, model_validator

from benchmarks.harness.config import Counts, Questions, Rates, RunConfig, ServerUrl
from benchmarks.harness.manifest import RunManifest
from benchmarks.harness.results import Measured, Report, StrictModel
from benchmarks.harness.run import ask, chosen_prompts
from benchmarks.harness.tasks import Selection
from benchmarks.reports.groups import group_sections
from benchmarks.reports.markdown import markdown_document, markdown_table, prompts_cell
from benchmarks.reports.numbers import number, percent
from benchmarks.reports.text import OPEN_LOOP, broken_rows_text, interrupted_text, load_text, percentiles
from benchmarks.stats.summary import RunSummary, ratio, summarize_run
from sglang_auf.errors import ConfigError

AUF, PLAIN = "auf", "plain"

AskedRun = tuple[RunSummary, RunManifest]


class SweepConfig(Questions):
    """One server at several concurrencies, and a plain one beside it: speed-up, time to first token, time per token."""

    base_url: ServerUrl = Field(description="the speculating server")
    plain_url: ServerUrl | None = Field(None, description="a plain server of the same target, for the speed-up")
    concurrency: Counts = Field((1, 2, 4, 8, 16, 32), description="comma-separated numbers of requests in flight")
    rate: Rates = Field(
        (),
        description="comma-separated requests a second: levels of an open loop, as with run --rate, where "
        "--concurrency is one number, the most in flight",
    )
    out: Path = Field(Path("runs/sweep"), description="result directory; levels that are finished in it are kept")

    @model_validator(mode="after")
    def _rates_have_one_cap(self) -> Self:
        if self.rate and ("concurrency" not in self.model_fields_set or len(self.concurrency) > 1):
            raise ValueError("--rate without a single --concurrency, the most requests that may be in flight")
        return self


class SweepLevel(StrictModel):
    """One concurrency, or a rate with the most in flight. plain: None without a plain server.

    speedup: None without one, and at a rate, where both servers give the tokens that are asked for.
    """

    concurrency: int
    rate: float | None = None
    auf: RunSummary
    plain: RunSummary | None
    speedup: float | None

    @property
    def name(self) -> str:
        return str(self.concurrency) if self.rate is None else f"{self.rate:g}/s"

    @property
    def runs(self) -> list[RunSummary]:
        return [run for run in (self.auf, self.plain) if run is not None]


class Sweep(Measured, Report):
    """sweep.json."""

    STEM: ClassVar[str] = "sweep"

    config: SweepConfig
    levels: list[SweepLevel]

    @property
    def passed(self) -> bool:
        return not self.broken_rows and not any(run.throughput.failed for level in self.levels for run in level.runs)

    @property
    def broken_rows(self) -> list[str]:
        return self.levels[0].auf.broken_rows

    def markdown(self) -> str:
        config, first = self.config, self.levels[0].auf
        speculating = "AUF" if first.vllm is None else "vLLM"
        names = [speculating, "plain"] if config.plain_url else [speculating]
        opened = any(level.rate is not None for level in self.levels)
        compared = config.plain_url and not opened
        cached = any(run.throughput.cached_share is not None for level in self.levels for run in level.runs)
        rows = [["requests/s" if opened else "concurrency", "requests", "tau"]]
        rows[0] += [*(f"{name} tokens/s" for name in names), *(["speed-up"] if compared else [])]
        times = ["TTFT", "ITL", *(["latency", "waited"] if opened else [])]
        rows[0] += [f"{name} {time} p50 / p90 / p99 ms" for time in times for name in names]
        rows[0] += [f"{name} cached" for name in names if cached]
        for level in self.levels:
            failed = sum(run.throughput.failed for run in level.runs)
            cells = [level.name, prompts_cell(level.auf.throughput.requests, failed), number(level.auf.macro.tau)]
            cells += [number(run.throughput.tokens_per_s, 1) for run in level.runs]
            cells += [number(level.speedup)] if compared else []
            cells += [percentiles(getattr(run.latency, time.lower())) for time in times for run in level.runs]
            cells += [percent(run.throughput.cached_share) for run in level.runs if cached]
            rows.append(cells)
        device = first.device if first.vllm is None else f"vLLM {first.vllm}"
        asked = (
            f"{first.target} ({device}, block {first.block_size}), temperature {config.temperature:g}, at most "
            f"{config.max_tokens} new tokens, {', '.join(first.tasks)}, streamed"
        )
        asked += f"; at most {config.concurrency[0]} in flight. {OPEN_LOOP}" if opened else ""
        note = "ITL: time between the tokens of one answer after its first, its mean; a block's tokens arrive together."
        if compared:
            note += (
                " Answers are streamed: where the client shares the server's machine, its work for each chunk (a token "
                "of plain decoding, a verify step) raises the speed-up. `compare` and `speed` do not."
            )
        sessions = {
            f"{name} at {level.name}": run.sessions
            for level in self.levels
            for name, run in zip(names, level.runs, strict=True)
        }
        parts = [markdown_table(rows), interrupted_text(sessions), note]
        for section in group_sections({f"{speculating} at {level.name}": level.auf for level in self.levels}):
            parts += [section.text.replace("\n", "\n\n"), markdown_table(section.table or [])]
        return markdown_document(self, asked, *parts, broken_rows_text(self.broken_rows))


def measure_sweep(config: SweepConfig) -> Sweep:
    """Raises ConfigError where a level has more requests in flight than prompts, or where finished levels differ."""
    selections = chosen_prompts(config, config.group_by)
    count = sum(len(chosen.prompts) for chosen in selections)
    most = max(config.concurrency)
    if count < most and not config.rate:
        raise ConfigError(
            f"{count} prompts and concurrency {most}",
            "at least as many prompts as are to be in flight",
            "add --tasks, raise --limit, or lower --concurrency",
        )
    levels: list[tuple[int, float | None]] = [(most, rate) for rate in sorted(set(config.rate))]
    levels = levels or [(count, None) for count in sorted(set(config.concurrency))]
    urls = {AUF: config.base_url} | ({PLAIN: config.plain_url} if config.plain_url else {})
    runs = [{name: _asked(config, url, name, *level, selections) for name, url in urls.items()} for level in levels]
    origins = [(session.versions, session.machine) for run in runs for _, m in run.values() for session in m.sessions]
    if any(origin != origins[0] for origin in origins):
        raise ConfigError(
            f"levels in {config.out} that were measured with other versions or on another machine",
            "levels that compare",
            "give another --out: levels that are finished are not asked again",
        )
    measured = [_level(*level, run) for level, run in zip(levels, runs, strict=True)]
    _require_same_servers(measured, config.out)
    return Sweep(
        config=config,
        levels=measured,
        versions=origins[0][0],
        machine=origins[0][1],
    )


def _level(concurrency: int, rate: float | None, runs: dict[str, AskedRun]) -> SweepLevel:
    auf, plain = runs[AUF][0], runs[PLAIN][0] if PLAIN in runs else None
    speeds = (auf.throughput.tokens_per_s, plain.throughput.tokens_per_s if plain and rate is None else None)
    return SweepLevel(concurrency=concurrency, rate=rate, auf=auf, plain=plain, speedup=ratio(*speeds))


def _require_same_servers(levels: Sequence[SweepLevel], out: Path) -> None:
    """Raises ConfigError for levels whose drafts are of other lengths, or whose two servers are of other engines.

    vLLM tells the number of its drafts in its replies alone.
    """
    if len(blocks := sorted({level.auf.block_size or 0 for level in levels})) > 1:
        raise ConfigError(
            f"levels in {out} with blocks of {blocks}",
            "one server for all levels",
            "give another --out: levels that are finished are not asked again",
        )
    engines = {(run.sglang, run.vllm) for level in levels for run in level.runs}
    if len(engines) > 1:
        named = sorted(f"SGLang {sglang}" if vllm is None else f"vLLM {vllm}" for sglang, vllm in engines)
        raise ConfigError(
            f"servers of {' and '.join(named)}",
            "--plain-url of the same engine, so that the speed-up is that of speculative decoding",
            "sweep each alone, and put them side by side with python -m benchmarks report",
        )


def _asked(
    config: SweepConfig, base_url: str, name: str, concurrency: int, rate: float | None, selections: list[Selection]
) -> AskedRun:
    run_config = RunConfig(
        **config.model_dump(include=set(Questions.model_fields)),
        base_url=base_url,
        plain=name == PLAIN,
        concurrency=concurrency,
        rate=rate,
        empty_cache=True,
        out=config.out / (f"{name}-c{concurrency}" if rate is None else f"{name}-r{rate:g}-c{concurrency}"),
    )
    run = ask(run_config, selections, f"{name} at {load_text(concurrency, rate)}", resume=True)
    return summarize_run(run.manifest, list(run.records.values())), run.manifest
