"""Is one greedy run lossless by itself? Every token of every answer against a prefill of the prompt and the answer.

A prefill gives the target's logits at all positions of an answer at once, each after the text that was really emitted
(teacher forcing). Greedy decoding emits the token of the largest logit, so the gap between the two should be 0:

exact       the gap is 0: the best token, or one with an equal logit
near_tie    the gap is not above the bar of lossless.py, which rounding explains
fault       the gap is larger: the target would have emitted another token

Two runs compare an answer up to its first difference only. Here nothing is hidden behind one, and one server is enough.
But that server's prefill is taken as the truth: what is wrong in prefill and decoding alike is not seen. Nor is an
answer that ended too early or too late, since an end is no token, unless a token ended it.

What the benchmark asks leaves the greedy choice alone: it sends no bias, penalty or minimal length. A strict tool puts
a grammar over it, and such answers are left out, by name.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

from pydantic import Field
from tqdm import tqdm

from benchmarks.harness.manifest import RunManifest
from benchmarks.harness.records import Record, latest, read_records
from benchmarks.harness.results import Report, StrictModel
from benchmarks.harness.run import MANIFEST, RECORDS
from benchmarks.harness.server_info import ServerFacts, server_facts
from benchmarks.stats.lossless import Verdict, near_tie_bar, outcome_text
from benchmarks.stats.prefill import answer_logprobs, longest_prefill
from sglang_auf.errors import ConfigError, DataError, ServerError

STRICT_TOOL = "which has a strict tool: its grammar may forbid the best token"
TRUNCATED = "whose prompt was truncated"
TOO_LONG = "which is longer than what the judging server takes as a prompt"


class JudgedToken(StrictModel):
    """One token that is not exact. position: in the answer. gap: logit of `best` minus that of `emitted`."""

    task: str
    prompt_id: str
    turn: int
    position: int
    emitted: int
    best: int
    gap: float
    verdict: Verdict


class Unjudged(StrictModel):
    """The last `tokens` tokens of an answer, or all of them, which were not judged."""

    task: str
    prompt_id: str
    turn: int
    tokens: int
    reason: str


class TeacherForced(Report):
    """teacher_forced.json, beside the run.

    exact, near_tie, fault: numbers of tokens. answers: with a token that was judged; near_tie_answers and
    fault_answers: of those with such a token. failed: requests without an answer. equality: the bar is a gap of 0.
    near_tie_bar: in logits. judge: the server at base_url. worst: the tokens with the largest gaps, the largest first.
    """

    STEM: ClassVar[str] = "teacher_forced"

    base_url: str
    judge: ServerFacts
    equality: bool
    near_tie_bar: float
    answers: int = 0
    exact: int = 0
    near_tie: int = 0
    fault: int = 0
    near_tie_answers: int = 0
    fault_answers: int = 0
    failed: int = 0
    unjudged: list[Unjudged] = Field(default_factory=list)
    worst: list[JudgedToken] = Field(default_factory=list)

    @property
    def passed(self) -> bool:
        return bool(self.answers) and not (self.fault or self.failed or (self.equality and self.near_tie))

    def text(self) -> str:
        """For the terminal: the counts, what they rest on, what was not judged, and a line for each of the worst."""
        tokens = self.exact + self.near_tie + self.fault
        counts = f"{self.exact} exact, {self.near_tie} near-tie, {self.fault} fault"
        outcome = outcome_text(self.passed, self.equality, self.near_tie_bar)
        lines = [f"lossless    {tokens} tokens of {self.answers} answers: {counts} ({outcome})"]
        if self.near_tie or self.fault:
            lines.append(
                f"            answers with a near-tie: {self.near_tie_answers}, with a fault: {self.fault_answers}"
            )
        lines.append(f"            the truth is a prefill by {self._judge_text()}")
        if self.failed:
            lines.append(f"            {self.failed} requests failed")
        lines += [
            f"            not judged: {part.tokens} tokens of {_place(part)}, {part.reason}" for part in self.unjudged
        ]
        lines += [
            f"            {part.verdict}: {_place(part)} token {part.position}: "
            f"{part.emitted} for {part.best}, {part.gap:.3f} below the best"
            for part in self.worst
        ]
        if (more := self.near_tie + self.fault - len(self.worst)) > 0:
            lines.append(f"            and {more} more that are not exact (--worst lists them)")
        return "\n".join(lines)

    def _judge_text(self) -> str:
        judge = self.judge
        if judge.algorithm is None:
            return f"the plain server of {judge.target} at {self.base_url}"
        where = f"the server of {judge.target} at {self.base_url}"
        return f"{where}, which speculates itself ({judge.algorithm}): ask a plain server where there is one"


def _place(part: JudgedToken | Unjudged) -> str:
    return f"{part.task} {part.prompt_id} turn {part.turn}"


def check_run(run: Path, base_url: str, logit_scale: float, *, concurrency: int, worst: int) -> TeacherForced:
    """Judge every token of a finished greedy run by the server at `base_url`, of the same target.

    logit_scale: of the target's top logits. concurrency: prefills in flight. worst: how many tokens are listed at most.
    The bar is equality where both the run and the judge are on a CPU, whose backend promises it. Raises ConfigError,
    DataError or ServerError.
    """
    manifest = RunManifest.read(run / MANIFEST)
    if manifest.config.temperature != 0:
        raise ConfigError(
            f"a run at temperature {manifest.config.temperature:g}",
            "greedy answers: a drawn token need not be the best one",
            "run with --temperature 0",
        )
    records = latest(read_records(run / RECORDS))
    manifest.require_finished(run, records)
    answered = sorted((record for record in records if not record.failed), key=lambda record: record.key)
    for record in answered:
        _require_ids(record)
    judge = server_facts(base_url)
    _require_same_target(base_url, judge, manifest.server)
    result = TeacherForced(
        base_url=base_url,
        judge=judge,
        equality=manifest.server.device == judge.device == "cpu",
        near_tie_bar=near_tie_bar(logit_scale),
        failed=len(records) - len(answered),
    )
    due = list(_judgeable(answered, longest_prefill(base_url), result.unjudged))
    found = [token for tokens in _judged(due, base_url, concurrency, result) for token in tokens]
    result.worst = sorted(found, key=lambda token: -token.gap)[:worst]
    return result


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


def _judged(
    due: Sequence[tuple[Record, int]], base_url: str, concurrency: int, result: TeacherForced
) -> Iterator[list[JudgedToken]]:
    """The tokens of each answer that are not exact. All are counted in `result`."""
    cache = f"lossless-{uuid.uuid4()}"

    def judge(one: tuple[Record, int]) -> list[JudgedToken]:
        return _not_exact(one[0], one[1], base_url, cache, result.near_tie_bar)

    with ThreadPoolExecutor(concurrency) as pool:
        parts = tqdm(pool.map(judge, due), total=len(due), desc="judged", unit="answer", disable=None)
        for (_, count), found in zip(due, parts, strict=True):
            verdicts = [token.verdict for token in found]
            result.answers += 1
            result.exact += count - len(found)
            result.near_tie += verdicts.count(Verdict.NEAR_TIE)
            result.fault += verdicts.count(Verdict.FAULT)
            result.near_tie_answers += Verdict.NEAR_TIE in verdicts
            result.fault_answers += Verdict.FAULT in verdicts
            yield found


def _not_exact(record: Record, count: int, base_url: str, cache: str, bar: float) -> list[JudgedToken]:
    assert record.prompt_ids is not None and record.output_ids is not None
    emitted = record.output_ids[:count]
    task, prompt_id, turn = record.key
    return [
        JudgedToken(
            task=task,
            prompt_id=prompt_id,
            turn=turn,
            position=position,
            emitted=token,
            best=told.best,
            gap=told.best_value - told.value,
            verdict=Verdict.NEAR_TIE if told.best_value - told.value <= bar else Verdict.FAULT,
        )
        for position, (token, told) in enumerate(
            zip(emitted, answer_logprobs(base_url, record.prompt_ids, emitted, cache), strict=True)
        )
        if told.best_value != told.value
    ]
