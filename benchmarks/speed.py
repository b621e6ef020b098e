"""AUF, plain decoding and SGLang's built-in DFLASH, interleaved: all three up, all but one paused.

Every server is asked the same greedy prompts in every round, at every concurrency, after its prefix cache was emptied;
who goes first changes with the round. Figures are medians over rounds; ratios are medians of the rounds' ratios.

Step cost, at concurrency 1: (latency - latency of the same prompt with one new token) / steps, sums over prompts. A
step is a verify step, with its drafting, or a token of plain decoding. Not streamed: the client would take CPU for
every chunk, and the servers send different numbers of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from benchmarks import provenance
from benchmarks.config import RunConfig, SpeedConfig
from benchmarks.lossless import comparable_tokens
from benchmarks.native import ServerFacts, flush_cache, server_facts
from benchmarks.records import Key, Record
from benchmarks.run import discard, start
from benchmarks.servers import Server, awake, launch, serve
from benchmarks.summary import macro, ratio, summarize_tasks, throughput
from benchmarks.tasks import Prompt, Selection, first_turns, in_turn, keep, resolve, select
from sglang_auf.errors import ConfigError

log = logging.getLogger(__name__)

AUF, PLAIN, DFLASH = "auf", "plain", "dflash"
SERVER_ARGS = "server_args."

Records = dict[Key, Record]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Agreement(_Model):
    """Of the answers that two servers both gave, over all rounds: equal tokens, equal histograms of accepted drafts."""

    compared: int
    same_tokens: int
    same_histogram: int


class Level(_Model):
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


class StepCost(_Model):
    """Seconds; medians over rounds. ratio: median of the rounds' AUF / plain."""

    auf_s: float | None
    dflash_s: float | None
    plain_s: float | None
    ratio: float | None


class SpeedReport(_Model):
    """speed.json. step_cost: None unless concurrency 1 was asked for."""

    config: SpeedConfig
    tasks: list[str]
    servers: dict[str, ServerFacts]
    levels: list[Level]
    step_cost: StepCost | None
    versions: dict[str, str | None]
    machine: dict[str, Any]
    command: list[str]

    @property
    def failed(self) -> int:
        return sum(level.failed for level in self.levels)


def measure_speed(config: SpeedConfig) -> SpeedReport:
    """Start three servers, ask them in turns, stop them."""
    selections = _selections(config)
    everything = in_turn(selections)
    levels = list(dict.fromkeys(config.concurrency))
    if len(everything) < max(levels):
        raise ConfigError(
            f"{len(everything)} prompts and concurrency {max(levels)}",
            "at least as many prompts as are to be in flight",
            "add --tasks, or lower --concurrency",
        )
    prompts = {level: everything[: max(config.limit, level)] for level in levels}
    asked: dict[tuple[str, int], list[Records]] = {
        (name, level): [] for name in (AUF, PLAIN, DFLASH) for level in levels
    }
    prefill: dict[str, list[Records]] = {AUF: [], PLAIN: [], DFLASH: []}
    with _servers(config) as (servers, facts):
        names = list(servers)
        for number in range(config.rounds):
            order = names[number % len(names) :] + names[: number % len(names)]
            for level in levels:
                for name in order:
                    with awake(servers[name]):
                        turn = Turn(config, name, servers[name].base_url, number, level)
                        if level == 1:
                            prefill[name].append(turn.ask(selections, prompts[level], max_tokens=1))
                        asked[name, level].append(turn.ask(selections, prompts[level], config.max_tokens))
    return SpeedReport(
        config=config,
        tasks=[chosen.task.name for chosen in selections],
        servers=facts,
        levels=[_level(level, {name: asked[name, level] for name in names}) for level in levels],
        step_cost=_step_cost({name: asked[name, 1] for name in names}, prefill) if 1 in levels else None,
        versions=provenance.versions(),
        machine=provenance.machine(),
        command=provenance.command(),
    )


def _selections(config: SpeedConfig) -> list[Selection]:
    names = config.tasks
    if names is None:
        names = ("mt_bench",) if config.data_dir else ("sample",)
        log.info("asking the %s prompts (--tasks and --data-dir say otherwise)", names[0])
    most = max(config.limit, *config.concurrency)
    return first_turns(select(task, config.data_dir, most) for task in resolve(names))


@contextmanager
def _servers(config: SpeedConfig) -> Iterator[tuple[dict[str, Server], dict[str, ServerFacts]]]:
    """All three up and paused, and what they are."""
    settings = [f"{SERVER_ARGS}max_total_tokens={config.pool_tokens}", *config.settings]
    servers: dict[str, Server] = {}
    facts: dict[str, ServerFacts] = {}
    with ExitStack() as stack:
        for name in (AUF, PLAIN, DFLASH):
            servers[name] = stack.enter_context(_starting(config, name, settings, facts.get(AUF)))
            facts[name] = server_facts(servers[name].base_url)
            servers[name].pause()
        yield servers, facts


