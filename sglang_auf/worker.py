"""SGLang's DFLASH worker with exact verification at any temperature, and what it needs on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.sampler import sampler_softmax
from sglang.srt.speculative.dflash_worker_v2 import DFlashWorkerV2

from sglang_auf import sampler
from sglang_auf.cpu.linear import RowInvariantLinear


class AufWorker(DFlashWorkerV2):  # type: ignore[misc]
    """Drafts, verifies and commits as DFLASH does; draws the target's token at every slot with the request's seed.

    Upstream's own sampling verification ignores min_p and seeds, and without its CUDA kernel verifies greedily
    whatever the temperature (dflash_worker_v2.py `_accept_block`).
    """

    def _accept_block(
        self,
        *,
        candidates: torch.Tensor,
        next_token_logits: torch.Tensor,
        sampling_info: Any,
        draft_input: Any,
        prefix_lens: torch.Tensor,
        bs: int,
        target_predict: torch.Tensor | None = None,
    ) -> Any:
        """candidates [bs, B] (anchor and drafts), next_token_logits [bs * B, vocabulary].

        Greedy requests go upstream unchanged. Otherwise the target's tokens are drawn here, and upstream's greedy
        acceptance of those tokens is exact speculative sampling (sglang_auf/sampling.py).
        """
        if target_predict is None and sampling_info is not None and not sampling_info.is_all_greedy:
            block = candidates.shape[1]
            temperatures = sampling_info.temperatures.repeat_interleave(block, dim=0)
            probabilities = sampler_softmax(next_token_logits / temperatures)
            positions = prefix_lens[:, None] + torch.arange(block, device=prefix_lens.device)
            target_predict = sampler.draw(probabilities, sampling_info, positions, rows_per_request=block)
        return super()._accept_block(
            candidates=candidates,
            next_token_logits=next_token_logits,
            sampling_info=sampling_info,
            draft_input=draft_input,
            prefix_lens=prefix_lens,
            bs=bs,
            target_predict=target_predict,
        )

    def _validate_phase1_sampling_support(self, batch: Any) -> None:
        """Upstream warns here that it will verify greedily; we do not."""

    def _greedy_sample_from_vocab_parallel_head(
        self, *, hidden_states: torch.Tensor, lm_head: Any, chunk_size: int = 256
    ) -> torch.Tensor:
        """Drafts of hidden_states [slots, hidden]: on a CPU through the head's reordered weight."""
        if isinstance(getattr(lm_head, "quant_method", None), RowInvariantLinear):
            return self._greedy_sample_from_quantized_head(
                hidden_states=hidden_states, lm_head=lm_head, chunk_size=chunk_size
            )
        return super()._greedy_sample_from_vocab_parallel_head(
            hidden_states=hidden_states, lm_head=lm_head, chunk_size=chunk_size
        )
