"""A target of 200 tokens whose distribution is written down, a drafter for it, and samplers that draw from it.

One of the samplers is lossless; each other one has a fault of speculative decoding.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Sampler = Callable[[Floats, int | None, int, np.random.Generator], int]
"""(probabilities, the draft at this place or None, how many tokens of this step are there, dice) -> the token."""

VOCABULARY, END = 200, 0
SHARPEST = 6.0


def draw(weights: Floats, dice: np.random.Generator) -> int:
    mass = weights.cumsum()
    return int(np.searchsorted(mass, dice.random() * mass[-1], side="right"))


def lossless(probabilities: Floats, draft: int | None, before: int, dice: np.random.Generator) -> int:
    """Accept the draft with its probability, else draw from the others: speculative sampling of a sure proposal."""
    if draft is None or dice.random() < probabilities[draft]:
        return draw(probabilities, dice) if draft is None else draft
    rest = probabilities.copy()
    rest[draft] = 0
    return draw(rest, dice)


def forgets_the_residual(probabilities: Floats, draft: int | None, before: int, dice: np.random.Generator) -> int:
    """A rejected draft may be drawn again."""
    if draft is not None and dice.random() < probabilities[draft]:
        return draft
    return draw(probabilities, dice)


def trusts_the_draft(probabilities: Floats, draft: int | None, before: int, dice: np.random.Generator) -> int:
    """Whatever is drafted is accepted."""
    return draw(probabilities, dice) if draft is None else draft


def now_and_then_greedy(share: float) -> Sampler:
    def sampler(probabilities: Floats, draft: int | None, before: int, dice: np.random.Generator) -> int:
        greedy = dice.random() < share
        return int(probabilities.argmax()) if greedy else lossless(probabilities, draft, before, dice)

    return sampler


def at_temperature(temperature: float) -> Sampler:
    def sampler(probabilities: Floats, draft: int | None, before: int, dice: np.random.Generator) -> int:
        return lossless(tempered(probabilities, temperature), draft, before, dice)

    return sampler


def with_top_k(count: int) -> Sampler:
    def sampler(probabilities: Floats, draft: int | None, before: int, dice: np.random.Generator) -> int:
        kept = np.where(probabilities >= np.sort(probabilities)[-count], probabilities, 0)
        return lossless(kept / kept.sum(), draft, before, dice)

    return sampler


def wrong_after_drafts(temperature: float) -> Sampler:
    """Right at the first token of a step alone."""

    def sampler(probabilities: Floats, draft: int | None, before: int, dice: np.random.Generator) -> int:
        return lossless(tempered(probabilities, temperature) if before else probabilities, draft, before, dice)

    return sampler


def tempered(probabilities: Floats, temperature: float) -> Floats:
    powers: Floats = probabilities ** (1 / temperature)
    return powers / powers.sum()


class KnownLaw:
    """The next token depends on the token before. Some of these distributions are nearly sure, some nearly flat.

    sampler: how `answer` draws. seed: of the law.
    """

    def __init__(self, sampler: Sampler = lossless, block: int = 4, seed: int = 0) -> None:
        self.sampler, self.block = sampler, block
        dice = np.random.default_rng(seed)
        sharpness = dice.uniform(0.5, SHARPEST, size=(VOCABULARY, 1))
        self.logits = sharpness * dice.normal(size=(VOCABULARY, VOCABULARY))
        self.logits[:, END] = self.logits.max(axis=1) - 5
        self.probabilities = np.exp(self.logits - np.logaddexp.reduce(self.logits, axis=1, keepdims=True))
        # Its drafts are the target's best token often, and not always.
        self.drafts = (self.logits + dice.normal(size=self.logits.shape)).argmax(axis=1)
        self.logprobs = np.log(self.probabilities)
        self._ranked = [
            [(float(row[token]), int(token)) for token in np.argsort(-row, kind="stable")] for row in self.logprobs
        ]

    def first(self, prompt: Sequence[int]) -> int:
        """The token that stands for a prompt."""
        return zlib.crc32(bytes(str(list(prompt)), "ascii")) % VOCABULARY

    def answer(self, prompt: Sequence[int], seed: int, limit: int) -> tuple[list[int], list[int]]:
        """Tokens up to END or `limit`, and the accepted drafts of each step. The first token is prefill's."""
        dice = np.random.default_rng(seed)
        tokens = [self.sampler(self.probabilities[self.first(prompt)], None, 0, dice)]
        steps: list[int] = []
        while tokens[-1] != END and len(tokens) < limit:
            accepted = 0
            while True:
                draft = int(self.drafts[tokens[-1]]) if accepted < self.block - 1 else None
                tokens.append(self.sampler(self.probabilities[tokens[-1]], draft, accepted, dice))
                if tokens[-1] != draft:
                    break
                accepted += 1
                if tokens[-1] == END or len(tokens) == limit:
                    break
            steps.append(accepted)
        return tokens, steps

    def told(self, prompt: Sequence[int], answer: Sequence[int], top: int) -> list[list[tuple[float, int]]]:
        """Of each token of an answer, (log-probability, token) of itself and of the `top` likeliest at its place."""
        before = [self.first(prompt), *answer[:-1]]
        return [
            [(float(self.logprobs[context, token]), token), *self._ranked[context][:top]]
            for context, token in zip(before, answer, strict=True)
        ]
