"""One server at several concurrencies, next to a plain one: what speculation gives as load grows.

Every level of a server is an ordinary run in a directory of its own; a finished level is not asked again. The two
servers are asked one after the other, never at once; where they share a machine, an idle one should take no CPU.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from benchmarks.harness.config import Questions, RunConfig, SweepConfig
from benchmarks.harness.manifest import RunManifest
from benchmarks.harness.results import Measured, StrictModel
from benchmarks.harness.run import Run
from benchmarks.harness.server_info import flush_cache
from benchmarks.harness.tasks import Selection, resolve, select
from benchmarks.stats.summary import RunSummary, ratio, summarize_run
from sglang_auf.errors import ConfigError

AUF, PLAIN = "auf", "plain"


AskedRun = tuple[RunSummary, RunManifest]


class SweepLevel(StrictModel):
    """One concurrency. plain, speedup: None without a plain server."""

    concurrency: int
    auf: RunSummary
    plain: RunSummary | None
    speedup: float | None


class Sweep(Measured):
    """sweep.json."""

    config: SweepConfig
    levels: list[SweepLevel]

    @property
    def failed(self) -> int:
        runs = [run for level in self.levels for run in (level.auf, level.plain) if run is not None]
        return sum(run.throughput.failed for run in runs)


def run_directory(out: Path, name: str, concurrency: int) -> Path:
    return out / f"{name}-c{concurrency}"


def measure_sweep(config: SweepConfig) -> Sweep:
    """Raises ConfigError when a level has more requests in flight than there are prompts, or old levels differ."""
    selections = [select(task, config.data_dir, config.limit) for task in resolve(config.tasks)]
    count = sum(len(chosen.prompts) for chosen in selections)
    levels = sorted(set(config.concurrency))
    if count < levels[-1]:
        raise ConfigError(
            f"{count} prompts and concurrency {levels[-1]}",
            "at least as many prompts as are to be in flight",
            "add --tasks, raise --limit, or lower --concurrency",
        )
    urls = {AUF: config.base_url} | ({PLAIN: config.plain_url} if config.plain_url else {})
    runs = [{name: _measured(config, url, name, level, selections) for name, url in urls.items()} for level in levels]
    origins = [(session.versions, session.machine) for run in runs for _, m in run.values() for session in m.sessions]
    if any(origin != origins[0] for origin in origins):
        raise ConfigError(
            f"levels in {config.out} that were measured with other versions or on another machine",
            "levels that compare",
            "give another --out: levels that are finished are not asked again",
        )
    return Sweep(
        config=config,
        levels=[_level(level, run) for level, run in zip(levels, runs, strict=True)],
        versions=origins[0][0],
        machine=origins[0][1],
    )


def _level(concurrency: int, runs: dict[str, AskedRun]) -> SweepLevel:
    auf, plain = runs[AUF][0], runs[PLAIN][0] if PLAIN in runs else None
    speeds = (auf.throughput.tokens_per_s, plain.throughput.tokens_per_s if plain else None)
    return SweepLevel(concurrency=concurrency, auf=auf, plain=plain, speedup=ratio(*speeds))


def _measured(config: SweepConfig, base_url: str, name: str, concurrency: int, selections: list[Selection]) -> AskedRun:
    prompts = [prompt for chosen in selections for prompt in chosen.prompts]
    run_config = RunConfig(
        **config.model_dump(include=set(Questions.model_fields)),
        base_url=base_url,
        plain=name == PLAIN,
        concurrency=concurrency,
        out=run_directory(config.out, name, concurrency),
    )
    run = Run.begin(run_config, selections, resume=True)
    if run.unfinished(prompts):
        asyncio.run(run.warm_up())
        run.open()
        flush_cache(base_url)
        asyncio.run(run.ask(prompts, f"{name} at {concurrency}"))
    run.require_tau()
    return summarize_run(run.manifest, list(run.records.values())), run.manifest
