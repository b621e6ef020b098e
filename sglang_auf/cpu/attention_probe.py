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
    differing: set[int] = set()  # row counts
    pieces = []
    for keys in range(KEY_STEP, PIECE + 1, KEY_STEP):
        alike = True
        for inputs in (_cancelling_scores(keys, head_dim), _cancelling_sums(keys, head_dim)):
            by_rows = {rows: inputs.attend(rows, keys) for rows in ROW_COUNTS}
            widest = by_rows[ROW_COUNTS[-1]]
            differing |= {rows for rows, result in by_rows.items() if not torch.equal(result, widest)}
            alike &= all(torch.equal(inputs.attend(ROW_COUNTS[-1], more), widest) for more in (PIECE, 2 * PIECE))
        if alike:
            pieces.append(keys)
    multiple = next((some for some in MULTIPLES if all(rows % some for rows in differing)), None)
    repeatable = multiple is not None and pieces[-1:] == [PIECE]
    return Shapes(multiple or MULTIPLES[0], tuple(pieces) if repeatable else (PIECE,), repeatable)


@dataclass(frozen=True, slots=True)
class _Inputs:
    """q [1, heads, 2, head_dim]; k and v [1, heads, 2 * PIECE, head_dim], of which `keys` count."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    keys: int

    def attend(self, rows: int, padded: int) -> torch.Tensor:
        """[heads, 2, head_dim] with q's two rows repeated to `rows`; NaN, equal to nothing, where repeats differ."""
        mask = torch.zeros(1, 1, 1, padded, dtype=torch.bfloat16)
        mask[..., self.keys :] = float("-inf")
        of_row = torch.arange(rows) % 2
        k, v = (x[:, :, :padded].contiguous() for x in (self.k, self.v))
        result = F.scaled_dot_product_attention(self.q[:, :, of_row], k, v, attn_mask=mask, scale=self.scale)[0]
        first = result[:, :2]
        return first if torch.equal(result, first[:, of_row]) else torch.full_like(first, float("nan"))


def _cancelling_scores(keys: int, head_dim: int) -> _Inputs:
    """Scores are exactly 0 but for the rounding of the first product, which the scale makes large."""
    generator = torch.Generator().manual_seed(head_dim * 8192 + keys)
    q = _opposed(torch.zeros(1, HEADS, head_dim, 2), generator).transpose(2, 3)
    shared = torch.randn(1, HEADS, 2 * PIECE, head_dim // 2, generator=generator)
    k = torch.zeros(1, HEADS, 2 * PIECE, head_dim)
    k[..., : head_dim // 2 * 2] = torch.cat([shared, shared], dim=-1)
    v = torch.randn(1, HEADS, 2 * PIECE, head_dim, generator=generator)
    return _Inputs(q.bfloat16(), k.bfloat16(), v.bfloat16(), 2.0**10, keys)


def _cancelling_sums(keys: int, head_dim: int) -> _Inputs:
    """The weighted sum of values is exactly 0 but for the rounding of the second product."""
    generator = torch.Generator().manual_seed(head_dim * 8192 + keys + 1)
    q = torch.randn(1, HEADS, 2, head_dim, generator=generator)
    k, v = torch.zeros(2, 1, HEADS, 2 * PIECE, head_dim)
    shared = torch.randn(1, HEADS, keys // 2, head_dim, generator=generator)
    k[:, :, : keys // 2 * 2] = torch.cat([shared, shared], dim=2)
    v[:, :, :keys] = _opposed(v[:, :, :keys], generator)
    order = torch.cat([torch.randperm(keys, generator=generator), torch.arange(keys, 2 * PIECE)])
    return _Inputs(q.bfloat16(), k[:, :, order].bfloat16(), v[:, :, order].bfloat16(), head_dim**-0.5, keys)


def _opposed(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """In the shape of `like`, the second half of dim 2 the negative of the first; sizes over twelve powers of two."""
    half = like.shape[2] // 2
    size = (*like.shape[:2], half, like.shape[3])
    values = torch.randn(size, generator=generator) * 2.0 ** torch.randint(0, 12, size, generator=generator)
    out = torch.zeros_like(like)
    out[:, :, : 2 * half] = torch.cat([values, -values], dim=2)
    return out
