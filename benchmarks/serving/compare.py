"""AUF against plain decoding: the same prompts to both servers of one profile, on one machine, in one call."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AbstractContextManager

from benchmarks.harness.config import CompareConfig, LosslessConfig, RunConfig, Workload
from benchmarks.harness.results import Measured, StrictModel
from benchmarks.harness.run import Run, discard, start
from benchmarks.harness.servers import Server, awake, serve
from benchmarks.harness.tasks import Prompt, Selection, resolve, select
from benchmarks.stats.lossless import Losslessness
from benchmarks.stats.lossless_check import check_records
from benchmarks.stats.summary import (
    MacroSummary,
    MicroSummary,
    TaskSummary,
    Throughput,
    macro,
    micro,
    ratio,
    summarize_tasks,
    throughput,
)

SUMMARY = "summary.json"


class Round(StrictModel):
    """Tokens per second of one turn each, on the same prompts."""

    plain: float | None
    auf: float | None
    speedup: float | None


class Comparison(Measured):
    """summary.json. lossless is None when the answers were sampled (temperature above 0)."""

    target: str
    drafter: str | None
    block_size: int | None
    algorithm: str | None
    device: str
    config: CompareConfig
    tasks: dict[str, TaskSummary]
    macro: MacroSummary
    micro: MicroSummary
    plain: Throughput
    auf: Throughput
    speedup: float | None
    rounds: list[Round]
    lossless: Losslessness | None

    @property
    def failed(self) -> int:
        return self.plain.failed + self.auf.failed

    @property
    def passed(self) -> bool:
        return not self.failed and (self.lossless is None or self.lossless.passed)


def compare_servers(config: CompareConfig) -> Comparison:
    """Start, ask, compare, stop, and write summary.json."""
    selections = [select(task, config.data_dir, config.limit) for task in resolve(config.tasks)]
    for name in ("auf", "plain"):
        discard(config.out / name)
    (config.out / SUMMARY).unlink(missing_ok=True)
    measure = _interleaved if config.mode == "interleaved" else _one_after_the_other
    comparison = measure(config, selections)
    (config.out / SUMMARY).write_text(comparison.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return comparison


def _interleaved(config: CompareConfig, selections: list[Selection]) -> Comparison:
    """Both servers up, one of them paused: slow drifts of the machine meet both alike."""
    prompts = [prompt for chosen in selections for prompt in chosen.prompts]
    slices = [part for number in range(config.rounds) if (part := prompts[number :: config.rounds])]
    with _serve(config, plain=False) as auf_server:
        auf_server.pause()
        with _serve(config, plain=True) as plain_server:
            plain_server.pause()
            with awake(auf_server):
                auf = _begin(config, auf_server, selections, plain=False)
            with awake(plain_server):
                plain = _begin(config, plain_server, selections, plain=True)
            for number, part in enumerate(slices):
                turns = [(auf, auf_server), (plain, plain_server)]
                for run, server in turns if number % 2 == 0 else reversed(turns):
                    with awake(server):
                        _ask(run, part, f"round {number + 1}/{len(slices)}")
            with awake(plain_server):
                return _conclude(config, auf, plain, slices)


def _one_after_the_other(config: CompareConfig, selections: list[Selection]) -> Comparison:
    """For a machine whose memory holds one server."""
    prompts = [prompt for chosen in selections for prompt in chosen.prompts]
    with _serve(config, plain=False) as server:
        auf = _begin(config, server, selections, plain=False)
        _ask(auf, prompts, "all")
    with _serve(config, plain=True) as server:
        plain = _begin(config, server, selections, plain=True)
        _ask(plain, prompts, "all")
        return _conclude(config, auf, plain, [prompts])


def _serve(config: CompareConfig, plain: bool) -> AbstractContextManager[Server]:
    return serve(
        config.profile,
        plain,
        settings=config.settings,
        log_file=config.out / f"{_name(plain)}-server.log",
        timeout_s=config.start_timeout_s,
    )


def _begin(config: CompareConfig, server: Server, selections: list[Selection], plain: bool) -> Run:
    workload = config.model_dump(include=set(Workload.model_fields))
    run_config = RunConfig(
        **workload, base_url=server.base_url, plain=plain, stream=config.stream, out=config.out / _name(plain)
    )
    return start(run_config, selections)


def _ask(run: Run, prompts: Sequence[Prompt], label: str) -> None:
    asyncio.run(run.ask(prompts, f"{_name(run.config.plain)} {label}"))


def _conclude(config: CompareConfig, auf: Run, plain: Run, slices: Sequence[Sequence[Prompt]]) -> Comparison:
    """Figures of both runs; the plain server must be up, to be asked about forks."""
    auf.require_tau()
    plain.require_tau()
    ours, theirs = list(auf.records.values()), list(plain.records.values())
    lossless = None
    if config.temperature == 0:
        scale = LosslessConfig.model_fields["logit_scale"].default
        lossless = check_records(ours, theirs, plain.manifest.server, plain.config.base_url, scale)
    facts, tasks = auf.manifest.server, summarize_tasks(ours)
    plain_speed, auf_speed = throughput(theirs, config.concurrency), throughput(ours, config.concurrency)
    return Comparison(
        target=facts.model,
        drafter=facts.drafter,
        block_size=facts.block_size,
        algorithm=facts.algorithm,
        device=facts.device,
        config=config,
        tasks=tasks,
        macro=macro(tasks.values(), ours),
        micro=micro(ours),
        plain=plain_speed,
        auf=auf_speed,
        speedup=ratio(auf_speed.tokens_per_s, plain_speed.tokens_per_s),
        rounds=[_round(auf, plain, part) for part in slices],
        lossless=lossless,
    )


def _round(auf: Run, plain: Run, prompts: Sequence[Prompt]) -> Round:
    asked = {(prompt.task, prompt.id) for prompt in prompts}
    speeds = [
        throughput([record for key, record in run.records.items() if key[:2] in asked], run.config.concurrency)
        for run in (plain, auf)
    ]
    plain_speed, auf_speed = (speed.tokens_per_s for speed in speeds)
    return Round(plain=plain_speed, auf=auf_speed, speedup=ratio(auf_speed, plain_speed))


def _name(plain: bool) -> str:
    return "plain" if plain else "auf"
