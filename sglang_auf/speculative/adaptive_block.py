"""How many slots to draft, by what a step costs now and how far drafts get: speculation that steps back under load.

With one request in flight a verify pass of a whole block costs little more than one token; with many, every further
slot of every request is arithmetic that could have served another request. Which block emits the most tokens a second
follows from two things that a worker sees at every step:

    tau(b)      = 1 + sum_{k<b} prod_{i<=k} alpha_i         from the drafts accepted lately (acceptance.py)
    seconds(n, b) = base + per_request n + per_slot n b     least squares over the steps of late

A block size changes no answer, whatever it is, so the choice is free to follow the clock. A block of one is plain
decoding: the drafter is not asked, and only kept up to date. Pure arithmetic: no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

import numpy as np

SMALLEST = 1
"""Of blocks: the anchor and no draft."""

FORGET = 0.98
"""What a step weighs one step later, in costs and in acceptance: about the last 50 steps count."""

EXPLORE_EVERY = 24
"""Steps after which a neighbouring block is tried once, so that costs and alphas of other blocks stay known."""

SLOTS_FOR_BASE = 48
"""Slots that cost as much as the rest of a step, before any step was seen: a pass that is bound by reading weights."""

TRIED = 4.0
"""Steps that the alphas are taken to have been seen for before any was: at one half."""


class BlockChooser:
    """Chooses the block of the next step, `smallest` .. `largest`, from the steps it was told of."""

    def __init__(self, largest: int, smallest: int = SMALLEST) -> None:
        if not SMALLEST <= smallest < largest:
            raise ValueError(f"blocks of {smallest} to {largest}, where there is nothing to choose")
        self.largest, self.smallest = largest, smallest
        self._steps = 0
        self._tried = np.full(largest - 1, TRIED)
        self._right = np.full(largest - 1, TRIED / 2)
        self._normal: np.ndarray | None = None  # [3, 3] and [3]: least squares, old steps fading
        self._moment = np.zeros(3)

    def choose(self, requests: int) -> int:
        """The block of a step of so many requests."""
        if self._normal is None:
            return self.largest
        rates = [self.tau(block) / self.seconds(requests, block) for block in range(self.smallest, self.largest + 1)]
        best = self.smallest + int(np.argmax(rates))
        if self._steps % EXPLORE_EVERY == 0:
            up = (self._steps // EXPLORE_EVERY) % 2 == 0
            return min(max(best + (1 if up else -1), self.smallest), self.largest)
        return best

    def observe(self, requests: int, block: int, seconds: float, accepted: Sequence[int]) -> None:
        """A step of `requests` requests took `seconds`; accepted: drafts, of each request, 0 .. block - 1."""
        self._steps += 1
        counts = np.bincount(accepted, minlength=self.largest)
        reached = counts[::-1].cumsum()[::-1].astype(float)  # of k drafts or more
        drafted = block - 1
        self._tried[:drafted] = FORGET * self._tried[:drafted] + reached[:drafted]
        self._right[:drafted] = FORGET * self._right[:drafted] + reached[1 : drafted + 1]
        row = np.array([1.0, requests, requests * block])
        if self._normal is None:
            # What a pass is expected to cost, with the weight of one step, until others are seen.
            base = seconds / (1 + requests * block / SLOTS_FOR_BASE)
            prior = np.diag([1.0, 1.0, float(requests * block) ** 2])
            self._normal, self._moment = prior, prior @ np.array([base, 0.0, base / SLOTS_FOR_BASE])
        self._normal = FORGET * self._normal + np.outer(row, row)
        self._moment = FORGET * self._moment + row * seconds

    def alpha(self, k: int) -> float:
        """P(draft k accepted, given the k - 1 before it), k from 1, of late."""
        return float(self._right[k - 1] / self._tried[k - 1])

    def tau(self, block: int) -> float:
        """Expected emitted tokens of a request in a step of that block."""
        return 1.0 + sum(accumulate((self.alpha(k) for k in range(1, block)), mul), start=0.0)

    def seconds(self, requests: int, block: int) -> float:
        """Expected duration of a step."""
        assert self._normal is not None
        # What the steps do not tell apart, the fading prior does, and the smallest solution after it.
        costs = np.linalg.lstsq(self._normal, self._moment, rcond=1e-9)[0].clip(min=0.0)
        return max(float(costs @ [1.0, requests, requests * block]), 1e-6)
