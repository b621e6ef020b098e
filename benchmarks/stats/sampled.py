"""Is one run at temperature 1 lossless by itself? The drawn tokens against the odds that a prefill gives them.

Lossless decoding draws each token from the target's distribution after all that is before it. A prefill tells that
distribution. Take any score f of a token that is fixed before the draw. Then f(drawn) - E f has mean 0, whatever was
drawn before, so that its sum over all tokens is a martingale, and for many tokens

    z = sum(f(drawn) - E f) / sqrt(sum Var f)

is nearly standard normal. Where answers end does no harm: an end token, a stop and the length limit decide after each
token whether another is drawn, by what is there already, and every drawn token is judged, also the last one. In the
same way a statistic may count some places alone, if they are known before their draw. The place in a verify step is.
Whether a token was an accepted draft is not: it was accepted because of the draw, and is likelier than others for that.

The statistics were chosen before any run was looked at. Each score is the derivative, at a lossless sampler, of a
token's log-probability by the size of one kind of fault; so for small sizes no other test is stronger. Each also gives
an estimate of that size:

most likely token      1/p for the most likely token, of probability p. Size: the share of tokens that are taken
                       greedily, sum(f(drawn) - E f) / sum(Var f)
temperature            log p; behind rank 20, where no log-probability is told, that of rank 20. Size: 1/T - 1, likewise
ranks 2 to 5           1 for them. Size: how much more often than expected, sum(f(drawn) - E f) / sum(E f)
behind rank 20         the same. A filter (top_k, top_p) that was not asked for brings it near -100 %
first of a step        as the most likely token, at the first token of each verify step alone
after accepted drafts  the same, at the step's other tokens

The last two are there where the run has recorded its steps. Few draws of unlikely tokens make z skewed, and it is
compared with the Pearson III distribution of its own skewness, which without skewness is the normal one.

Of all statistics together a lossless run fails once in 1 / LEVEL runs (Bonferroni). A statistic with too few tokens to
show a size of 1, or with more skewness than SKEWED, is not used. A run passes only if its first two statistics would
have shown a size of ENOUGH. judged.py says what no statistic can see. Draws that are right one by one and depend on
each other, as those of one seed for all requests, are not looked for.

Off the CPU platform prefill and decoding round differently. Independent errors of 0.05 in all logits (two roundings to
bfloat16, of logits of 16 to 32) move z by less than 0.2 with 20,000 tokens, as a test of this module shows. The shift
grows with the root of the tokens and with the square of the errors: of a much larger run, look at the sizes too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import stats
from tabulate import tabulate

from benchmarks.harness.records import Record
from benchmarks.harness.results import StrictModel
from benchmarks.stats.judged import JudgedReport, JudgedRun, verdict_text
from benchmarks.stats.prefill import TokenLogprob
from sglang_auf.stats.bootstrap import Floats

RANKS = 20
"""Likeliest tokens that the judge tells at each place."""

LEVEL = 0.001
"""Share of lossless runs that fail."""

POWER = 0.9
"""Share of faulty runs in which a fault of the size `shows` is found."""

ENOUGH = 0.1
"""A fault of this size must be within a run's reach for it to pass: 10 % of tokens greedy, a temperature of 0.91."""

SKEWED = 0.5
"""Most skewness of a statistic that is used: beyond it, nobody has looked whether Pearson III is near enough."""

Ints = NDArray[np.int64]


class Statistic(NamedTuple):
    """score: chances [places, RANKS + 1], by rank and of all tokens behind them -> scores of the same shape.

    words: a size, for the terminal. relative: the size is relative to the sum of E f, not to that of Var f. depths: the
    (least, most) number in its verify step that a token must have; None: any.
    """

    name: str
    score: Callable[[Floats], Floats]
    words: Callable[[float], str]
    relative: bool = False
    depths: tuple[int, int] | None = None


