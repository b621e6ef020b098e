"""How many nodes a step verifies, over all its requests: as many as raise the emitted tokens per second.

With one request a verify pass of many rows costs little more than one token. With many requests each further row takes
time from all of them. Three estimates decide, which a worker feeds at every step:

    chances     P(a node is accepted | its parent is): the drafter's probability times what was accepted lately of such
                nodes, by slot, rank, whether the path has branched, and whether the request samples
    gains       the probability of the n-th node per request, which says before drafting what drafting will bring
    seconds     of a step with n requests, r rows verified and b rows drafted: weighted least squares over recent steps
                of the time that the products of r and of b rows take (a staircase, measured once when the model is
                loaded), of r, of b and of n, no factor below 0

Since the time is a staircase, the best of all numbers of nodes is taken, not the first after which the next node does
not pay. None at all is plain decoding: then nothing is drafted, and only the drafter's cache is kept up to date.
No answer depends on any of this, so it may depend on measured time. Arithmetic only, no torch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import nnls

from sglang_auf.speculative.tree import Chances, Node

logger = logging.getLogger(__name__)

FORGET = 0.98
"""Factor on the weight of earlier steps, at every step. About the last 50 steps count."""

EXPLORE_EVERY = 24
"""One step in so many does the other thing, drafting or not, so that the estimates of both stay current."""

CLEAR, RARELY = 1.2, 5
"""Where one of them is so many times better, only one in so many of those steps does the other."""

NEWS = 0.2
"""Most weight of what one step drafts in what drafting is taken to bring: it counts for the plain steps before it."""

WORTH = 1.05
"""Drafting has to bring so much. Closer to 1, errors of the estimates decide, and steps that draft cost more to try."""

FLOOR = 0.02
"""Nodes less likely than this are not considered."""

NODES, NODES_PER_REQUEST = 28, 4
"""Most nodes that are considered: so many, and so many for each request."""

MOST_ROWS = 1024
"""With more rows than these, a step is taken to cost what it costs with them."""

PRIOR_NODES = 2.0
"""Weight of a chance as the drafter gives it, in accepted nodes."""

SELDOM = 0.05
"""A slot used in fewer of the steps than this is not drafted."""

SURPRISE = 3.0
"""A step that took so many times what was expected was held up by something else, and counts as this many times."""

LEARNS_QUICKLY, NOW_AND_THEN = 32, 4
"""After so many steps, what a step costs is computed from what was observed every few steps only, since that takes time
too. Whether drafting pays is asked every few steps from the beginning, and whenever the number of requests changes."""

Staircase = Callable[[int], float]
"""Seconds that the products of a model take for so many rows."""


@dataclass
class Calibration:
    """Factors on the drafter's probabilities, [samples, branched, slots, ranks]."""

    slots: int
    ranks: int
    _expected: np.ndarray = field(init=False)
    _accepted: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self._expected = np.full((2, 2, self.slots, self.ranks), PRIOR_NODES)
        self._accepted = self._expected.copy()

    def chances(self, drafted: np.ndarray, samples: Sequence[bool]) -> list[Chances]:
        """Of each request. drafted: probabilities [requests, slots, ranks]. samples: whether it draws its tokens."""
        factors = (self._accepted / self._expected)[np.array(samples, dtype=int), :, : drafted.shape[1]]
        found: list[Chances] = np.minimum(factors * drafted[:, None], 1.0).tolist()
        return found

    def observe(self, tested: Iterable[tuple[Node, bool]], drafted: np.ndarray, samples: Sequence[bool]) -> None:
        """tested: nodes whose parent was accepted, and whether they were. drafted: [requests, slots, ranks]."""
        for node, accepted in tested:
            at = (int(samples[node.request]), int(node.branched), node.slot, node.rank)
            self._expected[at] = (self._expected[at] - PRIOR_NODES) * FORGET + PRIOR_NODES
            self._accepted[at] = (self._accepted[at] - PRIOR_NODES) * FORGET + PRIOR_NODES
            self._expected[at] += drafted[node.request, node.slot, node.rank]
            self._accepted[at] += accepted


