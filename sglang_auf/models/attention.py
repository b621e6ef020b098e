"""Attention of mask blocks: each block sees the target's context before its anchor, and all of itself.

Q, K and V of the blocks are [R, N, B, heads, D], K and V of the context [R, S, key heads, D]. Block n of row r has its
anchor at position anchors[r, n] and sees the context positions strictly before it: the target has not run on the
anchor when the block is drafted, so its feature does not exist (arXiv 2602.06036; in SGLang the block's own keys are
written over the cache rows from the anchor on).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

SCORE_BYTES = 2**28
"""Most bytes for the scores of one layer; several such tensors live at a time. Below it, plain products were quicker
than flex attention on an H200 at the shapes tried. The value is a judgement that bounds memory."""

KERNELS = 64
"""Most versions of flex attention compiled in a process. Shapes of training need about eight, PyTorch's own limit."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    context_k: Tensor,
    context_v: Tensor,
    anchors: Tensor,
    mask: BlockMask | None = None,
) -> Tensor:
    """-> [R, N, B, heads, D], scaled by D ** -0.5. By `attend_flex` with a `mask`, which `large_mask` makes."""
    if mask is None:
        return attend_two_part(q, k, v, context_k, context_v, anchors)
    return attend_flex(q, k, v, context_k, context_v, mask)


def large_mask(blocks: Tensor, heads: int, length: int, anchors: Tensor) -> BlockMask | None:
    """Flex attention's mask on CUDA where the scores of a layer would take more than SCORE_BYTES, otherwise None.

    blocks [R, N, B, H], in the type of the scores; length: S. All layers of a drafter share it, since several booleans
    for each pair of a query and a key exist while it is made: 370 MB each for 4 rows of 3,072 tokens with 512 blocks of
    16.
    """
    scores = blocks.shape[:-1].numel() * heads * (length + blocks.shape[2]) * blocks.element_size()
    return flex_mask(anchors, length, blocks.shape[2]) if blocks.is_cuda and scores > SCORE_BYTES else None


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


def attend_flex(q: Tensor, k: Tensor, v: Tensor, context_k: Tensor, context_v: Tensor, mask: BlockMask) -> Tensor:
    """The same through flex attention, whose block-sparse kernel skips keys that no query of a tile sees.

    mask: of `flex_mask`.
    """
    out = _flex(q.device.type)(
        q.flatten(1, 2).transpose(1, 2),
        torch.cat([context_k, k.flatten(1, 2)], dim=1).transpose(1, 2),
        torch.cat([context_v, v.flatten(1, 2)], dim=1).transpose(1, 2),
        block_mask=mask,
        enable_gqa=True,
    )
    return out.transpose(1, 2).reshape(q.shape)


def flex_mask(anchors: Tensor, length: int, block_size: int) -> BlockMask:
    """Of blocks at anchors [R, N] over a context of `length` tokens."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, blocks = anchors.shape
    return create_block_mask(
        block_mask(anchors, length, block_size),
        B=rows,
        H=None,
        Q_LEN=blocks * block_size,
        KV_LEN=length + blocks * block_size,
        device=str(anchors.device),
    )


def block_mask(anchors: Tensor, length: int, block_size: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Flex attention's mask over [context, blocks] keys: (row, head, query, key) -> visible."""

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        block = query // block_size
        before_anchor = (key < length) & (key < anchors[row, block])
        return before_anchor | ((key >= length) & ((key - length) // block_size == block))

    return visible


@functools.cache
def _flex(device: str) -> Callable[..., Any]:
    """Flex attention, compiled on CUDA: the eager version would hold the dense scores.

    PyTorch compiles it anew where a size becomes 1 or stops being 1, and for training and evaluation. After a number of
    times it would go on with the eager version; fullgraph makes this an error, and KERNELS is far above what we saw.
    """
    from torch.nn.attention.flex_attention import flex_attention

    kernel: Callable[..., Any] = flex_attention
    return compiled(kernel) if device == "cuda" else kernel


def compiled(kernel: Callable[..., Any], backend: str = "inductor") -> Callable[..., Any]:
    """`kernel` for all shapes of batches. Raises torch._dynamo's FailOnRecompileLimitHit above KERNELS."""
    made: Callable[..., Any] = torch.compile(
        kernel, dynamic=True, fullgraph=True, recompile_limit=KERNELS, backend=backend
    )
    return made
