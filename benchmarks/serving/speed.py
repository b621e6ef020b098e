"""Ask AUF, plain decoding and SGLang's built-in DFLASH in turns (interleaved.py).

Figures are medians over rounds. Ratios are medians of the ratios of each round.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, TypeAdapter

from benchmarks.harness.config import Counts
from benchmarks.harness.results import Measured, Report, StrictModel
from benchmarks.harness.server_info import ServerFacts
from benchmarks.harness.servers import Server, launch, profile_content, serve, split_settings
from benchmarks.reports.markdown import markdown_document, markdown_table, milliseconds, prompts_cell
from benchmarks.reports.numbers import number
from benchmarks.reports.text import broken_rows_text
from benchmarks.serving.interleaved import Agreement, Turns, TurnsConfig, median_of_all, up_and_paused
from benchmarks.stats.summary import ratio
from sglang_auf.settings import Thinking, enable_thinking

AUF, PLAIN, DFLASH = "auf", "plain", "dflash"
NAMES = {AUF: "AUF", PLAIN: "plain", DFLASH: "DFLASH"}


class SpeedConfig(TurnsConfig):
    """AUF, plain decoding and SGLang's built-in DFLASH with the same drafter, asked in turns."""

    concurrency: Counts = Field((1, 4, 16), description="comma-separated numbers of requests in flight")
    out: Path = Field(Path("runs/speed"), description="result directory; earlier results are replaced")


class SpeedLevel(StrictModel):
    """One concurrency. tokens_per_s: medians of `rounds`; tau: macro, over all rounds."""

    concurrency: int
    prompts: int
    tokens_per_s: dict[str, float | None]
    rounds: dict[str, list[float | None]]
    auf_over_plain: float | None
    auf_over_dflash: float | None
    tau: dict[str, float | None]
    auf_and_dflash: Agreement
    auf_and_plain: Agreement
    failed: int


class StepCost(StrictModel):
    """Seconds, medians over rounds. ratio: median of AUF / plain of each round."""

    auf_s: float | None
    dflash_s: float | None
    plain_s: float | None
    ratio: float | None


class SpeedReport(Measured, Report):
    """speed.json. step_cost: None unless concurrency 1 was asked for."""

    STEM: ClassVar[str] = "speed"

    config: SpeedConfig
    tasks: list[str]
    broken_rows: list[str] = Field(default_factory=list)
    servers: dict[str, ServerFacts]
    levels: list[SpeedLevel]
    step_cost: StepCost | None

    @property
    def passed(self) -> bool:
        """No request failed, no row was broken, and AUF's answers are plain decoding's where a CPU promises it."""
        exact = self.servers[AUF].device == "cpu"
        return not self.broken_rows and not any(
            level.failed or (exact and not level.auf_and_plain.whole) for level in self.levels
        )

    def markdown(self) -> str:
        config, auf = self.config, self.servers[AUF]
        rows = [["concurrency", "prompts", *(f"{name} tokens/s" for name in NAMES.values())]]
        rows[0] += ["AUF / plain", "AUF / DFLASH", "tau AUF", "tau DFLASH"]
        for level in self.levels:
            speeds = [number(level.tokens_per_s[name], 1) for name in NAMES]
            ratios = [level.auf_over_plain, level.auf_over_dflash, level.tau[AUF], level.tau[DFLASH]]
            prompts = prompts_cell(level.prompts, level.failed)
            rows.append([str(level.concurrency), prompts, *speeds, *map(number, ratios)])
        asked = (
            f"{config.profile_text} ({auf.device}, block {auf.block_size}), temperature 0, at most {config.max_tokens} "
            f"new tokens, {', '.join(self.tasks)}; medians of {config.rounds} interleaved rounds"
        )
        lines = [
            f"- at concurrency {level.concurrency}: AUF gave the tokens of DFLASH in "
            f"{level.auf_and_dflash.tokens_text()} answers, its accepted histogram in "
            f"{level.auf_and_dflash.same_histogram}, and the tokens of plain in {level.auf_and_plain.tokens_text()}"
            for level in self.levels
        ]
        if (cost := self.step_cost) is not None:
            lines.append(
                f"- step cost at concurrency 1: AUF {milliseconds(cost.auf_s)} a verify step, DFLASH "
                f"{milliseconds(cost.dflash_s)}, plain {milliseconds(cost.plain_s)} a token; AUF / plain "
                f"{number(cost.ratio)}"
            )
        return markdown_document(
            self, asked, markdown_table(rows), "\n".join(lines), broken_rows_text(self.broken_rows)
        )


