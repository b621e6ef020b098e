"""How long the parts of a decoding step take."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Stopwatch:
    """Adds up seconds by part, and logs the means of every so many steps. 0 steps: it does nothing."""

    def __init__(self, steps: int, now: Callable[[], float] = time.perf_counter) -> None:
        self.steps, self._now = steps, now
        self._spent: dict[str, float] = {}
        self._since = now()
        self._counted = 0

    def lap(self, part: str | None) -> None:
        """What passed since the last call belongs to `part`, or to no step."""
        if self.steps:
            now = self._now()
            if part is not None:
                self._spent[part] = self._spent.get(part, 0.0) + now - self._since
            self._since = now

    def step_ends(self) -> None:
        """After the last part of a step."""
        self._counted += 1
        if self._counted == self.steps:
            whole = sum(self._spent.values())
            parts = (f"{part} {1e3 * s / self.steps:.2f} ms ({s / whole:.1%})" for part, s in self._spent.items())
            logger.info("mean of %d steps: %.2f ms; %s", self.steps, 1e3 * whole / self.steps, ", ".join(parts))
            self._spent, self._counted = {}, 0
