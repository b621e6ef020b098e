"""The keys and values of accepted tokens in the drafter's cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sglang_auf.cpu.replay import Recorded
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
