"""The CPU attention backend: decode, extend, target verify (causal) and draft block (bidirectional) in one form.

A forward is planned once: its requests are put into groups of similar shape, and each group gets the pool slots of its
keys and one additive mask. A layer is then one gather and one `scaled_dot_product_attention` a group, whatever the
number of requests. Query heads that share a key head are stacked as rows, so keys are read once.

A query's result does not depend on its neighbours: torch's CPU kernel for attention (FlashAttention form, bf16 in,
float32 scores and sums) gives a row the same bits in any batch, for any number of rows and of masked keys after the
last visible one, but for a few shapes that depend on the machine. attention_probe.py finds those, and they are padded
to others. tests/cpu/test_attention.py holds it to that on the machine it runs on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType

from sglang_auf.cpu.attention_probe import Shapes, agreeing_shapes
from sglang_auf.cpu.elementwise import ROTARY_ROWS

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

logger = logging.getLogger(__name__)

BACKEND_NAME = "auf_cpu"
# Requests whose keys or rows round up to the same power of two (from here on) share a group.
SMALLEST_KEY_GROUP = 512
SMALLEST_ROW_GROUP = 16
# A group's mask has at most this many elements (256 MiB in bf16); a larger group is split.
MASK_ELEMENTS = 1 << 27


@dataclass(frozen=True, slots=True)
class Span:
    """What one request computes in this forward: its new tokens [start, start + rows) of the flat batch."""

    pool_row: int
    start: int
    rows: int
    keys: int  # keys that exist after this forward wrote its own, the new tokens included


@dataclass(slots=True)
class Group:
    """Requests computed together, padded to `rows` queries and `keys` keys each."""

    tokens: torch.Tensor | None  # [requests * rows] flat token of each query (padding repeats one); None: all, in order
    real: torch.Tensor | None  # [requests * rows] bool, False where padded; None: none is padded
    requests: int
    rows: int
    keys: int
    slots: torch.Tensor  # [requests * keys] pool slots
    causal: torch.Tensor  # additive, [requests, 1, rows or 1, keys]
    full: torch.Tensor | None  # the same for layers that see the whole block; None: as causal


def _padded_rows(rows: int, heads_per_key: int, shapes: Shapes) -> int:
    """Queries of a request as they are computed; a single one is repeated by `attend`, without a mask of its own."""
    multiple = 1 if rows == 1 else shapes.rows // gcd(shapes.rows, heads_per_key)
    return -(-rows // multiple) * multiple


def _power_of_two(value: int, smallest: int) -> int:
    return max(smallest, 1 << (value - 1).bit_length())


def group_spans(spans: Iterable[Span], heads_per_key: int, shapes: Shapes) -> list[list[Span]]:
    """Put spans of similar shape together; the mask of no two or more exceeds MASK_ELEMENTS."""
    by_shape: dict[tuple[int, int], list[Span]] = {}
    for span in spans:
        rows = span.rows if span.rows <= SMALLEST_ROW_GROUP else _power_of_two(span.rows, SMALLEST_ROW_GROUP)
        rows = _padded_rows(rows, heads_per_key, shapes)
        by_shape.setdefault((rows, _power_of_two(span.keys, SMALLEST_KEY_GROUP)), []).append(span)
    groups = []
    for (rows, keys), members in by_shape.items():
        most = max(1, MASK_ELEMENTS // (rows * heads_per_key * keys))
        groups += [members[i : i + most] for i in range(0, len(members), most)]
    return groups


def plan_group(
    spans: list[Span],
    req_to_token: torch.Tensor,
    dtype: torch.dtype,
    heads_per_key: int,
    whole_batch: bool,
    shapes: Shapes,
) -> Group:
    """The group of `spans`. whole_batch: the spans are the whole forward, in order. shapes: what to pad to."""
    rows = _padded_rows(max(span.rows for span in spans), heads_per_key, shapes)
    keys = shapes.padded_keys(max(span.keys for span in spans))
    pool_rows = torch.tensor([span.pool_row for span in spans])
    width = req_to_token.shape[1]
    table = req_to_token[pool_rows, : min(keys, width)].long()
    if keys > width:
        table = F.pad(table, (0, keys - width))
    uniform = all(span.rows == rows for span in spans)
    starts = torch.tensor([span.start for span in spans])
    counts = torch.tensor([span.rows for span in spans])
    totals = torch.tensor([span.keys for span in spans])
    offset = torch.arange(rows)
    tokens = real = None
    if not (uniform and whole_batch):
        tokens = (starts[:, None] + torch.minimum(offset, counts[:, None] - 1)).flatten()
        real = None if uniform else (offset < counts[:, None]).flatten()
    key = torch.arange(keys)
    # Query r of a request is its token number totals - counts + r and sees the keys up to itself.
    last_seen = (totals - counts)[:, None] + torch.minimum(offset, counts[:, None] - 1)
    hidden = key > last_seen[:, :, None]
    causal = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
    full = None
    if rows > 1:
        # Rows are query positions with the heads of one key head side by side.
        causal = causal.repeat_interleave(heads_per_key, dim=1)
        hidden = key > (totals - 1)[:, None, None]
        full = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf")).unsqueeze(1)
    return Group(tokens, real, len(spans), rows, keys, table.flatten(), causal.unsqueeze(1), full)


def attend(
    q: torch.Tensor,
    pool: torch.Tensor,
    group: Group,
    scaling: float,
    bidirectional: bool,
    row_multiple: int,
) -> torch.Tensor:
    """Attention of a group. q [requests * rows, heads, head_dim]; pool [slots, 2, key heads, head_dim] -> as q."""
    n, rows = group.requests, group.rows
    kv_heads, head_dim = pool.shape[2], pool.shape[3]
    per_key = q.shape[1] // kv_heads
    stacked = q.view(n, rows, kv_heads, per_key, head_dim).permute(0, 2, 1, 3, 4).flatten(2, 3)
    if stacked.shape[2] % row_multiple:  # a single query
        stacked = stacked.repeat(1, 1, row_multiple // gcd(row_multiple, stacked.shape[2]), 1)
    kv = pool.index_select(0, group.slots).view(n, group.keys, 2, kv_heads, head_dim)
    out = F.scaled_dot_product_attention(
        stacked,
        kv[:, :, 0].transpose(1, 2),
        kv[:, :, 1].transpose(1, 2),
        attn_mask=group.full if bidirectional and group.full is not None else group.causal,
        scale=scaling,
    )[:, :, : rows * per_key]
    return out.unflatten(2, (rows, per_key)).permute(0, 2, 1, 3, 4).reshape(n * rows, q.shape[1], head_dim)


class CpuAttentionBackend(AttentionBackend):  # type: ignore[misc]
    """SGLang's attention backend "auf_cpu". One instance a model runner (target, drafter)."""

    def __init__(self, runner: Any) -> None:
        super().__init__()
        config = runner.model_config
        self.dtype: torch.dtype = config.dtype
        self.heads_per_key: int = max(1, config.num_attention_heads // config.get_num_kv_heads(1))
        self.req_to_token_pool = runner.req_to_token_pool
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.groups: list[Group] = []
        self.shapes = agreeing_shapes(config.head_dim)
        if not self.shapes.repeatable:
            logger.warning(
                "attention heads of %d dimensions: torch's kernel gives a token other last bits in other batches on "
                "this machine, so a greedy answer may fork from plain decoding where two tokens are nearly tied",
                config.head_dim,
            )

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Plan one forward: slots and masks for all layers."""
        ROTARY_ROWS.begin_forward()
        spans = list(self._spans(forward_batch))
        grouped = group_spans(spans, self.heads_per_key, self.shapes)
        req_to_token = self.req_to_token_pool.req_to_token
        self.groups = [
            plan_group(members, req_to_token, self.dtype, self.heads_per_key, len(grouped) == 1, self.shapes)
            for members in grouped
        ]

    def _spans(self, forward_batch: ForwardBatch) -> Iterable[Span]:
        mode = forward_batch.forward_mode
        if mode.is_idle():
            return
        pool_rows = forward_batch.req_pool_indices.tolist()
        totals = forward_batch.seq_lens.tolist()
        if mode.is_target_verify():
            block = forward_batch.spec_info.draft_token_num
            for i, (row, prefix) in enumerate(zip(pool_rows, totals, strict=True)):
                yield Span(row, i * block, block, prefix + block)
        elif mode.is_decode():
            for i, (row, total) in enumerate(zip(pool_rows, totals, strict=True)):
                yield Span(row, i, 1, total)
        elif mode.is_extend():
            start = 0
            for row, total, rows in zip(pool_rows, totals, forward_batch.extend_seq_lens_cpu, strict=True):
                yield Span(row, start, int(rows), total)
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
        q = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        pool = self.token_to_kv_pool.interleaved(layer.layer_id)
        bidirectional = layer.attn_type == AttentionType.ENCODER_ONLY
        if len(self.groups) == 1 and self.groups[0].tokens is None:
            return attend(q, pool, self.groups[0], layer.scaling, bidirectional, self.shapes.rows).flatten(1)
        out = torch.empty_like(q)
        for group in self.groups:
            queries = q if group.tokens is None else q.index_select(0, group.tokens)
            result = attend(queries, pool, group, layer.scaling, bidirectional, self.shapes.rows)
            if group.tokens is None:
                out.copy_(result)
            elif group.real is None:
                out.index_copy_(0, group.tokens, result)
            else:
                out.index_copy_(0, group.tokens[group.real], result[group.real])
        return out.flatten(1)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1
