"""When prompts come in an open loop: at times that do not depend on how quickly earlier ones are answered.

Users do not wait for each other. A closed loop does: where the server stalls, it asks less, and the requests that would
have waited are never counted (coordinated omission). So an open loop fixes when each request is due, and counts its
times from then on, also where it could not be sent yet.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Iterator


def poisson_arrivals(rate: float, seed: int) -> Iterator[float]:
    """Seconds after the beginning at which requests are due, without end: gaps are exponential with mean 1 / rate."""
    numbers = random.Random(seed)
    return itertools.accumulate(numbers.expovariate(rate) for _ in itertools.count())


def due_times(rate: float | None, seed: int) -> Iterator[float | None]:
    """When each request is due, from now on, in time.perf_counter's seconds; None at once, where there is no rate."""
    if rate is None:
        return itertools.repeat(None)
    now = time.perf_counter()
    return (now + seconds for seconds in poisson_arrivals(rate, seed))


async def until(due: float | None) -> None:
    """Sleep until then; not at all where that is past."""
    if due is not None:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
