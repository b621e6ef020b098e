"""Chooses the block size of each step, so that the server drafts less when many requests share it.

With one request, a verify pass of a full block costs little more than one token. With many requests, each further slot
takes time from the other requests. The block size b that emits the most tokens per second with n requests follows from
two estimates that a worker updates at every step:

    tau(b)        = 1 + sum_{k<b} prod_{i<=k} alpha_i       from recently accepted drafts (acceptance.py)
    seconds(n, b) = base + per_request n + per_slot n b     least squares over recent steps

The block size changes no answer, so the choice may depend on measured time. A block of one is plain decoding: the
drafter drafts nothing and only keeps its cache up to date. Arithmetic only, no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from operator import mul

import numpy as np

SMALLEST = 1
"""The smallest block: the anchor without a draft."""

FORGET = 0.98
"""Factor on the weight of earlier steps, at every step. About the last 50 steps count."""

EXPLORE_EVERY = 24
"""A neighbouring block is tried once in this many steps, so that the estimates for other blocks stay current."""

SLOTS_FOR_BASE = 48
"""Prior: reading the weights costs as much as this many slots."""

PRIOR_STEPS = 4.0
"""Prior weight of each alpha, in steps; the prior mean is 0.5."""


class BlockChooser:
    """Chooses the block of the next step, `smallest` .. `largest`, from the steps it has observed."""

    def __init__(self, largest: int, smallest: int = SMALLEST) -> None:
        if not SMALLEST <= smallest < largest:
            raise ValueError(f"blocks of {smallest} to {largest} leave nothing to choose")
        self.largest, self.smallest = largest, smallest
        self._steps = 0
        self._tried = np.full(largest - 1, PRIOR_STEPS)
        self._right = np.full(largest - 1, PRIOR_STEPS / 2)
        self._normal: np.ndarray | None = None  # [3, 3] and [3]: weighted least squares
        self._moment = np.zeros(3)

    def choose(self, requests: int) -> int:
        """The block of the next step. requests: how many are in it."""
        if self._normal is None:
            return self.largest
        rates = [self.tau(block) / self.seconds(requests, block) for block in range(self.smallest, self.largest + 1)]
        best = self.smallest + int(np.argmax(rates))
        if self._steps % EXPLORE_EVERY == 0:
            up = (self._steps // EXPLORE_EVERY) % 2 == 0
            return min(max(best + (1 if up else -1), self.smallest), self.largest)
        return best

    def observe(self, requests: int, block: int, seconds: float, accepted: Sequence[int]) -> None:
        """Learn from one step. seconds: its duration. accepted: accepted drafts of each request, 0 .. block - 1."""
        self._steps += 1
        counts = np.bincount(accepted, minlength=self.largest)
        reached = counts[::-1].cumsum()[::-1].astype(float)  # requests with k accepted drafts or more
        drafted = block - 1
        self._tried[:drafted] = FORGET * self._tried[:drafted] + reached[:drafted]
        self._right[:drafted] = FORGET * self._right[:drafted] + reached[1 : drafted + 1]
        row = np.array([1.0, requests, requests * block])
        if self._normal is None:
            # The prior of the costs, with the weight of one step.
            base = seconds / (1 + requests * block / SLOTS_FOR_BASE)
            prior = np.diag([1.0, 1.0, float(requests * block) ** 2])
            self._normal, self._moment = prior, prior @ np.array([base, 0.0, base / SLOTS_FOR_BASE])
        self._normal = FORGET * self._normal + np.outer(row, row)
        self._moment = FORGET * self._moment + row * seconds

    def alpha(self, k: int) -> float:
        """Recent P(draft k accepted | the k - 1 before it accepted), k from 1."""
        return float(self._right[k - 1] / self._tried[k - 1])

    def tau(self, block: int) -> float:
        """Expected emitted tokens per request and step."""
        return 1.0 + sum(accumulate((self.alpha(k) for k in range(1, block)), mul), start=0.0)

    def seconds(self, requests: int, block: int) -> float:
        """Expected duration of a step."""
        assert self._normal is not None
        # Where steps are collinear the decaying prior decides; once it has faded, the minimum-norm solution.
        costs = np.linalg.lstsq(self._normal, self._moment, rcond=1e-9)[0].clip(min=0.0)
        return max(float(costs @ [1.0, requests, requests * block]), 1e-6)
