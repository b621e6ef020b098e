"""The CPU attention backend: one form for decode, extend, target verify (causal) and draft block (bidirectional).

A forward is planned once: where each request has its queries in the batch and its keys in the pool. A layer is then
one call of the attention kernel (kernels.py), which reads only the keys that a query sees: nothing is padded or
masked, and a query's result depends on its own keys alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType

from sglang_auf.cpu import kernels
from sglang_auf.cpu.kernels import AttentionTasks

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

QuerySpan = tuple[int, int, int, int]
"""One request: row of the slot table, first query in the batch, number of queries, number of keys with the new ones."""


class CpuAttentionBackend(AttentionBackend):  # type: ignore[misc]
    """SGLang's attention backend "auf_cpu". Target and drafter have one instance each."""

    def __init__(self, runner: Any) -> None:
        super().__init__()
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.tasks = AttentionTasks.of([], self.req_to_token_pool.req_to_token)

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Plan one forward, for all layers."""
        forest = getattr(forward_batch.spec_info, "forest", None)
        own = None if forest is None else forest.own_slots(forward_batch.out_cache_loc)
        self.tasks = AttentionTasks.of(self._spans(forward_batch), self.req_to_token_pool.req_to_token, own)

    def _spans(self, forward_batch: ForwardBatch) -> Iterable[QuerySpan]:
        mode = forward_batch.forward_mode
        if mode.is_idle():
            return
        pool_rows = forward_batch.req_pool_indices.tolist()
        totals = forward_batch.seq_lens.tolist()
        if mode.is_target_verify() and hasattr(forward_batch.spec_info, "forest"):
            start = 0
            # The anchor is in the table already, behind the prefix; all nodes of its request see it.
            for row, prefix, rows in zip(pool_rows, totals, forward_batch.spec_info.forest.rows, strict=True):
                yield row, start, rows, prefix + 1
                start += rows
        elif mode.is_target_verify():
            block = forward_batch.spec_info.draft_token_num
            for i, (row, prefix) in enumerate(zip(pool_rows, totals, strict=True)):
                yield row, i * block, block, prefix + block
        elif mode.is_decode():
            for i, (row, total) in enumerate(zip(pool_rows, totals, strict=True)):
                yield row, i, 1, total
        elif mode.is_extend():
            start = 0
            for row, total, rows in zip(pool_rows, totals, forward_batch.extend_seq_lens_cpu, strict=True):
                yield row, start, int(rows), total
                start += int(rows)
        else:
            raise NotImplementedError(f"forward mode {mode.name} on the CPU platform")

    def forward_decode(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._forward(*args, **kwargs)

    def forward_extend(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._forward(*args, **kwargs)

    def _forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **unsupported: Any,
    ) -> torch.Tensor:
        """q [tokens, heads * head_dim] -> [tokens, heads * head_dim]; writes k and v to the pool first."""
        if layer.is_cross_attention or unsupported or layer.logit_cap or layer.sliding_window_size > -1:
            raise NotImplementedError(
                "the CPU platform has full self-attention only: no cross attention, soft cap, sliding window or sinks "
                f"(layer {layer.layer_id}, extra arguments {sorted(unsupported)})"
            )
        if save_kv_cache and k is not None:
            self.token_to_kv_pool.set_kv_buffer(layer, forward_batch.out_cache_loc, k, v)
        pool = self.token_to_kv_pool.interleaved(layer.layer_id)
        whole_block = layer.attn_type == AttentionType.ENCODER_ONLY
        return kernels.attend(q.flatten(1), pool, self.tasks, layer.scaling, whole_block)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1
