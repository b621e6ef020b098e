"""The keys and values of accepted tokens in the drafter's cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from sglang_auf.cpu.replay import ROWS, Recorded
from sglang_auf.env import REPLAY, ROW_INVARIANT


class Commit(Recorded):
    """Computes them from the target's features of those tokens, and writes them to their slots.

    Called as (features [tokens, taps * hidden], positions int64 [tokens], slots of the drafter's cache int64 [tokens]).
    """

    def __init__(self, worker: Any) -> None:
        """worker: SGLang's, with the drafter that it has now."""
        super().__init__("the drafter's context")
        self.worker = worker
        # A publication beside the write, which upstream's method makes for drafters of that kind, is no kernel.
        self.refused = not (REPLAY.is_on() and ROW_INVARIANT.is_on()) or worker.lilicorr is not None

    def compute(self, features: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> None:
        self.worker._append_target_hidden_to_draft_kv_by_loc(
            target_hidden=features, cache_loc=slots, positions=positions
        )

    def results(self, output: None, given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        pool, layers = self.worker.draft_model_runner.token_to_kv_pool, self.worker.draft_model.layers
        return [pool.interleaved(layer.self_attn.attn.layer_id)[given[2]] for layer in layers]


class Context:
    """The drafter's context, written when it will be read.

    While nothing is drafted nobody reads it, and the products of many tokens take hardly longer than those of one. So
    what a step committed is held back until something is drafted, until as many tokens are held as a recording has room
    for, or until a slot that they go to may be given to another request.
    """

    def __init__(self, worker: Any) -> None:
        self._commit = Commit(worker)
        self._held: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._requests: torch.Tensor | None = None
        self._holds = worker.lilicorr is None  # upstream publishes what it writes for drafters of that kind

    def add(self, requests: torch.Tensor, *committed: torch.Tensor) -> None:
        """committed: as Commit is called. requests: rows of SGLang's table of requests, those that take part."""
        self._held.append(committed)
        self._requests = requests
        if not self._holds:
            self.write()

    def write_if_due(self, requests: torch.Tensor, drafts: bool) -> float:
        """Before a step of these requests. Returns the seconds that it took, where they are not this kind of step's.

        What steps left that drafted nothing is not one's that drafts. That they were too many is in their mean.

        Slots are freed when a request ends or is retracted, so while the same requests decode none has another owner.
        """
        if not self._held:
            return 0.0
        held, latest = sum(len(slots) for *_, slots in self._held), len(self._held[-1][-1])
        asked_for = drafts or not torch.equal(requests, self._requests)
        if not asked_for and held + latest <= ROWS:
            return 0.0
        began, steps = time.perf_counter(), len(self._held)
        self.write()
        return time.perf_counter() - began if asked_for and steps > 1 else 0.0

    def write(self) -> None:
        """All that is held."""
        if self._held:
            parts = [torch.cat(part).split(ROWS) for part in zip(*self._held, strict=True)]
            self._held.clear()
            for some in zip(*parts, strict=True):
                self._commit(*some)
