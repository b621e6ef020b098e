"""AUF against plain decoding: the same prompts to both servers of one profile, on one machine, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from benchmarks.harness.config import RunConfig, ServedProfile, Workload
from benchmarks.harness.results import Measured, Report, StrictModel
from benchmarks.harness.run import BenchmarkRun, chosen_prompts, discard
from benchmarks.harness.servers import Server, awake, profile_content, serve
from benchmarks.harness.sources.prompt import Prompt
from benchmarks.harness.tasks import Selection
from benchmarks.reports.groups import groups_text
from benchmarks.reports.numbers import number
from benchmarks.reports.text import asked_text, broken_rows_text, decoding_text, speed_line, task_table, tau_text
from benchmarks.stats.lossless import Losslessness
from benchmarks.stats.lossless_check import LOGIT_SCALE, LogitScale, check_records
from benchmarks.stats.summary import (
    GroupedTask,
    MacroSummary,
    MicroSummary,
    TaskSummary,
    Throughput,
    macro,
    micro,
    ratio,
    summarize_groups,
    summarize_tasks,
    throughput,
)

Mode = Literal["interleaved", "sequential"]


class CompareConfig(ServedProfile, Workload):
    """Start the speculating and the plain server of one profile and ask both the same."""

    settings: tuple[str, ...] = Field((), alias="set", description="key=value for both servers; may be repeated")
    mode: Mode | None = Field(
        None,
        description="both servers up and asked in turns, or one after the other, for memory that holds one "
        "(default: interleaved; on a GPU sequential)",
    )
    rounds: int = Field(4, ge=1, description="turns each server gets when interleaved")
    stream: bool = Field(False, description="stream answers; the client then takes CPU from a server on this machine")
    logit_scale: LogitScale = LOGIT_SCALE
    start_timeout_s: float = Field(900.0, gt=0, description="seconds a server may take to be ready")
    out: Path = Field(Path("runs/demo"), description="result directory; results of an earlier comparison are replaced")


class Round(StrictModel):
    """Tokens per second of one turn each, on the same prompts."""

    plain: float | None
    auf: float | None
    speedup: float | None


class Comparison(Measured, Report):
    """summary.json. lossless is None when the answers were sampled (temperature above 0)."""

    STEM: ClassVar[str] = "summary"

    target: str
    drafter: str | None
    block_size: int | None
    algorithm: str | None
    device: str | None
    config: CompareConfig
    tasks: dict[str, TaskSummary]
    groups: dict[str, GroupedTask] = Field(default_factory=dict)
    without_group: list[str] = Field(default_factory=list)
    macro: MacroSummary
    micro: MicroSummary
    plain: Throughput
    auf: Throughput
    speedup: float | None
    rounds: list[Round]
    lossless: Losslessness | None
    broken_rows: list[str] = Field(default_factory=list)

    @property
    def failed(self) -> int:
        return self.plain.failed + self.auf.failed

    @property
    def passed(self) -> bool:
        return not self.failed and not self.broken_rows and (self.lossless is None or self.lossless.passed)

    def text(self) -> str:
        config = self.config
        lines = [speed_line("plain", self.plain), speed_line("AUF", self.auf)]
        if self.speedup is not None:
            rounds = ", ".join(number(part.speedup) for part in self.rounds)
            lines.append(f"speed-up    {self.speedup:.2f} at concurrency {config.concurrency} (by round: {rounds})")
        parts = [
            asked_text(
                self.target, decoding_text(self.drafter, self.block_size), config.temperature, config.max_tokens
            ),
            task_table(self.tasks),
            tau_text(self.tasks, self.macro, self.micro),
            groups_text(self.groups, self.without_group),
            "\n".join(lines),
        ]
        if self.lossless is not None:
            parts.append(self.lossless.text())
        return "\n\n".join(filter(None, [*parts, broken_rows_text(self.broken_rows)]))


def compare_servers(config: CompareConfig) -> Comparison:
    """Start both servers, ask them, compare their answers, and stop them."""
    selections = chosen_prompts(config, config.group_by)
    for name in ("auf", "plain"):
        discard(config.out / name)
    (config.out / f"{Comparison.STEM}.json").unlink(missing_ok=True)
    measure = _interleaved if mode_of(config) == "interleaved" else _one_after_the_other
    return measure(config, selections)


def mode_of(config: CompareConfig) -> Mode:
    """The mode that is asked for, or the one that suits the profile's device."""
    on_gpu = profile_content(config.profile, config.settings).get("device") == "cuda"
    return config.mode or ("sequential" if on_gpu else "interleaved")


def _interleaved(config: CompareConfig, selections: list[Selection]) -> Comparison:
    """Both servers are up, one of them paused, so that slow drifts of the machine affect both alike."""
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
            for round_number, part in enumerate(slices):
                turns = [(auf, auf_server), (plain, plain_server)]
                for run, server in turns if round_number % 2 == 0 else reversed(turns):
                    with awake(server):
                        _ask(run, part, f"round {round_number + 1}/{len(slices)}")
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


def _begin(config: CompareConfig, server: Server, selections: list[Selection], plain: bool) -> BenchmarkRun:
    workload = config.model_dump(include=set(Workload.model_fields))
    run_config = RunConfig(
        **workload, base_url=server.base_url, plain=plain, stream=config.stream, out=config.out / _name(plain)
    )
    run = BenchmarkRun.begin(run_config, selections)
    run.prepare()
    return run


def _ask(run: BenchmarkRun, prompts: Sequence[Prompt], label: str) -> None:
    run.ask(prompts, f"{_name(run.config.plain)} {label}")


def _conclude(
    config: CompareConfig, auf: BenchmarkRun, plain: BenchmarkRun, slices: Sequence[Sequence[Prompt]]
) -> Comparison:
    """Figures of both runs. The plain server must be up: it is asked about answers that differ."""
    auf.require_tau()
    plain.require_tau()
    ours, theirs = list(auf.records.values()), list(plain.records.values())
    lossless = None
    if config.temperature == 0:
        lossless = check_records(ours, theirs, plain.manifest.server, plain.config.base_url, config.logit_scale)
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
        groups=summarize_groups(ours),
        without_group=auf.manifest.without_group,
        macro=macro(tasks.values(), ours),
        micro=micro(ours),
        plain=plain_speed,
        auf=auf_speed,
        speedup=ratio(auf_speed.tokens_per_s, plain_speed.tokens_per_s),
        rounds=[_round(auf, plain, part) for part in slices],
        lossless=lossless,
        broken_rows=auf.manifest.broken_rows,
    )


def _round(auf: BenchmarkRun, plain: BenchmarkRun, prompts: Sequence[Prompt]) -> Round:
    asked = {(prompt.task, prompt.id) for prompt in prompts}
    speeds = [
        throughput([record for key, record in run.records.items() if key[:2] in asked], run.config.concurrency)
        for run in (plain, auf)
    ]
    plain_speed, auf_speed = (speed.tokens_per_s for speed in speeds)
    return Round(plain=plain_speed, auf=auf_speed, speedup=ratio(auf_speed, plain_speed))


def _name(plain: bool) -> str:
    return "plain" if plain else "auf"
