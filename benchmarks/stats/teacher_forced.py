"""Is one greedy run lossless by itself? Every token of every answer against a prefill of the prompt and the answer.

A prefill gives the target's logits at all positions of an answer at once, each after the text that was really emitted
(teacher forcing). Greedy decoding emits the token of the largest logit, so the gap between the two should be 0:

exact       the gap is 0: the best token, or one with an equal logit
near_tie    the gap is not above the bar of lossless.py, which rounding explains
fault       the gap is larger: the target would have emitted another token

What this cannot see is in judged.py. Nor does it see an answer that ended too early or too late, since an end is no
token, unless a token ended it. A run at temperature 1 is judged by sampled.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from benchmarks.harness.records import Record
from benchmarks.harness.results import StrictModel
from benchmarks.stats.judged import JudgedReport, JudgedRun, place, verdict_text
from benchmarks.stats.lossless import Verdict, near_tie_bar, outcome_text
from benchmarks.stats.prefill import TokenLogprob


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


class TeacherForced(JudgedReport):
    """teacher_forced.json, beside the run.

    exact, near_tie, fault: numbers of tokens. near_tie_answers and fault_answers: of the judged ones, those with such a
    token. equality: the bar is a gap of 0. near_tie_bar: in logits. worst: the tokens with the largest gaps, the
    largest first.
    """

    STEM: ClassVar[str] = "teacher_forced"

    equality: bool
    near_tie_bar: float
    exact: int = 0
    near_tie: int = 0
    fault: int = 0
    near_tie_answers: int = 0
    fault_answers: int = 0
    worst: list[JudgedToken] = Field(default_factory=list)

    @property
    def passed(self) -> bool:
        return bool(self.answers) and not (self.fault or self.failed or (self.equality and self.near_tie))

    def text(self) -> str:
        """For the terminal: the counts, what they rest on, what was not judged, and a line for each of the worst."""
        tokens = self.exact + self.near_tie + self.fault
        counts = f"{self.exact} exact, {self.near_tie} near-tie, {self.fault} fault"
        outcome = outcome_text(self.passed, self.equality, self.near_tie_bar)
        lines = [f"{tokens} tokens of {self.answers} answers: {counts} ({outcome})"]
        if self.near_tie or self.fault:
            lines.append(f"answers with a near-tie: {self.near_tie_answers}, with a fault: {self.fault_answers}")
        lines += self.basis_lines()
        lines += [
            f"{part.verdict}: {place(part)} token {part.position}: "
            f"{part.emitted} for {part.best}, {part.gap:.3f} below the best"
            for part in self.worst
        ]
        if (more := self.near_tie + self.fault - len(self.worst)) > 0:
            lines.append(f"and {more} more that are not exact (--worst lists them)")
        return verdict_text(lines)


def check_greedy(run: JudgedRun, logit_scale: float, *, concurrency: int, worst: int) -> TeacherForced:
    """Judge every token of a greedy run.

    logit_scale: of the target's top logits. concurrency: prefills in flight. worst: how many tokens are listed at most.
    The bar is equality where both the run and the judge are on a CPU, whose backend promises it. Raises ServerError.
    """
    result = TeacherForced(
        base_url=run.base_url,
        judge=run.judge,
        failed=run.failed,
        unjudged=run.unjudged,
        equality=run.on_cpus,
        near_tie_bar=near_tie_bar(logit_scale),
    )
    found = [token for tokens in _judged(run, concurrency, result) for token in tokens]
    result.worst = sorted(found, key=lambda token: -token.gap)[:worst]
    return result


def _judged(run: JudgedRun, concurrency: int, result: TeacherForced) -> Iterator[list[JudgedToken]]:
    """The tokens of each answer that are not exact. All are counted in `result`."""
    for record, told in run.prefills(concurrency, top=1):
        found = _not_exact(record, told, result.near_tie_bar)
        verdicts = [token.verdict for token in found]
        result.answers += 1
        result.exact += len(told) - len(found)
        result.near_tie += verdicts.count(Verdict.NEAR_TIE)
        result.fault += verdicts.count(Verdict.FAULT)
        result.near_tie_answers += Verdict.NEAR_TIE in verdicts
        result.fault_answers += Verdict.FAULT in verdicts
        yield found


def _not_exact(record: Record, told: list[TokenLogprob], bar: float) -> list[JudgedToken]:
    task, prompt_id, turn = record.key
    found = []
    for position, at in enumerate(told):
        ((best_value, best),) = at.top
        if (gap := best_value - at.value) != 0:
            found.append(
                JudgedToken(
                    task=task,
                    prompt_id=prompt_id,
                    turn=turn,
                    position=position,
                    emitted=at.token,
                    best=best,
                    gap=gap,
                    verdict=Verdict.NEAR_TIE if gap <= bar else Verdict.FAULT,
                )
            )
    return found
