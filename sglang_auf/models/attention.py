"""Attention of mask blocks: each block sees the target's context before its anchor, and all of itself.

Q, K and V of the blocks are [R, N, B, heads, D], K and V of the context [R, S, key heads, D]. Block n of row r has its
anchor at position anchors[r, n] and sees the context positions strictly before it: the target has not run on the
anchor when the block is drafted, so its feature does not exist (arXiv 2602.06036; in SGLang the block's own keys are
written over the cache rows from the anchor on).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SCORE_BYTES = 2**28
"""Most bytes for the scores of one layer; several such tensors live at a time. Below it, plain products were quicker
than flex attention on an H200 at the shapes tried. The value is a judgement that bounds memory."""


def attend(q: Tensor, k: Tensor, v: Tensor, context_k: Tensor, context_v: Tensor, anchors: Tensor) -> Tensor:
    """-> [R, N, B, heads, D], scaled by D ** -0.5.

    By `attend_two_part`; on CUDA by `attend_flex` where the scores would take more than SCORE_BYTES.
    """
    scores = q.shape[:-1].numel() * (context_k.shape[1] + q.shape[2]) * q.element_size()
    attention = attend_flex if q.device.type == "cuda" and scores > SCORE_BYTES else attend_two_part
    return attention(q, k, v, context_k, context_v, anchors)


def attend_two_part(q: Tensor, k: Tensor, v: Tensor, context_k: Tensor, context_v: Tensor, anchors: Tensor) -> Tensor:
    """Scores against the context and against the own block, side by side; no block is scored against another.

    A dense mask over S + N * B keys would waste most of its scores where N * B is close to S or above it.
    """
    rows, blocks, width, heads, dim = q.shape
    keys, length = context_k.shape[2], context_k.shape[1]
    per_key = heads // keys
    q = q * dim**-0.5
    grouped = q.unflatten(3, (keys, per_key)).permute(0, 3, 4, 1, 2, 5)  # [R, keys, per_key, N, B, D]
    flat = grouped.reshape(rows * keys, per_key * blocks * width, dim)
    to_context = flat @ context_k.permute(0, 2, 3, 1).reshape(rows * keys, dim, length)
    positions = torch.arange(length, device=q.device)
    hidden = positions >= anchors[:, None, None, :, None, None]
    bias = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, float("-inf"))
    to_context = to_context.view(rows, keys, per_key, blocks, width, length) + bias

    own_k = k.permute(0, 3, 1, 4, 2)  # [R, keys, N, D, B]
    own_v = v.permute(0, 3, 1, 2, 4)  # [R, keys, N, B, D]
    # Query heads that share a key head are put together as rows, so that K and V are not repeated.
    together = grouped.transpose(2, 3).reshape(rows, keys, blocks, per_key * width, dim)
    to_block = together @ own_k
    to_block = to_block.view(rows, keys, blocks, per_key, width, width).transpose(2, 3)

    weights = torch.cat([to_context, to_block], dim=-1).softmax(dim=-1)
    on_context = weights[..., :length].reshape(rows * keys, per_key * blocks * width, length)
    from_context = on_context @ context_v.transpose(1, 2).reshape(rows * keys, length, dim)
    on_block = weights[..., length:].transpose(2, 3).reshape(rows, keys, blocks, per_key * width, width)
    from_block = (on_block @ own_v).view(rows, keys, blocks, per_key, width, dim).transpose(2, 3)
    out = from_context.view(rows, keys, per_key, blocks, width, dim) + from_block
    return out.permute(0, 3, 4, 1, 2, 5).reshape(rows, blocks, width, heads, dim)


def attend_flex(q: Tensor, k: Tensor, v: Tensor, context_k: Tensor, context_v: Tensor, anchors: Tensor) -> Tensor:
    """The same through flex attention, whose block-sparse kernel skips keys that no query of a tile sees."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, blocks, width, _, _ = q.shape
    length = context_k.shape[1]
    mask = create_block_mask(
        block_mask(anchors, length, width),
        B=rows,
        H=None,
        Q_LEN=blocks * width,
        KV_LEN=length + blocks * width,
        device=str(q.device),
    )
    out = _flex(q.device.type)(
        q.flatten(1, 2).transpose(1, 2),
        torch.cat([context_k, k.flatten(1, 2)], dim=1).transpose(1, 2),
        torch.cat([context_v, v.flatten(1, 2)], dim=1).transpose(1, 2),
        block_mask=mask,
        enable_gqa=True,
    )
    return out.transpose(1, 2).reshape(q.shape)


def block_mask(anchors: Tensor, length: int, block_size: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Flex attention's mask over [context, blocks] keys: (row, head, query, key) -> visible."""

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        block = query // block_size
        before_anchor = (key < length) & (key < anchors[row, block])
        return before_anchor | ((key >= length) & ((key - length) // block_size == block))

    return visible


@functools.cache
def _flex(device: str) -> Callable[..., Any]:
    """Flex attention, compiled on CUDA: the eager version would hold the dense scores."""
    from torch.nn.attention.flex_attention import flex_attention

    kernel: Callable[..., Any] = flex_attention
    return torch.compile(kernel, dynamic=True) if device == "cuda" else kernel
