"""Which drafter a server drafts with: swapped on request, watched afterwards, and taken back where tau fell."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from server.preflight import Speculation
from sglang_auf.acceptance import Acceptance, tau_error, total_acceptance
from sglang_auf.checkpoints.card import check_replaces
from sglang_auf.checkpoints.weights import check_finite, weights_sha256
from sglang_auf.errors import CardError, ServerError
from sglang_auf.files import weight_files
from sglang_auf.hooks import metrics

logger = logging.getLogger(__name__)

LOOKS = (25, 50, 100)
"""Finished requests after which tau is compared. After the last of them the new drafter is kept."""

DEVIATIONS = 2.576
"""Standard errors of the difference by which tau must have fallen: 99 % of a normal distribution, at each look."""

State = Literal["started", "watching", "kept", "taken back"]


class BusyError(ServerError):
    """A swap while another one runs."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished request. seconds: from its receipt to its end."""

    acceptance: Acceptance
    seconds: float


@dataclass(frozen=True, slots=True)
class Measured:
    """Tau of finished requests, and its standard error. longest: seconds that the longest of them took."""

    tau: float
    error: float
    requests: int
    longest: float

    @classmethod
    def of(cls, requests: Collection[Finished]) -> Self | None:
        """None of too few requests to compare with."""
        known = [request.acceptance for request in requests]
        tau, error = total_acceptance(known).tau, tau_error(known)
        if len(known) < LOOKS[0] or tau is None or error is None:
            return None
        return cls(tau, error, len(known), max(request.seconds for request in requests))

    def fell_to(self, after: Measured) -> bool:
        return self.tau - after.tau > DEVIATIONS * math.hypot(self.error, after.error)

    def __str__(self) -> str:
        return f"{self.tau:.2f} ± {DEVIATIONS * self.error:.2f} ({self.requests} requests)"


@dataclass(frozen=True, slots=True)
class Swap:
    """How the running drafter came to run.

    generation: swaps so far, those back included. other: the drafter that it is compared with: while it is watched the
    one that the server may go back to, and once that was done the one that was taken back. before, after: tau before
    the swap that was judged, and after it.
    """

    generation: int
    state: State
    other: Path | None = None
    before: Measured | None = None
    after: Measured | None = None


