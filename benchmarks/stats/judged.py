"""A recorded run whose answers a server judges by its own prefill: what greedy and sampled runs share.

Two runs compare an answer up to its first difference only. Here nothing is hidden behind one, and one server is enough.
But that server's prefill is taken as the truth: what is wrong in prefill and decoding alike is not seen.

What the benchmark asks changes no logit: it sends no bias, penalty or minimal length. A strict tool puts a grammar over
them, and such answers are left out, by name.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self

from pydantic import Field
from tqdm import tqdm

from benchmarks.harness.manifest import RunManifest
from benchmarks.harness.records import Record, latest, read_records
from benchmarks.harness.results import Report, StrictModel
from benchmarks.harness.run import MANIFEST, RECORDS
from benchmarks.harness.server_info import ServerFacts, server_facts
from benchmarks.stats.prefill import TokenLogprob, answer_logprobs, longest_prefill
from sglang_auf.errors import ConfigError, DataError, ServerError

STRICT_TOOL = "which has a strict tool: its grammar may have forbidden a token"
TRUNCATED = "whose prompt was truncated"
TOO_LONG = "which is longer than what the judging server takes as a prompt"

GREEDY, SAMPLED = 0.0, 1.0
"""The temperatures at which a prefill says what decoding does: take the best token, or draw by its probabilities."""


class Unjudged(StrictModel):
    """The last `tokens` tokens of an answer, or all of them, which were not judged."""

    task: str
    prompt_id: str
    turn: int
    tokens: int
    reason: str


class JudgedReport(Report):
    """answers: with a token that was judged. failed: requests without an answer. judge: the server at base_url."""

    base_url: str
    judge: ServerFacts
    answers: int = 0
    failed: int = 0
    unjudged: list[Unjudged] = Field(default_factory=list)

    def basis_lines(self) -> list[str]:
        """For the terminal: what the verdict rests on, and what was not judged."""
        lines = [f"the truth is a prefill by {self._judge_text()}"]
        if self.failed:
            lines.append(f"{self.failed} requests failed")
        return lines + [f"not judged: {part.tokens} tokens of {place(part)}, {part.reason}" for part in self.unjudged]

    def _judge_text(self) -> str:
        judge = self.judge
        if judge.algorithm is None:
            return f"the plain server of {judge.target} at {self.base_url}"
        where = f"the server of {judge.target} at {self.base_url}"
        return f"{where}, which speculates itself ({judge.algorithm}): ask a plain server where there is one"


class OfAnswer(Protocol):
    task: str
    prompt_id: str
    turn: int


def place(part: OfAnswer) -> str:
    """Which answer it is of, for the terminal."""
    return f"{part.task} {part.prompt_id} turn {part.turn}"


def verdict_text(lines: Sequence[str]) -> str:
    """What `lossless` prints: its name before the first line, and the others below that."""
    return "lossless    " + "\n            ".join(lines)


@dataclass(frozen=True, slots=True)
class JudgedRun:
    """A finished run and its judge. due: (record, how many of its tokens can be judged), where there are any."""

    manifest: RunManifest
    base_url: str
    judge: ServerFacts
    failed: int
    due: list[tuple[Record, int]] = field(default_factory=list)
    unjudged: list[Unjudged] = field(default_factory=list)

    @classmethod
    def of(cls, run: Path, base_url: str) -> Self:
        """Read a run directory and look at the server. Raises ConfigError, DataError or ServerError."""
        manifest = RunManifest.read(run / MANIFEST)
        if manifest.config.temperature not in (GREEDY, SAMPLED):
            raise ConfigError(
                f"a run at temperature {manifest.config.temperature:g}",
                "greedy answers, or answers drawn at temperature 1: a prefill gives the odds at no other one",
                "run with --temperature 0 or 1",
            )
        records = latest(read_records(run / RECORDS))
        manifest.require_finished(run, records)
        answered = sorted((record for record in records if not record.failed), key=lambda record: record.key)
        for record in answered:
            _require_ids(record)
        judge = server_facts(base_url)
        _require_same_target(base_url, judge, manifest.server)
        judged = cls(manifest, base_url, judge, len(records) - len(answered))
        judged.due.extend(_judgeable(answered, longest_prefill(base_url), judged.unjudged))
        return judged

    @property
    def on_cpus(self) -> bool:
        """Whether run and judge are on a CPU, whose backend promises equal bits."""
        return self.manifest.server.device == self.judge.device == "cpu"

    def prefills(self, concurrency: int, top: int) -> Iterator[tuple[Record, list[TokenLogprob]]]:
        """What the judge says of the tokens of each answer in `due`. concurrency: prefills in flight.

        top: as for `answer_logprobs`. Raises ServerError.
        """
        cache = f"lossless-{uuid.uuid4()}"

        def told(one: tuple[Record, int]) -> list[TokenLogprob]:
            record, count = one
            assert record.prompt_ids is not None and record.output_ids is not None
            return answer_logprobs(self.base_url, record.prompt_ids, record.output_ids[:count], cache, top)

        with ThreadPoolExecutor(concurrency) as pool:
            parts = tqdm(pool.map(told, self.due), total=len(self.due), desc="judged", unit="answer", disable=None)
            yield from zip((record for record, _ in self.due), parts, strict=True)


def _require_ids(record: Record) -> None:
    if not record.prompt_ids or not record.output_ids:
        raise DataError(
            f"the answer to {record.key} without token ids",
            "the token ids of each prompt and answer: a text does not say which tokens it was",
            "run the benchmark against a server of SGLang 0.5.23 or of vLLM, which return them",
        )
    if len(record.output_ids) != record.completion_tokens:
        raise DataError(
            f"{len(record.output_ids)} ids for the {record.completion_tokens} tokens of the answer to {record.key}",
            "the id of each token",
            "run the benchmark again",
        )


def _require_same_target(base_url: str, judge: ServerFacts, asked: ServerFacts) -> None:
    differs = [
        f"{name}: {ours!r} and {its!r}"
        for name, ours, its in (
            ("target", judge.target, asked.target),
            ("dtype", judge.dtype, asked.dtype),
            ("revision", judge.revision, asked.revision),
        )
        if ours != its and (name == "target" or None not in (ours, its))
    ]
    if differs:
        raise ServerError(
            f"{base_url} and the run differ: {'; '.join(differs)}",
            "a server of the run's target",
            "give the server that was asked, or a plain one: python -m server --plain",
        )


def _judgeable(records: Iterable[Record], longest: int, unjudged: list[Unjudged]) -> Iterator[tuple[Record, int]]:
    """(record, how many of its tokens can be judged) where there are any. What cannot be is added to `unjudged`."""
    for record in records:
        assert record.prompt_ids is not None and record.output_ids is not None
        count, reason = max(0, min(len(record.output_ids), longest - len(record.prompt_ids))), TOO_LONG
        if record.strict_tools:
            count, reason = 0, STRICT_TOOL
        elif record.prompt_tokens != len(record.prompt_ids):
            count, reason = 0, TRUNCATED
        if rest := len(record.output_ids) - count:
            task, prompt_id, turn = record.key
            unjudged.append(Unjudged(task=task, prompt_id=prompt_id, turn=turn, tokens=rest, reason=reason))
        if count:
            yield record, count
