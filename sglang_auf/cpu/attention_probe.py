"""Shapes in which torch's CPU attention gives a query the same bits: how many rows, and how many keys, it is given.

`scaled_dot_product_attention` takes queries in pieces of 32, 64 or 256 rows and keys in pieces of 512, and hands both
products of two pieces to a BLAS, which chooses kernel and blocking by their shape. Very few rows it multiplies in
another way (seen: one row with AMX, up to three with AVX512 alone), and a piece of some lengths it sums in other parts
than a full one (seen with AVX512: 193 to 383 keys). Padding to other shapes changes nothing but these bits. The machine
is asked once for each head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

PIECE = 512
"""Keys of one piece: torch/aten native/cpu/FlashAttentionKernel.cpp, kv_split_size."""

KEY_STEP = 64
"""Keys are padded to a multiple of this, so that the kernel meets few distinct lengths."""

MULTIPLES = (2, 4, 8, 16)
"""Candidates for what the number of rows must be a multiple of, so that no piece has fewer. One is never enough."""

ROW_COUNTS = (2, 4, 6, 8, 12, 16, 24, 34, 36, 48, 64, 72, 80, 128, 194, 196, 200, 208, 300, 770, 772, 776, 784)
"""Rows that are tried: decode, blocks, chunks of prefill, with a last piece of each candidate's size."""

BATCHES = (1, 16)
"""Requests in one call that are tried: the kernel's choices may follow the work there is for each thread."""

BATCHED_ROWS = 64
"""Rows up to which more than one request is tried: decode and blocks. More rows of one request are work enough."""

HEADS = 3


@dataclass(frozen=True, slots=True)
class Shapes:
    """rows: a row has the same bits in every multiple of so many. last_pieces: lengths, ascending up to PIECE, that
    give the keys of a last piece the bits of a full one. repeatable: whether this holds of any candidate.
    """

    rows: int
    last_pieces: tuple[int, ...]
    repeatable: bool

    def padded_keys(self, keys: int) -> int:
        """The fewest keys, from `keys` on, of an agreeing shape."""
        whole, rest = divmod(keys, PIECE)
        return whole * PIECE + (next(piece for piece in self.last_pieces if piece >= rest) if rest else 0)


@cache
def agreeing_shapes(head_dim: int) -> Shapes:
    """Of bf16 attention on this machine. Tried on inputs of which nothing but rounding is left in the result."""
    lengths = tuple(range(KEY_STEP, PIECE + 1, KEY_STEP))
    differing: set[int] = set()  # row counts, at the lengths that are kept
    kept = []
    for keys in lengths:
        tried = (_cancelling_scores(keys, head_dim), _cancelling_sums(keys, head_dim))
        widest = [inputs.attend(ROW_COUNTS[-1], keys) for inputs in tried]
        if all(
            torch.equal(inputs.attend(ROW_COUNTS[-1], more), result)
            for inputs, result in zip(tried, widest, strict=True)
            for more in (PIECE, 2 * PIECE)
        ):
            kept.append(keys)
            differing |= {
                rows
                for inputs, result in zip(tried, widest, strict=True)
                for batch in BATCHES
                for rows in ROW_COUNTS
                if (batch == 1 or rows <= BATCHED_ROWS) and not torch.equal(inputs.attend(rows, keys, batch), result)
            }
    multiple = next((some for some in MULTIPLES if all(rows % some for rows in differing)), None)
    if multiple is None or kept[-1:] != [PIECE]:
        return Shapes(MULTIPLES[0], lengths, repeatable=False)
    return Shapes(multiple, tuple(kept), repeatable=True)


@dataclass(frozen=True, slots=True)
class _Inputs:
    """q [heads, 2, head_dim]; k and v [2 * PIECE, heads, head_dim], of which `keys` count."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    keys: int

    def attend(self, rows: int, padded: int, batch: int = 1) -> torch.Tensor:
        """[heads, 2, head_dim] with q's two rows repeated to `rows`; NaN, equal to nothing, where repeats differ.

        batch: equal requests in the call. Keys and values lie side by side, as the backend gathers them from its pool.
        """
        mask = torch.zeros(batch, 1, 1, padded, dtype=torch.bfloat16)
        mask[..., self.keys :] = float("-inf")
        of_row = torch.arange(rows) % 2
        q = self.q[:, of_row].expand(batch, -1, -1, -1)
        kv = torch.stack([self.k[:padded], self.v[:padded]], dim=1).repeat(batch, 1, 1, 1, 1)
        kv = kv.view(batch, padded, 2, *self.k.shape[1:])
        k, v = kv[:, :, 0].transpose(1, 2), kv[:, :, 1].transpose(1, 2)
        result = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale)
        first = result[0, :, :2]
        return (
            first if torch.equal(result, first[:, of_row].expand_as(result)) else torch.full_like(first, float("nan"))
        )


def _cancelling_scores(keys: int, head_dim: int) -> _Inputs:
    """Scores are exactly 0 but for the rounding of the first product, which the scale makes large."""
    generator = torch.Generator().manual_seed(head_dim * 8192 + keys)
    q = _opposed(torch.zeros(head_dim, HEADS, 2), generator).permute(1, 2, 0)
    shared = torch.randn(2 * PIECE, HEADS, head_dim // 2, generator=generator)
    k = torch.zeros(2 * PIECE, HEADS, head_dim)
    k[..., : head_dim // 2 * 2] = torch.cat([shared, shared], dim=-1)
    v = torch.randn(2 * PIECE, HEADS, head_dim, generator=generator)
    return _Inputs(q.bfloat16(), k.bfloat16(), v.bfloat16(), 2.0**10, keys)


def _cancelling_sums(keys: int, head_dim: int) -> _Inputs:
    """The weighted sum of values is exactly 0 but for the rounding of the second product."""
    generator = torch.Generator().manual_seed(head_dim * 8192 + keys + 1)
    q = torch.randn(HEADS, 2, head_dim, generator=generator)
    k, v = torch.zeros(2, 2 * PIECE, HEADS, head_dim)
    shared = torch.randn(keys // 2, HEADS, head_dim, generator=generator)
    k[: keys // 2 * 2] = torch.cat([shared, shared])
    v[:keys] = _opposed(v[:keys], generator)
    order = torch.cat([torch.randperm(keys, generator=generator), torch.arange(keys, 2 * PIECE)])
    return _Inputs(q.bfloat16(), k[order].bfloat16(), v[order].bfloat16(), head_dim**-0.5, keys)


def _opposed(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """In the shape of `like`, the second half of dim 0 the negative of the first; sizes over twelve powers of two."""
    half = len(like) // 2
    size = (half, *like.shape[1:])
    values = torch.randn(size, generator=generator) * 2.0 ** torch.randint(0, 12, size, generator=generator)
    out = torch.zeros_like(like)
    out[: 2 * half] = torch.cat([values, -values])
    return out
