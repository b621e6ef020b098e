"""Is speculative decoding lossless? Every greedy answer against plain decoding, token by token.

identical   the same tokens, and the same finish reason
near_tie    at the first difference the logits of the two tokens are the largest and equal within rounding; two correct
            evaluations of the same model may fork there, and everything after a fork is another text
fault       any other difference, also of finish reasons alone: speculation changed the answer

The near-tie bar. Logits are computed in bfloat16, which has 8 significant bits: near a value x its numbers are
2**(floor(log2 x) - 7) apart (0.125 for logits of 16 to 32). A block of several tokens and a single token go through
products of different shapes, which may move the logit of each of the two candidates by one such step. The candidates
can therefore change places when they are at most two steps apart; a larger distance is a fault. The forks examined on
SmolLM2-135M (top logits near 22) were 0.01 to 0.22 apart in float32, which is within the bar of 0.25.

Where the backend promises results that do not depend on shapes (this project's CPU platform), the bar is equality, and
a near-tie is a failure too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import zip_longest

from pydantic import Field

from benchmarks.harness.records import Key, Record
from benchmarks.harness.results import StrictModel
from sglang_auf.errors import DataError

BF16_FRACTION_BITS = 7
STEPS_OF_A_NEAR_TIE = 2


class Verdict(StrEnum):
    NEAR_TIE = "near_tie"
    FAULT = "fault"


@dataclass(frozen=True, slots=True)
class Fork:
    """First difference of two answers: its position, and the two tokens; None where an answer has ended before."""

    position: int
    speculating: int | None
    plain: int | None


@dataclass(frozen=True, slots=True)
class Candidates:
    """Log-probabilities by plain decoding after the common prefix: of the fork's two tokens, and of the best token."""

    speculating: float
    plain: float
    best: float

    @property
    def gap(self) -> float:
        """The distance of the worse of the two from the best token, in logits."""
        return self.best - min(self.speculating, self.plain)


Judge = Callable[[Record, Fork], Candidates]
"""Asks plain decoding about the fork of the given plain record."""


class Difference(StrictModel):
    """One answer that differs. gap: `Candidates.gap`; None where one answer only ended earlier.

    finish: finish reasons of the speculating and the plain answer, where only these differ.
    """

    task: str
    prompt_id: str
    turn: int
    position: int
    speculating: int | None
    plain: int | None
    gap: float | None
    verdict: Verdict
    finish: tuple[str | None, str | None] | None = None


class Losslessness(StrictModel):
    """Counts of answers. follow_up: turns after a fork, whose history differs. missing: failed or absent in a run.

    tokens: of the plain answers that both runs have. compared_tokens: those up to the first difference of each, itself
    included; none of later turns. exact: the bar is equality. near_tie_bar: in logits.
    """

    identical: int = 0
    near_tie: int = 0
    fault: int = 0
    follow_up: int = 0
    missing: int = 0
    tokens: int
    compared_tokens: int
    exact: bool
    near_tie_bar: float
    differences: list[Difference] = Field(default_factory=list)

    @property
    def passed(self) -> bool:
        compared = self.identical + self.near_tie
        return bool(compared) and not (self.fault or self.missing or (self.exact and self.near_tie))

    def tokens_text(self) -> str:
        return f"{self.compared_tokens} of {self.tokens}"

    def text(self) -> str:
        """For the terminal: the counts, and a line for each difference."""
        counts = f"{self.identical} identical, {self.near_tie} near-tie, {self.fault} fault"
        lines = [f"lossless    {counts} ({outcome_text(self.passed, self.exact, self.near_tie_bar)})"]
        lines.append(f"            {self.tokens_text()} tokens compared: what follows a difference is another text")
        if self.follow_up:
            lines.append(f"            {self.follow_up} later turns not compared: their history forked")
        if self.missing:
            lines.append(f"            {self.missing} requests failed or absent in one of the runs")
        lines += [
            f"            {part.verdict}: {part.task} {part.prompt_id} turn {part.turn} token {part.position}: "
            + (
                f"finished by {part.finish[0]!r} and not {part.finish[1]!r}"
                if part.finish
                else f"{part.speculating} for {part.plain}, "
                f"{'-' if part.gap is None else f'{part.gap:.3f}'} below the best"
            )
            for part in self.differences
        ]
        return "\n".join(lines)


def near_tie_bar(logit_scale: float) -> float:
    """Largest gap that rounding explains for logits of size `logit_scale`, in logits."""
    return STEPS_OF_A_NEAR_TIE * 2.0 ** (math.floor(math.log2(logit_scale)) - BF16_FRACTION_BITS)