class Outcome(StrictModel):
    """What a statistic says. p: two-sided, times the number of statistics. size, shows: as the module says; `shows` is
    the smallest size that this many tokens would have shown in POWER of the runs.

    z, p and size are None where it is not used; the other two only where no token is uncertain.
    """

    name: str
    tokens: int
    z: float | None = None
    p: float | None = None
    size: float | None = None
    shows: float | None = None
    skewness: float | None = None

    @property
    def enough(self) -> bool:
        """Whether it was used, and a fault of size ENOUGH was within its reach."""
        return self.p is not None and self.shows is not None and self.shows <= ENOUGH

    @property
    def needed(self) -> float:
        """About how many such tokens would be enough; 0 where that is not known."""
        if self.shows is None or self.skewness is None:
            return 0.0
        return self.tokens * max(self.shows / ENOUGH, abs(self.skewness) / SKEWED) ** 2


class Sampled(JudgedReport):
    """sampled.json, beside the run. tokens: that were judged. level: LEVEL."""

    STEM: ClassVar[str] = "sampled"

    level: float = LEVEL
    tokens: int = 0
    statistics: list[Outcome] = Field(default_factory=list)

    @property
    def faults(self) -> list[Outcome]:
        return [one for one in self.statistics if one.p is not None and one.p < self.level]

    @property
    def passed(self) -> bool:
        return self._enough and not (self.faults or self.failed)

    @property
    def _enough(self) -> bool:
        return bool(self.statistics) and all(one.enough for one in self.statistics[:2])

    def text(self) -> str:
        """For the terminal: the verdict, what it rests on, and a row for each statistic."""
        verdict = "consistent with draws from the target"
        if self.faults:
            verdict = f"NOT draws from the target: {', '.join(one.name for one in self.faults)}"
        elif not self._enough:
            needed = max(one.needed for one in self.statistics[:2])
            verdict = f"too few to show a fault of {ENOUGH:.0%}" + (f", about {needed:.0f} would do" if needed else "")
        outcome = f"{verdict} ({'passed' if self.passed else 'failed'})"
        lines = [f"{self.tokens} tokens of {self.answers} answers at temperature 1: {outcome}", *self.basis_lines()]
        columns = ("statistic", "tokens", "z", "p", "size", "would have shown")
        aligned = ("left", *["right"] * 5)
        lines += tabulate(map(_row, self.statistics), columns, disable_numparse=True, colalign=aligned).split("\n")
        lines.append(
            f"a lossless run fails once in {1 / self.level:,.0f}; a fault as large as the last column is found in "
            f"{POWER:.0%} of such runs"
        )
        return verdict_text(lines)


def _row(one: Outcome) -> list[str]:
    words = WORDS[one.name]
    row = [one.name, str(one.tokens), "not used", "-", "-", "-"]
    if one.shows is not None and one.shows <= 1:
        row[5] = words(one.shows)
    if one.z is not None and one.p is not None and one.size is not None:
        row[2:5] = f"{one.z:+.2f}", f"{one.p:.2g}", words(one.size)
    return row


def _greedy(size: float) -> str:
    return f"{100 * size:+.1f} % greedy"


def _temperature(size: float) -> str:
    return f"T = {1 / (1 + size):.3f}" if size > -1 else "T = inf"


def _more(size: float) -> str:
    return f"{100 * size:+.0f} %"


def _most_likely(chances: Floats) -> Floats:
    score = np.zeros_like(chances)
    score[:, 0] = 1 / chances[:, 0]
    return score


def _log_probability(chances: Floats) -> Floats:
    logprobs = np.log(chances[:, :-1])
    return np.concatenate([logprobs, logprobs[:, -1:]], axis=1)


def _ranks(first: int, end: int) -> Callable[[Floats], Floats]:
    """1 for the ranks first..end - 1, from 1 on; all tokens behind the last told one have rank RANKS + 1."""

    def score(chances: Floats) -> Floats:
        ones = np.zeros_like(chances)
        ones[:, first - 1 : end - 1] = 1
        return ones

    return score