def measure_speed(config: SpeedConfig) -> SpeedReport:
    """Start three servers, ask them in turns, stop them."""
    turns = Turns(config)
    with up_and_paused(NAMES, lambda name, facts: _starting(config, name, facts)) as (servers, facts):
        turns.ask(servers, plain=(PLAIN,))
    return SpeedReport(
        config=config,
        tasks=turns.tasks,
        broken_rows=turns.broken_rows,
        servers=facts,
        levels=[_level(turns, level) for level in turns.levels],
        step_cost=_step_cost(turns) if 1 in turns.levels else None,
    )


def _starting(config: SpeedConfig, name: str, facts: Mapping[str, ServerFacts]) -> AbstractContextManager[Server]:
    settings, log_file, timeout_s = config.server_settings, config.out / f"{name}-server.log", config.start_timeout_s
    if name != DFLASH:
        return serve(config.profile, name == PLAIN, settings=settings, log_file=log_file, timeout_s=timeout_s)
    _, variables = split_settings(settings)
    program = dflash_program(facts[AUF], profile_content(config.profile, settings))
    return launch(program, environment=variables, log_file=log_file, timeout_s=timeout_s)


def dflash_program(auf: ServerFacts, profile: Mapping[str, Any]) -> list[str]:
    """SGLang's own server with what a running AUF server of a profile has: models, block, overlap, server arguments."""
    thinking = enable_thinking(TypeAdapter(Thinking).validate_python(profile.get("thinking")))
    arguments: dict[str, Any] = {
        "model_path": auf.target,
        "revision": auf.revision,
        "device": auf.device,
        "dtype": auf.dtype and auf.dtype.removeprefix("torch."),
        "speculative_algorithm": "DFLASH",
        "speculative_draft_model_path": auf.drafter,
        "speculative_num_draft_tokens": auf.block_size,
        "default_chat_template_kwargs": None if thinking is None else {"enable_thinking": thinking},
        **(profile.get("server_args") or {}),
        "disable_overlap_schedule": not auf.overlap,
    }
    program = ["-m", "sglang.launch_server"]
    for name, value in arguments.items():
        if value is None or value is False:
            continue
        program.append("--" + name.replace("_", "-"))
        if isinstance(value, dict):
            program.append(json.dumps(value))
        elif value is not True:
            program += map(str, value if isinstance(value, list) else [value])
    return program


def _level(turns: Turns, concurrency: int) -> SpeedLevel:
    rounds = {name: turns.speeds(name, concurrency) for name in NAMES}
    return SpeedLevel(
        concurrency=concurrency,
        prompts=len(turns.answers[AUF, concurrency][0]),
        tokens_per_s={name: median_of_all(speeds) for name, speeds in rounds.items()},
        rounds=rounds,
        auf_over_plain=median_of_all(map(ratio, rounds[AUF], rounds[PLAIN])),
        auf_over_dflash=median_of_all(map(ratio, rounds[AUF], rounds[DFLASH])),
        tau={name: turns.tau(name, concurrency) for name in NAMES},
        auf_and_dflash=turns.agreement(AUF, DFLASH, concurrency),
        auf_and_plain=turns.agreement(AUF, PLAIN, concurrency),
        failed=sum(turns.failed(name, concurrency) for name in NAMES),
    )


def _step_cost(turns: Turns) -> StepCost:
    seconds = {name: turns.step_seconds(name) for name in NAMES}
    return StepCost(
        auf_s=median_of_all(seconds[AUF]),
        dflash_s=median_of_all(seconds[DFLASH]),
        plain_s=median_of_all(seconds[PLAIN]),
        ratio=median_of_all(map(ratio, seconds[AUF], seconds[PLAIN])),
    )
