"""Sampling with per-request seeds, and the exact verification of a deterministic draft that follows from it.

A draft block is deterministic (greedy proposals, a point mass), so speculative sampling has a simple exact form: draw
the target's token at every slot of the block and accept drafted tokens while they equal the drawn ones; the first
drawn token that differs is the bonus. A draft x is accepted with probability p(x), and on rejection the drawn token is
distributed as p without x, renormalised: the rule of Leviathan et al. (2211.17192) for a point-mass proposal.

The draw at position t of a request depends only on (seed, t) and p, by inversion of the cumulative distribution. So a
seeded request gives the same answer in any batch, and the same answer as plain decoding with that seed.

Device-neutral torch, without SGLang. The filters are those of SGLang's plain sampler ("joint" order,
sglang/srt/layers/sampler.py, top_k_top_p_min_p_sampling_from_probs_torch): on probabilities in descending order, keep
tokens with rank < top_k, mass of the ranks before <= top_p, and probability >= min_p times the largest.
"""

from __future__ import annotations

import torch

# Largest probabilities that are tried before a full sort; most filtered rows need far fewer.
POOL = 1024
# Rows drawn at once, which bounds memory: a verify pass has hundreds of rows of vocabulary-wide float64.
ROWS = 64

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def uniforms(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One number in [0, 1) per (seed, position), both int64 [n] -> float64 [n].

    SplitMix64 (Steele, Lea, Flood 2014) of the seed, then of seed and position, so that neighbouring seeds and
    positions give unrelated numbers.
    """
    state = seeds
    for increment in (torch.ones_like(positions), positions):
        state = state + increment * _GOLDEN
        state = (state ^ _shift_right(state, 30)) * _MIX1
        state = (state ^ _shift_right(state, 27)) * _MIX2
        state = state ^ _shift_right(state, 31)
    return _shift_right(state, 11).double() * 2.0**-53


def _invert(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Column at which the cumulative `weights` [n, m] pass `uniform` [n] of their sum. Never a column of weight 0."""
    mass = weights.double().cumsum(dim=-1)
    found = torch.searchsorted(mass, (uniform * mass[:, -1])[:, None], right=True).squeeze(1)
    # A row of NaN (a model that overflowed) has no such column, and an index out of range would end the server.
    return found.clamp_(max=weights.shape[1] - 1)


def _largest(probabilities: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest of each row, descending, and their tokens. Of equal ones the lower token comes first.

    topk alone leaves the order of equal values open, and bf16 logits are often equal: a filter that cuts among them
    would keep other tokens than `filtered` does.
    """
    token = probabilities.topk(count, dim=-1).indices.sort(dim=-1).values
    largest, order = probabilities.gather(1, token).sort(dim=-1, descending=True, stable=True)
    return largest, token.gather(1, order)


def _kept(descending: torch.Tensor, top_ks: torch.Tensor, top_ps: torch.Tensor, min_ps: torch.Tensor) -> torch.Tensor:
    """Which columns of `descending` [n, m] the filters keep -> bool [n, m], a prefix of each row."""
    rank = torch.arange(descending.shape[1], device=descending.device)
    before = descending.double().cumsum(dim=-1) - descending
    keep = (rank < top_ks[:, None]) & (descending >= descending[:, :1] * min_ps[:, None])
    return keep & ((before <= top_ps[:, None]) | (top_ps[:, None] >= 1))


def sample(
    probabilities: torch.Tensor,
    top_ks: torch.Tensor,
    top_ps: torch.Tensor,
    min_ps: torch.Tensor,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """Draw one token per row -> int64 [n]. A row's draw depends on that row only.

    probabilities: [n, vocabulary] float32, each row sums to 1. top_ks: [n] int, 1 is greedy, vocabulary or more is off.
    top_ps: [n], 1 is off. min_ps: [n], 0 is off. uniform: [n] in [0, 1).
    """
    vocabulary = probabilities.shape[1]
    drawn = probabilities.argmax(dim=-1)
    greedy = top_ks == 1
    filtered = ~greedy & ((top_ks < vocabulary) | (top_ps < 1) | (min_ps > 0))
    plain = ~greedy & ~filtered

    for rows in plain.nonzero().flatten().split(ROWS):
        drawn[rows] = _invert(probabilities[rows], uniform[rows])

    for rows in filtered.nonzero().flatten().split(ROWS):
        pool = min(POOL, vocabulary)
        while rows.numel():
            largest, token = _largest(probabilities[rows], pool)
            keep = _kept(largest, top_ks[rows], top_ps[rows], min_ps[rows])
            # Where a kept token is as likely as the last of the pool, equal ones outside the pool may matter too.
            done = ~(keep & (largest == largest[:, -1:])).any(dim=-1) | (pool == vocabulary)
            at = _invert(largest * keep, uniform[rows])
            drawn[rows[done]] = token.gather(1, at[:, None]).squeeze(1)[done]
            rows, pool = rows[~done], vocabulary
    return drawn


def filtered(
    probabilities: torch.Tensor, top_ks: torch.Tensor, top_ps: torch.Tensor, min_ps: torch.Tensor
) -> torch.Tensor:
    """probabilities [n, vocabulary] with 0 where the filters of `sample` remove a token. Not renormalised."""
    descending, token = probabilities.sort(dim=-1, descending=True, stable=True)
    kept = descending * _kept(descending, top_ks, top_ps, min_ps)
    return torch.zeros_like(probabilities).scatter_(1, token, kept)