def _starting(
    config: SpeedConfig, name: str, settings: Sequence[str], auf: ServerFacts | None
) -> AbstractContextManager[Server]:
    log_file, timeout_s = config.out / f"{name}-server.log", config.start_timeout_s
    if name != DFLASH:
        return serve(config.profile, name == PLAIN, settings=settings, log_file=log_file, timeout_s=timeout_s)
    assert auf is not None
    return launch(dflash_program(auf, settings), log_file=log_file, timeout_s=timeout_s)


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


@dataclass(frozen=True, slots=True)
class Turn:
    """One server's turn in a round, at one concurrency."""

    config: SpeedConfig
    name: str
    base_url: str
    number: int
    concurrency: int

    def ask(self, selections: list[Selection], prompts: Sequence[Prompt], max_tokens: int) -> Records:
        """All prompts, with an empty prefix cache. Only the first round has a warm-up."""
        kind = "prefill" if max_tokens == 1 else "answers"
        place = self.config.out / self.name / f"c{self.concurrency}-round{self.number + 1}-{kind}"
        run_config = RunConfig(
            **self.config.model_dump(include={"thinking", "data_dir", "timeout_s"}),
            base_url=self.base_url,
            plain=self.name == PLAIN,
            stream=False,
            concurrency=self.concurrency,
            max_tokens=max_tokens,
            warmup=None if self.number == 0 else 0,
            out=place,
        )
        discard(place)
        run = start(run_config, keep(selections, prompts))
        flush_cache(self.base_url)
        asyncio.run(run.ask(prompts, f"{self.name} at {self.concurrency}, round {self.number + 1}, {kind}"))
        run.require_tau()
        return run.records


def _level(concurrency: int, asked: Mapping[str, list[Records]]) -> Level:
    rounds = {
        name: [throughput(list(records.values()), concurrency).tokens_per_s for records in each]
        for name, each in asked.items()
    }
    everything = [record for each in asked.values() for records in each for record in records.values()]
    return Level(
        concurrency=concurrency,
        prompts=len(asked[AUF][0]),
        tokens_per_s={name: _median(speeds) for name, speeds in rounds.items()},
        rounds=rounds,
        auf_over_plain=_median(map(ratio, rounds[AUF], rounds[PLAIN])),
        auf_over_dflash=_median(map(ratio, rounds[AUF], rounds[DFLASH])),
        tau={name: macro(summarize_tasks(list(each[0].values())).values()).tau for name, each in asked.items()},
        auf_and_dflash=_agreement(asked[AUF], asked[DFLASH]),
        auf_and_plain=_agreement(asked[AUF], asked[PLAIN]),
        failed=sum(record.failed for record in everything),
    )


def _agreement(ours: Sequence[Records], theirs: Sequence[Records]) -> Agreement:
    pairs = [
        (mine[key], its[key])
        for mine, its in zip(ours, theirs, strict=True)
        for key in mine
        if not mine[key].failed and not its[key].failed
    ]
    tokens = [comparable_tokens(mine, its) for mine, its in pairs]
    return Agreement(
        compared=len(pairs),
        same_tokens=sum(mine == its for mine, its in tokens),
        same_histogram=sum(mine.accepted_histogram == its.accepted_histogram for mine, its in pairs),
    )


def _step_cost(asked: Mapping[str, list[Records]], prefill: Mapping[str, list[Records]]) -> StepCost:
    seconds = {name: list(map(seconds_per_step, asked[name], prefill[name])) for name in asked}
    return StepCost(
        auf_s=_median(seconds[AUF]),
        dflash_s=_median(seconds[DFLASH]),
        plain_s=_median(seconds[PLAIN]),
        ratio=_median(map(ratio, seconds[AUF], seconds[PLAIN])),
    )


def seconds_per_step(answers: Records, prefill: Records) -> float | None:
    """Of one round at concurrency 1. None without a step."""
    pairs = [(answers[key], prefill[key]) for key in answers]
    counted = [(answer, first) for answer, first in pairs if not answer.failed and not first.failed]
    steps = sum(answer.verify_steps or answer.completion_tokens - 1 for answer, _ in counted)
    return ratio(sum(answer.latency_s - first.latency_s for answer, first in counted), steps)


def _median(values: Iterable[float | None]) -> float | None:
    """None where a round has no value: a median of the others would hide it."""
    every = list(values)
    known = [value for value in every if value is not None]
    return median(known) if known and len(known) == len(every) else None
