"""Which block, drafter or setting is served fastest here: a profile, the same with other settings, and plain decoding.

In turns (turns.py), since servers measured one after the other differ by what else the machine did meanwhile. Figures
are medians over rounds; ratios are medians of the rounds' ratios.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from benchmarks.harness.config import VariantsConfig
from benchmarks.harness.results import Measured, StrictModel
from benchmarks.harness.server_info import ServerFacts
from benchmarks.harness.servers import Server, serve
from benchmarks.serving.interleaved import Agreement, Turns, median_of_all, up_and_paused
from benchmarks.stats.summary import macro, ratio, summarize_tasks

PLAIN, PROFILE = "plain", "profile"


class Row(StrictModel):
    """One server at one concurrency. settings: what differs from the profile; none of it, and no drafter: plain.

    tokens_per_s, step_s (seconds a verify step or plain token, at concurrency 1) and tau (macro, of the first round)
    are None where there are none; rounds: what tokens_per_s is the median of; plain_tokens: against plain decoding.
    """

    name: str
    settings: list[str]
    block_size: int | None
    concurrency: int
    prompts: int
    failed: int
    tau: float | None
    tokens_per_s: float | None
    rounds: list[float | None]
    over_plain: float | None
    over_profile: float | None
    step_s: float | None
    step_over_plain: float | None
    plain_tokens: Agreement


class VariantsReport(Measured):
    """variants.json."""

    config: VariantsConfig
    tasks: list[str]
    servers: dict[str, ServerFacts]
    rows: list[Row]

    @property
    def passed(self) -> bool:
        """No request failed, and every answer has plain decoding's tokens."""
        return all(not row.failed and row.plain_tokens.same_tokens == row.plain_tokens.compared for row in self.rows)


def measure_variants(config: VariantsConfig) -> VariantsReport:
    """Start all servers, ask them in turns, stop them."""
    settings: dict[str, Sequence[str]] = {PLAIN: (), PROFILE: ()}
    settings |= {f"variant-{number}": variant for number, variant in enumerate(config.variants, start=1)}
    turns = Turns(config)
    with up_and_paused(settings, lambda name, _: _starting(config, name, settings[name])) as (servers, facts):
        turns.ask(servers, plain=(PLAIN,))
    return VariantsReport(
        config=config,
        tasks=turns.tasks,
        servers=facts,
        rows=[
            _row(turns, name, list(settings[name]), facts[name].block_size, level)
            for level in turns.levels
            for name in settings
        ],
    )


def _starting(config: VariantsConfig, name: str, settings: Sequence[str]) -> AbstractContextManager[Server]:
    return serve(
        config.profile,
        name == PLAIN,
        settings=[*config.server_settings, *settings],
        log_file=config.out / f"{name}-server.log",
        timeout_s=config.start_timeout_s,
    )


def _row(turns: Turns, name: str, settings: list[str], block_size: int | None, level: int) -> Row:
    speeds, plain, profile = (turns.speeds(each, level) for each in (name, PLAIN, PROFILE))
    first = list(turns.answers[name, level][0].values())
    steps = turns.step_seconds(name) if level == 1 else []
    plain_steps = turns.step_seconds(PLAIN) if level == 1 else []
    return Row(
        name=name,
        settings=settings,
        block_size=block_size,
        concurrency=level,
        prompts=len(first),
        failed=turns.failed(name, level),
        tau=macro(summarize_tasks(first).values()).tau,
        tokens_per_s=median_of_all(speeds),
        rounds=speeds,
        over_plain=median_of_all(map(ratio, speeds, plain)),
        over_profile=median_of_all(map(ratio, speeds, profile)),
        step_s=median_of_all(steps),
        step_over_plain=median_of_all(map(ratio, steps, plain_steps)),
        plain_tokens=turns.agreement(name, PLAIN, level),
    )
