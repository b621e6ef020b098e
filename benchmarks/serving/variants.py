"""Which block, drafter or setting is served fastest? Ask a profile, its variants and plain decoding in turns.

Servers that are measured one after the other differ also by what else the machine did, so they are asked in turns
(interleaved.py). Figures are medians over rounds. Ratios are medians of the ratios of each round.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from benchmarks.harness.config import ServerSettings
from benchmarks.harness.results import Measured, Report, StrictModel
from benchmarks.harness.server_info import ServerFacts
from benchmarks.harness.servers import Server, neighbours, serve
from benchmarks.reports.markdown import markdown_document, markdown_table, milliseconds, prompts_cell
from benchmarks.reports.numbers import number
from benchmarks.reports.text import broken_rows_text
from benchmarks.serving.interleaved import Agreement, Turns, TurnsConfig, median_of_all, up_and_paused
from benchmarks.stats.summary import ratio
from sglang_auf.env import ROW_INVARIANT

PLAIN, PROFILE, UNCONSTRAINED = "plain", "profile", "unconstrained"


class VariantsConfig(TurnsConfig):
    """A profile, the same with other settings, and plain decoding, asked in turns: which is served fastest here?"""

    variants: Annotated[tuple[ServerSettings, ...], Field(min_length=1)] = Field(
        alias="variant",
        description='the profile with other settings, as "block_size=6 drafter=DIR"; given once for each variant',
    )
    unconstrained: bool = Field(
        False,
        description="ask plain decoding without row-invariant products too, whose answers depend on the load: where it "
        "is quicker than plain decoding, it is what an accelerated server is compared with",
    )
    neighbours: int = Field(0, ge=0, description="processes that want a core each, beside the server that is asked")
    out: Path = Field(Path("runs/variants"), description="result directory; earlier results are replaced")


class ServerRow(StrictModel):
    """One server at one concurrency. settings: what differs from the profile. block_size, tau: None for plain decoding.

    tokens_per_s: median of `rounds`. tau: macro, over all rounds. step_s: seconds of a verify step or plain token,
    at concurrency 1 only. plain_tokens: agreement with plain decoding. over_fastest: of the quicker plain server in
    each round.
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
    over_fastest: float | None
    over_profile: float | None
    step_s: float | None
    step_over_plain: float | None
    plain_tokens: Agreement


class VariantsReport(Measured, Report):
    """variants.json."""

    STEM: ClassVar[str] = "variants"

    config: VariantsConfig
    tasks: list[str]
    broken_rows: list[str] = Field(default_factory=list)
    servers: dict[str, ServerFacts]
    rows: list[ServerRow]

    @property
    def passed(self) -> bool:
        """No request failed, no row was broken, and every answer of a server that promises it is plain decoding's."""
        return not self.broken_rows and all(
            not row.failed and (row.name == UNCONSTRAINED or row.plain_tokens.whole) for row in self.rows
        )

    def markdown(self) -> str:
        config = self.config
        rows = [["server", "block", "concurrency", "prompts", "tokens/s", "of plain", "of the profile", "tau"]]
        if config.unconstrained:
            rows[0].insert(-2, "of the quicker plain")
        rows[0] += ["step", "of plain's", "tokens of plain"]
        for row in self.rows:
            cells = [" ".join(row.settings) or row.name, str(row.block_size or "-"), str(row.concurrency)]
            cells += [prompts_cell(row.prompts, row.failed), number(row.tokens_per_s, 1)]
            plain = (row.over_plain, row.over_fastest) if config.unconstrained else (row.over_plain,)
            cells += map(number, (*plain, row.over_profile, row.tau))
            cells += [milliseconds(row.step_s), number(row.step_over_plain), row.plain_tokens.tokens_text()]
            rows.append(cells)
        beside = f"; {config.neighbours} busy processes beside each server" if config.neighbours else ""
        asked = (
            f"{config.profile_text}, temperature 0, at most {config.max_tokens} new tokens, {', '.join(self.tasks)}; "
            f"medians of {config.rounds} interleaved rounds. A step: a verify step with its drafting, or a token of "
            f"plain decoding{beside}"
        )
        return markdown_document(self, asked, markdown_table(rows), broken_rows_text(self.broken_rows))


def measure_variants(config: VariantsConfig) -> VariantsReport:
    """Start all servers, ask them in turns, stop them."""
    settings: dict[str, Sequence[str]] = {PLAIN: (), PROFILE: ()}
    if config.unconstrained:
        settings[UNCONSTRAINED] = ()
    settings |= {f"variant-{number}": variant for number, variant in enumerate(config.variants, start=1)}
    turns = Turns(config)
    started = up_and_paused(settings, lambda name, _: _starting(config, name, settings[name]))
    with started as (servers, facts), neighbours(config.neighbours):
        turns.ask(servers, plain=(PLAIN, UNCONSTRAINED))
    return VariantsReport(
        config=config,
        tasks=turns.tasks,
        broken_rows=turns.broken_rows,
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
        name in (PLAIN, UNCONSTRAINED),
        settings=[*config.server_settings, *settings],
        environment={ROW_INVARIANT.name: "0"} if name == UNCONSTRAINED else None,
        log_file=config.out / f"{name}-server.log",
        timeout_s=config.start_timeout_s,
    )


def _row(turns: Turns, name: str, settings: list[str], block_size: int | None, level: int) -> ServerRow:
    speeds, plain, profile = (turns.speeds(each, level) for each in (name, PLAIN, PROFILE))
    plains = [turns.speeds(each, level) for each in (PLAIN, UNCONSTRAINED) if (each, level) in turns.answers]
    fastest = [max(filter(None, of_round), default=None) for of_round in zip(*plains, strict=True)]
    steps = turns.step_seconds(name) if level == 1 else []
    plain_steps = turns.step_seconds(PLAIN) if level == 1 else []
    return ServerRow(
        name=name,
        settings=settings,
        block_size=block_size,
        concurrency=level,
        prompts=len(turns.answers[name, level][0]),
        failed=turns.failed(name, level),
        tau=turns.tau(name, level),
        tokens_per_s=median_of_all(speeds),
        rounds=speeds,
        over_plain=median_of_all(map(ratio, speeds, plain)),
        over_fastest=median_of_all(map(ratio, speeds, fastest)),
        over_profile=median_of_all(map(ratio, speeds, profile)),
        step_s=median_of_all(steps),
        step_over_plain=median_of_all(map(ratio, steps, plain_steps)),
        plain_tokens=turns.agreement(name, PLAIN, level),
    )
