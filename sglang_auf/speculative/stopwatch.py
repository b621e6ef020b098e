"""How long the parts of a decoding step take."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)


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
