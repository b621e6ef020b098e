"""Servers of one machine that are asked the same greedy prompts in turns: all up, all but one paused.

Every server is asked in every round, at every concurrency, after its prefix cache was emptied; who goes first changes
with the round, so that a slow drift of the machine meets all alike. Not streamed: the client would take CPU for every
chunk, and the servers send different numbers of them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median

from benchmarks.harness.config import RunConfig, TurnsConfig
from benchmarks.harness.records import Key, Record
from benchmarks.harness.results import StrictModel
from benchmarks.harness.run import discard, start
from benchmarks.harness.server_info import ServerFacts, flush_cache, server_facts
from benchmarks.harness.servers import Server, awake
from benchmarks.harness.tasks import Prompt, Selection, first_turns, in_turn, keep, resolve, select
from benchmarks.stats.lossless import comparable_tokens
from benchmarks.stats.summary import ratio, throughput
from sglang_auf.errors import ConfigError

log = logging.getLogger(__name__)

Records = dict[Key, Record]


class Agreement(StrictModel):
    """Of the answers that two servers both gave, over all rounds: equal tokens, equal histograms of accepted drafts."""

    compared: int
    same_tokens: int
    same_histogram: int


class Turns:
    """The questions of one table, and what became of them."""

    def __init__(self, config: TurnsConfig) -> None:
        """Raises ConfigError for fewer prompts than are to be in flight."""
        self.config = config
        self.levels = list(dict.fromkeys(config.concurrency))
        self.selections = _selections(config)
        everything = in_turn(self.selections)
        if len(everything) < max(self.levels):
            raise ConfigError(
                f"{len(everything)} prompts and concurrency {max(self.levels)}",
                "at least as many prompts as are to be in flight",
                "add --tasks, or lower --concurrency",
            )
        self._prompts = {level: everything[: max(config.limit, level)] for level in self.levels}
        self.answers: dict[tuple[str, int], list[Records]] = {}
        """Of each server's name and concurrency: a round each."""
        self.prefill: dict[str, list[Records]] = {}
        """The prompts of concurrency 1 with one new token, by server: a round each."""

    @property
    def tasks(self) -> list[str]:
        return [chosen.task.name for chosen in self.selections]

    def ask(self, servers: Mapping[str, Server], plain: Collection[str]) -> None:
        """All rounds. servers: up and paused, by name, which is also a directory of config.out. plain: whose no tau
        is asked for."""
        names = list(servers)
        for number in range(self.config.rounds):
            order = names[number % len(names) :] + names[: number % len(names)]
            for level in self.levels:
                for name in order:
                    with awake(servers[name]):
                        turn = _Turn(self.config, name, name in plain, servers[name].base_url, number, level)
                        self._take(turn)

    def _take(self, turn: _Turn) -> None:
        prompts = self._prompts[turn.concurrency]
        if turn.concurrency == 1:
            self.prefill.setdefault(turn.name, []).append(turn.ask(self.selections, prompts, max_tokens=1))
        answers = turn.ask(self.selections, prompts, self.config.max_tokens)
        self.answers.setdefault((turn.name, turn.concurrency), []).append(answers)

    def speeds(self, name: str, level: int) -> list[float | None]:
        """Tokens per second, by round."""
        return [throughput(list(records.values()), level).tokens_per_s for records in self.answers[name, level]]

    def step_seconds(self, name: str) -> list[float | None]:
        """By round; concurrency 1 must have been asked for."""
        return list(map(seconds_per_step, self.answers[name, 1], self.prefill[name]))

    def failed(self, name: str, level: int) -> int:
        return sum(record.failed for records in self.answers[name, level] for record in records.values())

    def agreement(self, ours: str, theirs: str, level: int) -> Agreement:
        pairs = [
            (mine[key], its[key])
            for mine, its in zip(self.answers[ours, level], self.answers[theirs, level], strict=True)
            for key in mine
            if not mine[key].failed and not its[key].failed
        ]
        tokens = [comparable_tokens(mine, its) for mine, its in pairs]
        return Agreement(
            compared=len(pairs),
            same_tokens=sum(mine == its for mine, its in tokens),
            same_histogram=sum(mine.accepted_histogram == its.accepted_histogram for mine, its in pairs),
        )


@contextmanager
def up_and_paused(
    names: Iterable[str], starting: Callable[[str, Mapping[str, ServerFacts]], AbstractContextManager[Server]]
) -> Iterator[tuple[dict[str, Server], dict[str, ServerFacts]]]:
    """Servers started one after the other, each paused once it is up, and what they are; all ended on the way out.

    starting: a server by name, given what those before it are.
    """
    servers: dict[str, Server] = {}
    facts: dict[str, ServerFacts] = {}
    with ExitStack() as stack:
        for name in names:
            servers[name] = stack.enter_context(starting(name, facts))
            facts[name] = server_facts(servers[name].base_url)
            servers[name].pause()
        yield servers, facts


def _selections(config: TurnsConfig) -> list[Selection]:
    names = config.tasks
    if names is None:
        names = ("mt_bench",) if config.data_dir else ("sample",)
        log.info("asking the %s prompts (--tasks and --data-dir say otherwise)", names[0])
    most = max(config.limit, *config.concurrency)
    return first_turns(select(task, config.data_dir, most) for task in resolve(names))


@dataclass(frozen=True, slots=True)
class _Turn:
    """One server's turn in a round, at one concurrency."""

    config: TurnsConfig
    name: str
    plain: bool
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
            plain=self.plain,
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


def seconds_per_step(answers: Records, prefill: Records) -> float | None:
    """Of one round at concurrency 1. None without a step.

    (latency - latency of the same prompt with one new token) / steps, sums over prompts. A step is a verify step, with
    its drafting, or a token of plain decoding.
    """
    pairs = [(answers[key], prefill[key]) for key in answers]
    counted = [(answer, first) for answer, first in pairs if not answer.failed and not first.failed]
    steps = sum(answer.verify_steps or answer.completion_tokens - 1 for answer, _ in counted)
    return ratio(sum(answer.latency_s - first.latency_s for answer, first in counted), steps)


def median_of_all(values: Iterable[float | None]) -> float | None:
    """None where a round has no value: a median of the others would hide it."""
    every = list(values)
    known = [value for value in every if value is not None]
    return median(known) if known and len(known) == len(every) else None