def outcome_text(passed: bool, exact: bool, bar: float) -> str:
    """Whether a check passed, and its bar. exact: it is equality; otherwise `bar`, in logits."""
    of = "equality" if exact else f"a near-tie of at most {bar:g} in logits"
    return f"{'passed' if passed else 'FAILED'}; the bar is {of}"


def first_fork(speculating: Sequence[int], plain: Sequence[int]) -> Fork | None:
    for position, (ours, theirs) in enumerate(zip_longest(speculating, plain)):
        if ours != theirs:
            return Fork(position, ours, theirs)
    return None


def compare(
    speculating: Mapping[Key, Record], plain: Mapping[Key, Record], judge: Judge, bar: float, exact: bool
) -> Losslessness:
    """Compare two runs. bar: in logits. exact: the bar is equality, and a near-tie fails.

    judge is called once for every fork at which both answers go on. Raises DataError.
    """
    result = Losslessness(tokens=0, compared_tokens=0, exact=exact, near_tie_bar=bar)
    forked: set[tuple[str, str]] = set()
    for key in sorted({**speculating, **plain}):
        ours, theirs = speculating.get(key), plain.get(key)
        if ours is None or theirs is None or ours.failed or theirs.failed:
            result.missing += 1
            continue
        result.tokens += len(theirs.output_ids or ())
        if key[:2] in forked:
            result.follow_up += 1
        else:
            tokens = comparable_tokens(ours, theirs)
            fork = first_fork(*tokens)
            result.compared_tokens += len(tokens[1]) if fork is None else min(fork.position + 1, len(tokens[1]))
            if fork is None and (ends := other_ends(ours, theirs)) is not None:
                result.fault += 1
                result.differences.append(_other_end(theirs, ends))
            elif fork is None:
                result.identical += 1
            else:
                forked.add(key[:2])
                _add_difference(result, theirs, fork, judge)
    return result


def comparable_tokens(ours: Record, theirs: Record) -> tuple[list[int], list[int]]:
    """The tokens of both answers. Raises DataError where they are unknown, or answer different prompts."""
    if ours.output_ids is None or theirs.output_ids is None or None in (ours.prompt_ids, theirs.prompt_ids):
        raise DataError(
            f"records of {ours.key} without token ids",
            "token ids in both runs: equal texts do not prove equal tokens",
            "run the benchmark against SGLang 0.5.23, which returns them",
        )
    if ours.prompt_ids != theirs.prompt_ids:
        raise DataError(
            f"different prompt tokens for {ours.key}",
            "both servers to make the same tokens of the same prompt",
            "serve both with the same tokenizer, chat template and thinking switch",
        )
    return ours.output_ids, theirs.output_ids


def other_ends(ours: Record, theirs: Record) -> tuple[str, str] | None:
    """The finish reasons of both answers where they differ; None also where one of them is not known."""
    mine, its = ours.finish_reason, theirs.finish_reason
    return None if mine is None or its is None or mine == its else (mine, its)


def same_answer(ours: Record, theirs: Record) -> bool:
    """Whether both have the same tokens and end for the same reason. Raises DataError, as `comparable_tokens` does."""
    mine, its = comparable_tokens(ours, theirs)
    return mine == its and other_ends(ours, theirs) is None


def _other_end(plain: Record, ends: tuple[str, str]) -> Difference:
    """The same tokens, which ended for another reason."""
    return Difference(
        task=plain.task,
        prompt_id=plain.prompt_id,
        turn=plain.turn,
        position=len(plain.output_ids or ()),
        speculating=None,
        plain=None,
        gap=None,
        verdict=Verdict.FAULT,
        finish=ends,
    )


def _add_difference(result: Losslessness, plain: Record, fork: Fork, judge: Judge) -> None:
    gap, verdict = None, Verdict.FAULT
    if fork.speculating is not None and fork.plain is not None:
        gap = judge(plain, fork).gap
        verdict = Verdict.NEAR_TIE if gap <= result.near_tie_bar else Verdict.FAULT
    if verdict is Verdict.NEAR_TIE:
        result.near_tie += 1
    else:
        result.fault += 1
    result.differences.append(
        Difference(
            task=plain.task,
            prompt_id=plain.prompt_id,
            turn=plain.turn,
            position=fork.position,
            speculating=fork.speculating,
            plain=fork.plain,
            gap=gap,
            verdict=verdict,
        )
    )