class Drafters:
    """The drafter that runs, and the one before it as long as it is not known which of them stays.

    Everything but the check of files runs in the event loop of SGLang's tokenizer manager. A request is counted for the
    drafter that was there from its beginning to its end. Behind a swap that leaves the short ones, which are no measure
    of traffic with long ones: what ends counts once the longest of the requests before the swap could have ended too.
    """

    def __init__(self, speculation: Speculation, now: Callable[[], float] = time.perf_counter) -> None:
        """now: the clock of when requests were received."""
        self.running = speculation
        self.swap = Swap(0, "started")
        self._former: Speculation | None = None
        self._now = now
        self._since = 0.0
        self._began = time.time()
        self._requests: deque[Finished] = deque(maxlen=LOOKS[-1])
        self._changing = False
        self._reading: asyncio.Task[None] | None = None
        self._verdict: asyncio.Task[None] | None = None
        self._swapping: asyncio.Task[Swap] | None = None
        metrics.LISTENERS.append(self.count)

    @property
    def watched(self) -> int:
        """Finished requests that count for the running drafter, LOOKS[-1] at most."""
        return len(self._requests)

    async def weights(self) -> str | None:
        """SHA-256 of the running drafter's weights, which are read when somebody first asks, not at the start.

        None where the files are gone, or are others by now than were loaded.
        """
        running = self.running
        if running.weights is None:
            if self._reading is None or self._reading.done():
                self._reading = asyncio.get_running_loop().create_task(self._read_weights())
            # To its end, also when the one who asked goes away: others may wait for it.
            await asyncio.shield(self._reading)
            if self.running.checked is not running.checked:
                return await self.weights()
        return self.running.weights

    def weights_so_far(self) -> str | None:
        """As `weights`, at once: None while they are read in the background, which this begins; empty without any."""
        if self.running.weights is not None:
            return self.running.weights
        if self._reading is None:
            self._reading = asyncio.get_running_loop().create_task(self._read_weights())
        if not self._reading.done():
            return None
        self._reading.result()  # raises what it raised
        return ""

    async def _read_weights(self) -> None:
        running = self.running
        found = await asyncio.to_thread(_unchanged_sha256, running.checked.path, self._began)
        if self.running is running and found is not None:
            self.running = replace(running, weights=found)

    async def replace(self, path: str) -> Swap:
        """Put the drafter in a directory in the place of the running one, which no request notices.

        Raises CardError where it cannot take that place, TargetError, and BusyError while another swap runs. Then the
        running drafter goes on. While a drafter is watched, another one takes its place and not the former one's.
        """
        if self._changing:
            raise BusyError("a swap while another one runs", "one swap at a time", "ask again when it has ended")
        self._changing = True
        # To its end, also when the client goes away: the scheduler may have swapped by then.
        self._swapping = asyncio.get_running_loop().create_task(self._replace(path))
        try:
            return await asyncio.shield(self._swapping)
        except asyncio.CancelledError:
            self._swapping.add_done_callback(_say_why_not)
            raise

    async def _replace(self, path: str) -> Swap:
        try:
            logger.info("DRAFTER: checking %s", path)
            candidate = await asyncio.to_thread(self._checked, path)
            await self.weights()  # of the running one, whose files may change once it is the former one
            await self._tell("swap", candidate)
            watching = self.swap.state == "watching"
            former = self._former if watching else self.running
            before = None if watching else Measured.of(self._requests)
            if before is None and self.swap.state in ("watching", "taken back"):
                before = self.swap.before  # of `former` too
            self._change_to(candidate)
            if former is None or before is None:  # nothing to compare with
                await self._tell("keep")
                self.swap = Swap(self.swap.generation + 1, "kept")
            else:
                self._former = former
                self.swap = Swap(self.swap.generation + 1, "watching", former.checked.path, before)
            metrics.count_swap(taken_back=False)
            logger.warning("DRAFTER: generation %d is %s, %s", self.swap.generation, path, self._of_before(before))
            return self.swap
        finally:
            self._changing = False

    def count(self, acceptance: Acceptance, received: float) -> None:
        """Note a finished request, received at that time of the clock. Decides at LOOKS."""
        now, before = self._now(), self.swap.before
        if acceptance.tau is None or received < self._since:
            return
        if before is not None and now < self._since + before.longest:
            return
        self._requests.append(Finished(acceptance, now - received))
        if before is None or self.swap.state != "watching" or self.watched not in LOOKS or self._changing:
            return
        after = Measured.of(self._requests)
        if after is None:
            return
        if before.fell_to(after):
            self._verdict = asyncio.get_running_loop().create_task(self._take_back(before, after))
        elif after.requests == LOOKS[-1]:
            self._verdict = asyncio.get_running_loop().create_task(self._keep(after))

    async def _take_back(self, before: Measured, after: Measured) -> None:
        if self._changing or self._former is None:  # a swap came first
            return
        self._changing = True
        try:
            refused = self.running
            await self._tell("take back")
            self._change_to(self._former)
            self._former = None
            self.swap = Swap(self.swap.generation + 1, "taken back", refused.checked.path, before, after)
            metrics.count_swap(taken_back=True)
            logger.warning(
                "DRAFTER: tau fell from %s to %s with %s; generation %d is %s again",
                *(before, after, refused.checked.path, self.swap.generation, self.running.checked.path),
            )
        except CardError:
            logger.exception("DRAFTER: tau fell from %s to %s, and the former drafter was not put back", before, after)
        finally:
            self._changing = False

    async def _keep(self, after: Measured) -> None:
        if self._changing:
            return
        self._changing = True
        try:
            await self._tell("keep")
            self._former = None
            self.swap = replace(self.swap, state="kept", other=None, after=after)
            logger.warning("DRAFTER: kept %s: tau %s before, %s since", self.running.drafter, self.swap.before, after)
        except CardError:
            logger.exception("DRAFTER: the former drafter stays in memory")
        finally:
            self._changing = False

    def _checked(self, path: str) -> Speculation:
        """The drafter in a directory, found to fit in the place of the running one. Reads all of its weights."""
        if not (os.path.isabs(path) and os.path.isdir(path)):  # pathlib's raises OSError where the name is too long
            raise CardError(f"path {path!r}", "the absolute path of a drafter's directory on the server's machine")
        try:
            checked = self.running.check(path)
            check_replaces(checked.config, self.running.checked.config)
            _check_memory(checked.path)
            check_finite(checked.path)
            weights = weights_sha256(checked.path)
        except OSError as problem:
            raise CardError(f"{path} cannot be read ({problem})", "files that the server may read") from problem
        for warning in checked.warnings:
            logger.warning("DRAFTER: %s", warning)
        return replace(self.running, drafter=path, checked=checked, weights=weights)

    def _change_to(self, other: Speculation) -> None:
        self.running = other
        self._requests.clear()
        self._since = self._now()

    async def _tell(self, action: Any, candidate: Speculation | None = None) -> None:
        """Have the scheduler do it. Raises CardError when it did not, and then nothing has changed."""
        from sglang.srt.entrypoints.http_server import get_global_state

        from sglang_auf.speculative import swap

        path = "" if candidate is None else str(candidate.checked.path)
        done = await swap.ask(get_global_state().tokenizer_manager, action, path)
        if action != "keep":
            logger.info("DRAFTER: no step for %.2f s; requests prefilled again: %d", done.seconds, done.requeued)

    def _of_before(self, before: Measured | None) -> str:
        if before is None:
            return f"kept without a comparison: fewer than {LOOKS[0]} requests were answered with the one before"
        return f"watched for {LOOKS[-1]} requests: tau was {before}"


def _check_memory(drafter: Path) -> None:
    """Raises CardError where it would not fit beside the running one: a system without memory ends processes."""
    from sglang_auf.cpu.memory import WEIGHT_COPIES, free_memory  # imports SGLang

    needed = WEIGHT_COPIES * sum(file.stat().st_size for file in drafter.glob("*.safetensors"))
    free = free_memory()
    if free < needed:
        raise CardError(
            f"{free / 2**20:.0f} MiB of free memory",
            f"{needed / 2**20:.0f} MiB, to load {drafter} beside the running drafter",
            "free some, or start a server with the new drafter and stop this one",
        )


def _unchanged_sha256(drafter: Path, since: float) -> str | None:
    """The digest of weights that nobody has written or linked since then (Unix time); None of others."""
    try:
        files = weight_files(drafter, CardError)
        if any(max(file.stat().st_ctime, file.lstat().st_ctime) > since for file in files):
            return None
        return weights_sha256(drafter)
    except (CardError, OSError):
        return None


def _say_why_not(swap: asyncio.Task[Swap]) -> None:
    """To the log, since the client is gone."""
    if not swap.cancelled() and (error := swap.exception()) is not None:
        logger.warning("DRAFTER: stays as it was: %s", error)
