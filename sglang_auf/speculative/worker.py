"""SGLang's DFLASH worker with exact verification at any temperature, draft vocabularies and adaptive blocks."""

from __future__ import annotations

import dataclasses
import time
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.sampler import sampler_softmax
from sglang.srt.model_executor.runner_utils.pool import borrow_graph_pool
from sglang.srt.speculative.dflash_worker_v2 import (
    DFlashWorkerV2,
    _DflashDraftSampler,
    build_block_pos_offsets,
    make_draft_block_spec_info,
)
from sglang.srt.speculative.spec_tp_sync import SpecTpSyncSite

from sglang_auf.checkpoints import draft_vocabulary
from sglang_auf.cpu.linear import RowInvariantLinear
from sglang_auf.env import ADAPTIVE_BLOCK
from sglang_auf.speculative import sampler_backend, sampling
from sglang_auf.speculative.adaptive_block import SMALLEST, BlockChooser
from sglang_auf.speculative.draft_head import DraftHead, ListedDraftSampler

# Attributes of the upstream worker that depend on the block size (dflash_worker_v2.py).
PER_BLOCK_SIZE = (
    "_block_pos_offsets",
    "_draft_block_spec_info",
    "_draft_block_ids_buf",
    "_draft_block_positions_buf",
    "_draft_block_tokens_buf",
    "_draft_verify_out_cache_loc_buf",
    "_draft_block_end_buf",
    "_draft_seq_lens_cpu_buf",
    "_accept_len_buf",
    "_commit_lens_bufs",
    "_bonus_id_bufs",
    "_out_tokens_bufs",
    "_new_seq_lens_bufs",
    "_accept_bonus_buffer_cap",
)

# What is drawn to see how much memory it takes: no filter, top_k, and top_p alone, for which everything is sorted.
REHEARSED = ((sampling.PLAIN, 1 << 30, 1.0), (sampling.POOLS[0], 20, 0.95), (sampling.OPEN, 1 << 30, 0.95))