class Costs:
    """Expected seconds of a step with n requests, r rows verified and b rows drafted."""

    # A prior as strong as so many steps: the products take what was measured; the rest, as much as the products of one
    # row. Of typical steps: requests, rows, rows drafted.
    _PRIOR = np.array([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    _TYPICAL = np.array([2.0, 0.5, 1.0, 2.0, 16.0, 16.0])
    _STRENGTH = np.array([8.0, 4.0, 1.0, 1.0, 1.0, 1.0])

    def __init__(self, verify: Staircase, draft: Staircase) -> None:
        self._unit = max(verify(1), 1e-9)
        self._stairs = np.array([[of(rows) / self._unit for rows in range(MOST_ROWS + 1)] for of in (verify, draft)])
        self._normal, self._moment = np.zeros((6, 6)), np.zeros(6)
        self._weights = self._PRIOR
        self._observed = 0
        self._to_learn: list[tuple[list[float], float]] = []  # facts of a step, and what it took in units

    def _facts(self, requests: int, rows: int, drafted: int) -> list[float]:
        verify, draft = self._stairs[0, min(rows, MOST_ROWS)], self._stairs[1, min(drafted, MOST_ROWS)]
        return [verify, draft, 1.0, requests, rows, drafted]

    def seconds(self, requests: int, rows: np.ndarray, drafted: int) -> np.ndarray:
        """Of each of `rows`."""
        of_products, *others = self._weights.tolist()
        of_rows = others[3]
        fixed = sum(weight * fact for weight, fact in zip(others, self._facts(requests, 0, drafted)[1:], strict=True))
        verify = self._stairs[0, np.minimum(rows, MOST_ROWS)]
        found: np.ndarray = self._unit * (of_products * verify + of_rows * rows + fixed)
        return found

    def observe(self, requests: int, rows: int, drafted: int, seconds: float) -> None:
        """What such a step took."""
        self._to_learn.append((self._facts(requests, rows, drafted), seconds / self._unit))
        self._observed += 1
        if self._observed <= LEARNS_QUICKLY or self._observed % NOW_AND_THEN == 0:
            self._learn()

    def _learn(self) -> None:
        facts = np.array([row for row, _ in self._to_learn])
        expected = np.maximum(facts @ self._weights, 1.0)
        took = np.minimum([seconds for _, seconds in self._to_learn], SURPRISE * expected)
        self._to_learn.clear()
        # What disturbs a step disturbs a long one more, so errors count as shares of what was expected.
        facts, took = facts / expected[:, None], took / expected
        kept = FORGET ** np.arange(len(took))[::-1]
        self._normal = FORGET ** len(took) * self._normal + (kept[:, None] * facts).T @ facts
        self._moment = FORGET ** len(took) * self._moment + (kept * took) @ facts
        typical = self._TYPICAL / max(float(self._weights @ self._TYPICAL), 1.0)
        prior = np.diag(self._STRENGTH * typical**2)
        # Nothing makes a step shorter. To set what a free solution has below 0 to 0 would leave the others too large.
        try:
            root = np.linalg.cholesky(self._normal + prior)
            self._weights, _ = nnls(root.T, np.linalg.solve(root, self._moment + prior @ self._PRIOR))
        except (np.linalg.LinAlgError, RuntimeError):  # numbers that it cannot solve are not worth a server's life
            logger.warning("BUDGET: what a step costs stays as it was", exc_info=True)


class Budget:
    """Chooses how many slots to draft, and then how many nodes to verify."""

    def __init__(self, slots: int, costs: Costs, fixed: int | None = None) -> None:
        """slots: what a full block drafts, B - 1. fixed: nodes of each request, whatever the load."""
        self.slots, self.costs, self.fixed = slots, costs, fixed
        self._gains = np.zeros(0)  # probability of the n-th node per request
        self._deep = np.ones(slots)  # how often a slot was used lately
        self._alike = 0  # steps since the last one that did the other thing
        self._tries = False  # whether this step drafts although that does not seem to pay
        self._plain = 0  # steps since the last one that drafted
        self._asked_for = 0, 0  # requests, and those of them that take drafts
        self._answer = slots, 1.0  # slots to draft, and the advantage of drafting them

    def to_draft(self, requests: int, taking: int | None = None) -> int:
        """Slots to draft for each request in the next step, 0 .. slots. taking: requests that take drafts, if not all.

        The drafter computes them for all requests, so that with few of them it may not pay.
        """
        taking = requests if taking is None else taking
        if not taking:
            return 0
        if self.fixed is not None:
            return self.slots
        if not len(self._gains):
            return self._useful()
        if (requests, taking) != self._asked_for or self._alike % NOW_AND_THEN == 0:
            slots = self._useful()
            self._asked_for, self._answer = (requests, taking), (slots, self._advantage(requests, taking, slots))
        slots, advantage = self._answer
        clear = not 1 / CLEAR < advantage < CLEAR
        self._alike += 1
        explores = self._alike >= EXPLORE_EVERY * (RARELY if clear else 1)
        if explores:
            self._alike = 0
        drafts = (advantage > WORTH) != explores
        self._tries = drafts and explores
        self._plain += not drafts
        return slots if drafts else 0

    def _useful(self) -> int:
        used = np.nonzero(self._deep > SELDOM)[0]
        return min(int(used[-1]) + 2 if len(used) else 1, self.slots)  # one more than needed, to see whether it is

    def _advantage(self, requests: int, taking: int, slots: int) -> float:
        """Expected tokens per second with drafts over those without."""
        nodes = np.repeat(self._gains, taking)[: self.most(requests)]
        best, _ = self._best(requests, nodes, requests * (slots + 1))
        return best * float(self.costs.seconds(requests, np.array([requests]), 0)[0]) / requests

    def _best(self, requests: int, likely: np.ndarray, drafted: int) -> tuple[float, int]:
        """Highest expected tokens per second, and the number of nodes that gives it."""
        emitted = requests + np.concatenate([[0.0], likely.cumsum()])
        rates = emitted / self.costs.seconds(requests, requests + np.arange(len(emitted)), drafted)
        best = int(np.argmax(rates))
        return float(rates[best]), best

    def most(self, requests: int) -> int:
        """Most nodes to consider in a step: more than a batch of that size ever verifies."""
        return self.fixed * requests if self.fixed is not None else NODES + NODES_PER_REQUEST * requests

    def to_verify(self, requests: int, nodes: Sequence[Node], drafted: int, taking: int | None = None) -> int:
        """How many of `nodes`, which descend. drafted: rows drafted. taking: as for to_draft."""
        if self.fixed is not None:
            return len(nodes)
        likely = np.array([node.likely for node in nodes])
        # Nodes that the floor or a request's limit left out count as never accepted, or they would keep an old gain.
        taking = requests if taking is None else taking
        places = self.most(requests) // taking
        padded = np.zeros(max(places * taking, len(likely)))
        padded[: len(likely)] = likely
        means = padded[: places * taking].reshape(places, taking).mean(axis=1)
        known = self._gains[:places]
        known += min(1 - FORGET ** (1 + self._plain), NEWS) * (means[: len(known)] - known)
        self._plain = 0
        if places > len(self._gains):
            self._gains = np.concatenate([known, means[len(known) :]])
        best = self._best(requests, likely, drafted)[1]
        # A step that only tries must verify something, or a drafter that was wrong for a while is never believed again.
        return max(best, min(requests, len(nodes))) if self._tries else best

    def used(self, nodes: Sequence[Node], slots: int) -> None:
        """Note which of the drafted slots the chosen nodes are at."""
        at = np.zeros(slots)
        at[[node.slot for node in nodes]] = 1
        self._deep[:slots] += (1 - FORGET) * (at - self._deep[:slots])


class Stopwatch:
    """Adds up seconds by part, and logs the means of every so many steps. 0 steps: it does nothing."""

    def __init__(
        self, steps: int, in_kernels: Callable[[], float], now: Callable[[], float] = time.perf_counter
    ) -> None:
        """in_kernels: seconds so far that passed in kernels. What is left of a step is Python, torch and waiting."""
        self.steps, self._in_kernels, self._now = steps, in_kernels, now
        self._spent: dict[str, float] = {}
        self._kernels = 0.0
        self._since, self._kernels_since = now(), in_kernels()
        self._counted = 0

    def lap(self, part: str | None) -> None:
        """What passed since the last call belongs to `part`, or to no step."""
        if self.steps:
            now, kernels = self._now(), self._in_kernels()
            if part is not None:
                self._spent[part] = self._spent.get(part, 0.0) + now - self._since
                self._kernels += kernels - self._kernels_since
            self._since, self._kernels_since = now, kernels

    def step_ends(self) -> None:
        """After the last part of a step."""
        self._counted += 1
        if self._counted == self.steps:
            whole = sum(self._spent.values())
            parts = (f"{part} {1e3 * s / self.steps:.2f} ms ({s / whole:.1%})" for part, s in self._spent.items())
            logger.info(
                "mean of %d steps: %.2f ms, of it %.2f ms (%.1f%%) in kernels; %s",
                *(self.steps, 1e3 * whole / self.steps, 1e3 * self._kernels / self.steps),
                *(100 * self._kernels / whole, ", ".join(parts)),
            )
            self._spent, self._kernels, self._counted = {}, 0.0, 0
