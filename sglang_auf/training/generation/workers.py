"""What the workers of `prompts` and `regenerate` share: seeds, a progress bar, and one end for all of them."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Coroutine, Iterable
from typing import Any, Self

from tqdm import tqdm

GIVE_UP_AFTER = 16
"""Failures in a row after which a run stops: the server is taken to be down."""


def seed_of(seed: int, id: str, turn: int) -> int:
    """The sampling seed of one request. A resumed run draws the same one."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{id}/{turn}".encode()).digest()[:4]) >> 1


async def run_workers(workers: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run all of them at once. The first that raises ends the others, and its error is raised."""
    tasks = [asyncio.create_task(worker) for worker in workers]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Progress:
    """A bar of finished rows, with tokens per second and the time left. Tokens of unfinished rows count too."""

    def __init__(self, rows: int, done: int) -> None:
        self._bar = tqdm(total=rows, initial=done, unit="row", dynamic_ncols=True, smoothing=0.05)
        self._tokens = 0
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add_tokens(self, count: int) -> None:
        self._tokens += count
        rate = self._tokens / max(time.monotonic() - self._started, 1e-3)
        self._bar.set_postfix_str(f"{self._tokens} tokens, {rate:.0f} tokens/s", refresh=False)

    def add_row(self) -> None:
        self._bar.update()