class _NoDraft:
    """Stands in for the drafter's model runner in a step with a block of one, whose drafting pass would be wasted."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def forward(self, forward_batch: Any) -> Any:
        # States of the anchors only: with a block of one, no drafted positions follow.
        output = SimpleNamespace(hidden_states=forward_batch.input_embeds)
        return SimpleNamespace(logits_output=output, can_run_graph=False)


class AufWorker(DFlashWorkerV2):  # type: ignore[misc]
    """Drafts, verifies and commits as DFLASH does, but draws the target's token at every slot with the request's seed.

    Upstream's sampling verification ignores min_p and seeds, and without its CUDA kernel it verifies greedily at any
    temperature (dflash_worker_v2.py `_accept_block`).
    """

    block_size: int
    draft_model_runner: Any
    _chooser: BlockChooser | None = None
    _blocks: dict[int, dict[str, Any]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _ = self._draft_head  # refuses a draft vocabulary that does not fit the target's head now, not in a request
        if ADAPTIVE_BLOCK.is_on():
            # Domino's head needs at least one draft.
            self._chooser = BlockChooser(int(self.block_size), smallest=2 if self._is_domino else SMALLEST)
            self._blocks = {}

    def forward_batch_generation(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """One step, as upstream. With ADAPTIVE_BLOCK, decoding steps use the block size that fits the load."""
        chooser, mode = self._chooser, batch.forward_mode
        if chooser is None or not mode.is_decode() or batch.is_extend_in_batch:
            return super().forward_batch_generation(batch, *args, **kwargs)
        requests = len(batch.seq_lens)
        block = chooser.choose(requests)
        self._use_block(block)
        began = time.perf_counter()
        drafter = self.draft_model_runner
        try:
            if block == 1:
                self.draft_model_runner = _NoDraft(drafter)
            result = super().forward_batch_generation(batch, *args, **kwargs)
        finally:
            self.draft_model_runner = drafter
        accepted = [length - 1 for length in result.accept_lens.tolist()]
        chooser.observe(requests, block, time.perf_counter() - began, accepted)
        # SGLang carries this to the reply's counts, as it does for DSPARK (batch_result_processor.py).
        result.cap_lens = torch.full((requests,), block, dtype=torch.int32, device=result.accept_lens.device)
        return result

    def _use_block(self, block: int) -> None:
        """Draft and verify `block` slots from now on, with upstream's attributes for that block size."""
        current = int(self.block_size)
        if block == current:
            return
        self._blocks[current] = {name: getattr(self, name) for name in PER_BLOCK_SIZE}
        kept = self._blocks.get(block)
        if kept is None:
            kept = dict.fromkeys(PER_BLOCK_SIZE) | {
                "_block_pos_offsets": build_block_pos_offsets(length=block, device=self.device),
                "_draft_block_spec_info": make_draft_block_spec_info(draft_token_num=block, device=self.device),
                "_accept_bonus_buffer_cap": 0,
            }
        for name, value in kept.items():
            setattr(self, name, value)
        self.block_size = self.speculative_num_draft_tokens = block
        self.draft_model.set_block_size(block)

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

        A batch of greedy requests goes upstream unchanged. Otherwise the target's tokens are drawn here, and upstream's
        greedy acceptance of those tokens is exact speculative sampling (sglang_auf/speculative/sampling.py).
        """
        if target_predict is None and sampling_info is not None and not sampling_info.is_all_greedy:
            target_predict = self._draw(next_token_logits, sampling_info, prefix_lens)
            # SGLang sends greedy choices to the other ranks too, unless SGLANG_SPEC_TP_SYNC keeps it to random ones.
            self._tp_sync.sync(SpecTpSyncSite.DFLASH_ACCEPT_SAMPLE, target_predict)
        return super()._accept_block(
            candidates=candidates,
            next_token_logits=next_token_logits,
            sampling_info=sampling_info,
            draft_input=draft_input,
            prefix_lens=prefix_lens,
            bs=bs,
            target_predict=target_predict,
        )

    def _draw(self, logits: torch.Tensor, sampling_info: Any, prefix_lens: torch.Tensor) -> torch.Tensor:
        """The target's tokens, drawn at every slot: logits [bs * B, vocabulary], prefix_lens [bs] -> int64 [bs * B].

        The host looks at no value of the device here (see sampling.sample), so it runs ahead of the device.
        """
        block = len(logits) // len(prefix_lens)
        drawn = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        # As upstream's verification does: what is as wide as the vocabulary may lie in the graphs' idle memory.
        with borrow_graph_pool(user="AUF draw"):
            rows = logits / sampling_info.temperatures.repeat_interleave(block, dim=0)
            positions = prefix_lens[:, None] + torch.arange(block, device=prefix_lens.device)
            if self._deterministic_sampler is None:
                rows = sampler_softmax(rows)
                drawn.copy_(sampler_backend.draw(rows, sampling_info, positions, rows_per_request=block))
            else:  # with the softmax that SGLang's sampler uses then
                rows = torch.softmax(rows, dim=-1)
                drawn.copy_(sampler_backend.draw_as(self._deterministic_sampler, rows, sampling_info, positions))
        return drawn

    @cached_property
    def _deterministic_sampler(self) -> Any:
        """SGLang's sampler, with which plain decoding draws under --enable-deterministic-inference; else None."""
        sampler = self.target_worker.model_runner.sampler
        return sampler if sampler.enable_deterministic else None

    def _measure_sampling_peak(
        self, *, candidates: torch.Tensor, target_logits: torch.Tensor, sampling_info: Any
    ) -> int:
        """Bytes that a sampled step takes at most, for upstream's `prewarm_sampling`. Called on CUDA only.

        Upstream's own would compile and rehearse its verification, which this worker never calls. candidates [bs, B];
        target_logits [bs * B, vocabulary], all equal: the rows with the most to sort.
        """
        bs, device = len(candidates), target_logits.device
        seeds, prefix_lens = torch.zeros((2, bs), dtype=torch.int64, device=device)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["allocated_bytes.all.current"]
        for kind, top_k, top_p in REHEARSED:
            given = dataclasses.replace(
                sampling_info,
                top_ks=torch.full_like(sampling_info.top_ks, top_k),
                top_ps=torch.full_like(sampling_info.top_ps, top_p),
                sampling_seed=seeds,
                need_top_k_sampling=top_k < 1 << 30,
                need_top_p_sampling=top_p < 1,
            )
            given.kinds = [kind] * bs
            self._draw(target_logits, given, prefix_lens)
        torch.cuda.synchronize()
        return int(torch.cuda.memory_stats()["allocated_bytes.all.peak"]) - int(before)

    def _validate_phase1_sampling_support(self, batch: Any) -> None:
        """Upstream warns here that it will verify greedily, which is not true of this worker."""

    @cached_property
    def _draft_head(self) -> DraftHead | None:
        """The head of the draft vocabulary, None without one. Made when upstream's __init__ first asks for it."""
        vocabulary = draft_vocabulary.in_use(Path(self.server_args.speculative_draft_model_path))
        if vocabulary is None:
            return None
        return DraftHead(self.target_worker.model_runner.model.lm_head, vocabulary.tokens)

    def _maybe_build_draft_sampler(self) -> Any:
        """The sampler of the captured draft graph: upstream's, or ours where the drafter has a draft vocabulary."""
        made = super()._maybe_build_draft_sampler()
        if self._draft_head is None or not isinstance(made, _DflashDraftSampler):
            return made
        return ListedDraftSampler(self._draft_head, made)

    def _greedy_sample_from_vocab_parallel_head(
        self, *, hidden_states: torch.Tensor, lm_head: Any, chunk_size: int = 256
    ) -> torch.Tensor:
        """Greedy drafts of hidden_states [slots, hidden] -> ids [slots], on the CPU platform with its own products."""
        if self._draft_head is not None:
            return torch.cat([self._draft_head(some) for some in hidden_states.split(chunk_size)])
        method = getattr(lm_head, "quant_method", None)
        if not isinstance(method, RowInvariantLinear):
            return super()._greedy_sample_from_vocab_parallel_head(
                hidden_states=hidden_states, lm_head=lm_head, chunk_size=chunk_size
            )
        # torch's argmax over bf16 is slower than its max, which is vectorised. Both give the first of equal values.
        return torch.cat(
            [
                method.apply(lm_head, some)[:, : lm_head.org_vocab_size].max(dim=-1).indices
                for some in hidden_states.split(chunk_size)
            ]
        )
