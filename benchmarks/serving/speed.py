"""AUF, plain decoding and SGLang's built-in DFLASH in turns (turns.py).

Figures are medians over rounds; ratios are medians of the rounds' ratios.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import yaml

from benchmarks.harness.config import SpeedConfig
from benchmarks.harness.results import Measured, StrictModel
from benchmarks.harness.server_info import ServerFacts
from benchmarks.harness.servers import Server, launch, serve
from benchmarks.serving.interleaved import Agreement, Turns, median_of_all, up_and_paused
from benchmarks.stats.summary import macro, ratio, summarize_tasks

AUF, PLAIN, DFLASH = "auf", "plain", "dflash"
NAMES = (AUF, PLAIN, DFLASH)
SERVER_ARGS = "server_args."


class Level(StrictModel):
    """One concurrency. tokens_per_s: medians; rounds: what they are of; tau: macro, of the first round."""

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
    """Seconds; medians over rounds. ratio: median of the rounds' AUF / plain."""

    auf_s: float | None
    dflash_s: float | None
    plain_s: float | None
    ratio: float | None


class SpeedReport(Measured):
    """speed.json. step_cost: None unless concurrency 1 was asked for."""

    config: SpeedConfig
    tasks: list[str]
    servers: dict[str, ServerFacts]
    levels: list[Level]
    step_cost: StepCost | None

    @property
    def failed(self) -> int:
        return sum(level.failed for level in self.levels)


def measure_speed(config: SpeedConfig) -> SpeedReport:
    """Start three servers, ask them in turns, stop them."""
    turns = Turns(config)
    with up_and_paused(NAMES, lambda name, facts: _starting(config, name, facts)) as (servers, facts):
        turns.ask(servers, plain=(PLAIN,))
    return SpeedReport(
        config=config,
        tasks=turns.tasks,
        servers=facts,
        levels=[_level(turns, level) for level in turns.levels],
        step_cost=_step_cost(turns) if 1 in turns.levels else None,
    )


def _starting(config: SpeedConfig, name: str, facts: Mapping[str, ServerFacts]) -> AbstractContextManager[Server]:
    settings, log_file, timeout_s = config.server_settings, config.out / f"{name}-server.log", config.start_timeout_s
    if name != DFLASH:
        return serve(config.profile, name == PLAIN, settings=settings, log_file=log_file, timeout_s=timeout_s)
    return launch(dflash_program(facts[AUF], settings), log_file=log_file, timeout_s=timeout_s)


def dflash_program(auf: ServerFacts, settings: Sequence[str]) -> list[str]:
    """SGLang's own server with the models, block and server arguments of a running AUF server.

    Of the settings, server_args.* become its flags; the others are in the facts already, or each request says them.
    Overlap is off, as AUF has it on a CPU, and metrics are on, as the profiles have them.
    """
    arguments: dict[str, Any] = {
        "model_path": auf.target,
        "device": auf.device,
        "dtype": auf.dtype.removeprefix("torch."),
        "speculative_algorithm": "DFLASH",
        "speculative_draft_model_path": auf.drafter,
        "speculative_num_draft_tokens": auf.block_size,
        "disable_overlap_schedule": True,
        "enable_metrics": True,
    }
    for setting in settings:
        key, _, value = setting.partition("=")
        if key.startswith(SERVER_ARGS):
            arguments[key.removeprefix(SERVER_ARGS)] = yaml.safe_load(value)
    program = ["-m", "sglang.launch_server"]
    for name, value in arguments.items():
        if value is None or value is False:
            continue
        program.append("--" + name.replace("_", "-"))
        if value is not True:
            program += map(str, value if isinstance(value, list) else [value])
    return program


def _level(turns: Turns, concurrency: int) -> Level:
    rounds = {name: turns.speeds(name, concurrency) for name in NAMES}
    first = {name: list(turns.answers[name, concurrency][0].values()) for name in NAMES}
    return Level(
        concurrency=concurrency,
        prompts=len(first[AUF]),
        tokens_per_s={name: median_of_all(speeds) for name, speeds in rounds.items()},
        rounds=rounds,
        auf_over_plain=median_of_all(map(ratio, rounds[AUF], rounds[PLAIN])),
        auf_over_dflash=median_of_all(map(ratio, rounds[AUF], rounds[DFLASH])),
        tau={name: macro(summarize_tasks(records).values()).tau for name, records in first.items()},
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