ANYWHERE = (
    Statistic("most likely token", _most_likely, _greedy),
    Statistic("temperature", _log_probability, _temperature),
    Statistic("ranks 2 to 5", _ranks(2, 6), _more, relative=True),
    Statistic(f"behind rank {RANKS}", _ranks(RANKS + 1, RANKS + 2), _more, relative=True),
)
IN_STEPS = (
    Statistic("first of a step", _most_likely, _greedy, depths=(1, 1)),
    Statistic("after accepted drafts", _most_likely, _greedy, depths=(2, 1 << 30)),
)
WORDS = {statistic.name: statistic.words for statistic in (*ANYWHERE, *IN_STEPS)}


@dataclass(slots=True)
class Sums:
    """Over tokens: of f(drawn) - E f, of the second and third central moments of f, and of what a size of 1 adds."""

    tokens: int = 0
    difference: float = 0.0
    variance: float = 0.0
    third: float = 0.0
    unit: float = 0.0

    def outcome(self, name: str, among: int, level: float) -> Outcome:
        """among: how many statistics are tested together."""
        result = Outcome(name=name, tokens=self.tokens)
        if not (self.variance and self.unit):
            return result
        spread = self.variance**0.5
        result.skewness = skewness = self.third / spread**3
        bar = stats.norm.isf(level / among / 2) + stats.norm.isf(1 - POWER)
        result.shows = float(bar * spread / self.unit)
        if result.shows <= 1 and abs(skewness) <= SKEWED:
            result.z, result.size = self.difference / spread, self.difference / self.unit
            tail = min(stats.pearson3.cdf(result.z, skewness), stats.pearson3.sf(result.z, skewness))
            result.p = min(1.0, among * 2 * float(tail))
        return result


class Draws:
    """The statistics of a run, to which answers are added. in_steps: also those that need to know the verify steps."""

    def __init__(self, in_steps: bool) -> None:
        self._sums = [(statistic, Sums()) for statistic in (ANYWHERE + IN_STEPS if in_steps else ANYWHERE)]

    def add(self, told: list[TokenLogprob], depths: Ints | None) -> None:
        """told: of an answer's tokens, from the first one on. depths: as `step_depths` gives them."""
        ids = np.array([[token for _, token in at.top] for at in told])
        same = ids == np.array([[at.token] for at in told])
        drawn = np.where(same.any(axis=1), same.argmax(axis=1), RANKS)
        chances = np.exp([[value for value, _ in at.top] for at in told])
        chances = np.concatenate([chances, np.clip(1 - chances.sum(axis=1, keepdims=True), 0, None)], axis=1)
        for statistic, sums in self._sums:
            score = statistic.score(chances)
            mean = (chances * score).sum(axis=1, keepdims=True)
            off = score - mean
            variance = (chances * off**2).sum(axis=1)
            here = np.ones(len(told), dtype=bool)
            if statistic.depths is not None:
                least, most = statistic.depths
                here &= False if depths is None else (least <= depths) & (depths <= most)
            sums.tokens += int(here.sum())
            sums.difference += float(off[here, drawn[here]].sum())
            sums.variance += float(variance[here].sum())
            sums.third += float((chances * off**3)[here].sum())
            sums.unit += float((mean[:, 0] if statistic.relative else variance)[here].sum())

    def outcomes(self, level: float = LEVEL) -> list[Outcome]:
        return [sums.outcome(statistic.name, len(self._sums), level) for statistic, sums in self._sums]


def step_depths(record: Record, count: int) -> Ints | None:
    """Of the first `count` tokens of an answer, the number of each in its verify step, from 1 on; 0: prefill's token.

    None where the steps are not known.
    """
    if record.accepted_by_step is None:
        return None
    depths = [0, *(depth for accepted in record.accepted_by_step for depth in range(1, accepted + 2))]
    return np.array(depths[:count])


def check_sampled(run: JudgedRun, *, concurrency: int) -> Sampled:
    """Judge all tokens of a run at temperature 1 together. concurrency: prefills in flight. Raises ServerError."""
    result = Sampled(base_url=run.base_url, judge=run.judge, failed=run.failed, unjudged=run.unjudged)
    draws = Draws(in_steps=run.manifest.config.record_steps)
    for record, told in run.prefills(concurrency, top=RANKS):
        result.answers += 1
        result.tokens += len(told)
        draws.add(told, step_depths(record, len(told)))
    result.statistics = draws.outcomes()
    return result
