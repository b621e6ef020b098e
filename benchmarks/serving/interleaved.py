"""Ask several servers of one machine the same greedy prompts in turns. All are up, and all but one are paused.

Every server is asked in every round, at every concurrency, with an empty prefix cache. Another server begins in each
round, so that a slow drift of the machine affects all alike. Answers are not streamed: the client would take CPU for
every chunk, and the servers send different numbers of chunks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from pydantic import Field

from benchmarks.harness.config import Counts, Names, RunConfig, StartedServersConfig
from benchmarks.harness.records import Key, Record
from benchmarks.harness.results import StrictModel
from benchmarks.harness.run import ask, discard, prompts_of
from benchmarks.harness.server_info import ServerFacts, server_facts
from benchmarks.harness.servers import Server, awake
from benchmarks.harness.sources.prompt import Prompt
from benchmarks.harness.tasks import Selection, broken_rows, first_turns, in_turn, keep
from benchmarks.stats.lossless import same_answer
from benchmarks.stats.summary import macro, ratio, summarize_tasks, throughput
from sglang_auf.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

Records = dict[Key, Record]


class TurnsConfig(StartedServersConfig):
    """What commands share whose servers are asked in turns."""

    tasks: Names | None = Field(
        None,
        description="comma-separated tasks or groups; first turns (default: none with --prompts, mt_bench with "
        "--data-dir, else sample)",
    )
    limit: int = Field(8, ge=1, description="prompts in all, of all tasks in turn; more where more are in flight")
    max_tokens: int = Field(256, ge=2, description="new tokens of one answer at most")
    concurrency: Counts = Field((1,), description="comma-separated numbers of requests in flight")
    rounds: int = Field(3, ge=1, description="turns each server gets at each concurrency; medians are reported")
    pool_tokens: int = Field(16384, ge=1, description="KV pool of each server, in tokens")
    out: Path = Field(description="result directory; earlier results are replaced")

    @property
    def server_settings(self) -> tuple[str, ...]:
        return (f"server_args.max_total_tokens={self.pool_tokens}", *self.settings)


class Agreement(StrictModel):
    """How many answers of two servers, over all rounds, have equal tokens and equal histograms of accepted drafts.

    compared: answers that both servers gave. same_tokens: of equal finish reasons, too.
    """

    compared: int
    same_tokens: int
    same_histogram: int

    @property
    def whole(self) -> bool:
        """Whether no answer differs."""
        return self.same_tokens == self.compared

    def tokens_text(self) -> str:
        return f"{self.same_tokens} of {self.compared}"


class Turns:
    """The prompts of one command, and the answers of all servers in all rounds."""

    def __init__(self, config: TurnsConfig) -> None:
        """Raises ConfigError where there are fewer prompts than requests in flight."""
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
        """(server name, concurrency) -> records of each round."""
        self.prefill: dict[str, list[Records]] = {}
        """Server name -> records of each round, of the prompts of concurrency 1 with one new token."""

    @property
    def tasks(self) -> list[str]:
        return [chosen.task.name for chosen in self.selections]

    @property
    def broken_rows(self) -> list[str]:
        return broken_rows(self.selections)

    def ask(self, servers: Mapping[str, Server], plain: Collection[str]) -> None:
        """Ask all rounds.

        servers: running but paused, by name (also their directory under config.out). plain: names of servers without a
        drafter.
        """
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
        """Seconds of a step, by round. Concurrency 1 must have been asked."""
        return list(map(seconds_per_step, self.answers[name, 1], self.prefill[name]))

    def tau(self, name: str, level: int) -> float | None:
        """Macro, over the answers of all rounds; None for plain decoding."""
        every = [record for records in self.answers[name, level] for record in records.values()]
        return macro(summarize_tasks(every).values()).tau

    def failed(self, name: str, level: int) -> int:
        return sum(record.failed for records in self.answers[name, level] for record in records.values())

    def agreement(self, ours: str, theirs: str, level: int) -> Agreement:
        pairs = [
            (mine[key], its[key])
            for mine, its in zip(self.answers[ours, level], self.answers[theirs, level], strict=True)
            for key in mine
            if not mine[key].failed and not its[key].failed
        ]
        return Agreement(
            compared=len(pairs),
            same_tokens=sum(same_answer(mine, its) for mine, its in pairs),
            same_histogram=sum(mine.accepted_histogram == its.accepted_histogram for mine, its in pairs),
        )


@contextmanager
def up_and_paused(
    names: Iterable[str], starting: Callable[[str, Mapping[str, ServerFacts]], AbstractContextManager[Server]]
) -> Iterator[tuple[dict[str, Server], dict[str, ServerFacts]]]:
    """Start servers one after the other and pause each. Yields servers and facts by name, and ends all servers.

    starting: makes the server of a name; its second argument holds the facts of those before it.
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
    if names is None and config.prompts:
        names = ()
    elif names is None:
        names = ("mt_bench",) if config.data_dir else ("sample",)
        logger.info("asking the %s prompts (--tasks and --data-dir say otherwise)", names[0])
    most = max(config.limit, *config.concurrency)
    selections = first_turns(prompts_of(config, names, most, fewer=True))
    found = sum(len(chosen.prompts) for chosen in selections)
    due = min(most, sum(chosen.task.count for chosen in selections))
    if found < due:
        raise DataError(
            f"{found} prompts of {', '.join(chosen.task.name for chosen in selections)}",
            f"at least {due}",
            f"give the complete data sets, or ask fewer with --limit {found}",
        )
    return selections


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
        """Ask all prompts, with an empty prefix cache. Only the first round has a warm-up."""
        kind = "prefill" if max_tokens == 1 else "answers"
        place = self.config.out / self.name / f"c{self.concurrency}-round{self.number + 1}-{kind}"
        run_config = RunConfig(
            **self.config.model_dump(include={"prompts", "raw_prompts", "thinking", "data_dir", "timeout_s"}),
            base_url=self.base_url,
            plain=self.plain,
            stream=False,
            empty_cache=True,
            concurrency=self.concurrency,
            max_tokens=max_tokens,
            warmup=None if self.number == 0 else 0,
            out=place,
        )
        discard(place)
        label = f"{self.name} at {self.concurrency}, round {self.number + 1}, {kind}"
        return ask(run_config, keep(selections, prompts), label, prompts=prompts).records


def seconds_per_step(answers: Records, prefill: Records) -> float | None:
    """Seconds of a step in one round at concurrency 1; None without a step.

    (latency - latency of the same prompt with one new token) / steps, where both are summed over prompts. A step is a
    verify step with its drafting, or a token of plain decoding.
    """
    pairs = [(answers[key], prefill[key]) for key in answers]
    counted = [(answer, first) for answer, first in pairs if not answer.failed and not first.failed]
    steps = sum(answer.verify_steps or answer.completion_tokens - 1 for answer, _ in counted)
    return ratio(sum(answer.latency_s - first.latency_s for answer, first in counted), steps)


def median_of_all(values: Iterable[float | None]) -> float | None:
    """The median; None where a round has no value, since the median of the others would hide that."""
    every = list(values)
    known = [value for value in every if value is not None]
    return median(known) if known and len(known) == len(every) else None
