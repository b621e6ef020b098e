"""Sampling with per-request seeds, and the exact verification of a deterministic draft that follows from it.

A draft block is deterministic (greedy proposals, a point mass), so speculative sampling has a simple exact form: draw
the target's token at every slot of the block and accept drafted tokens while they equal the drawn ones; the first
drawn token that differs is the bonus. A draft x is accepted with probability p(x), and on rejection the drawn token is
distributed as p without x, renormalised: the rule of Leviathan et al. (2211.17192) for a point-mass proposal.

The draw at position t of a request depends only on (seed, t) and p, by inversion of the cumulative distribution. So a
seeded request gives the same answer in any batch, and the same answer as plain decoding with that seed.

Device-neutral torch, without SGLang. An accelerator works behind a queue, and the host waits for the whole queue when
it looks at a value. So the host says how each row is drawn (`kind_of`), from what it knows of the requests, and the
code below looks only where that costs nothing (on a CPU) or less than the alternative (many rows that are OPEN).

The filters are those of SGLang's plain sampler ("joint" order,
sglang/srt/layers/sampler.py, top_k_top_p_min_p_sampling_from_probs_torch): on probabilities in descending order, keep
tokens with rank < top_k, mass of the ranks before <= top_p, and probability >= min_p times the largest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

# Most probable tokens of a row that are sorted. A row with top_k takes the smallest pool that holds it and more.
POOLS = (64, 1024)
# Rows drawn at once, which bounds memory: a verify pass has hundreds of rows of vocabulary-wide float64. torch gives a
# GPU's row to one of its 100 to 150 multiprocessors.
ROWS, ROWS_OF_ACCELERATOR = 64, 256
# Rows whose whole vocabulary is sorted at once, and the most rows for which an accelerator sorts it so as not to wait.
SORTED_ROWS = 32

# Kinds of rows: greedy; without filters; with filters that top_k does not bound. Any other kind is a pool of POOLS.
GREEDY, PLAIN, OPEN = 1, 0, -1

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
    would keep other tokens than `filtered` does. So the bits of a probability (which are ordered as it is) and of the
    token make one number, and no two of a row are equal.
    """
    vocabulary = probabilities.shape[1]
    if count >= vocabulary:
        largest, token = probabilities.sort(dim=-1, descending=True, stable=True)
        return largest, token
    low = 0xFFFFFFFF - torch.arange(vocabulary, device=probabilities.device)
    key = probabilities.view(torch.int32).long().bitwise_left_shift_(32).bitwise_or_(low)
    key = key.topk(count, dim=-1).values
    return (key >> 32).int().view(torch.float32), 0xFFFFFFFF - (key & 0xFFFFFFFF)


def _probably_largest(probabilities: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_largest`, but of tokens as likely as the last one others may be missing. Several times faster on a CPU."""
    if count >= probabilities.shape[1]:
        return _largest(probabilities, count)
    token = probabilities.topk(count, dim=-1).indices.sort(dim=-1).values
    largest, order = probabilities.gather(1, token).sort(dim=-1, descending=True, stable=True)
    return largest, token.gather(1, order)


def _kept(descending: torch.Tensor, top_ks: torch.Tensor, top_ps: torch.Tensor, min_ps: torch.Tensor) -> torch.Tensor:
    """Which columns of `descending` [n, m] the filters keep -> bool [n, m], a prefix of each row."""
    rank = torch.arange(descending.shape[1], device=descending.device)
    before = descending.double().cumsum(dim=-1) - descending
    keep = (rank < top_ks[:, None]) & (descending >= descending[:, :1] * min_ps[:, None])
    return keep & ((before <= top_ps[:, None]) | (top_ps[:, None] >= 1))


def kind_of(top_k: int, top_p: float, min_p: float, vocabulary: int) -> int:
    """How a row with these settings is drawn: GREEDY, PLAIN, OPEN or a pool of POOLS. The numbers are float32's."""
    if top_k == 1:
        return GREEDY
    if top_k >= vocabulary:
        return PLAIN if top_p >= 1 and min_p <= 0 else OPEN
    return next((pool for pool in POOLS if top_k < pool), OPEN)


def on_device(values: Sequence[int], device: torch.device | str) -> torch.Tensor:
    """Numbers of the host as int64 on `device`. Pinned memory lets the copy to an accelerator wait in the queue."""
    device = torch.device(device)
    return torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def looking_waits(device: torch.device) -> bool:
    """Whether the host has to wait for the device before it can read a tensor's values."""
    return str(device.type) != "cpu"


def sample(
    probabilities: torch.Tensor,
    top_ks: torch.Tensor,
    top_ps: torch.Tensor,
    min_ps: torch.Tensor,
    uniform: torch.Tensor,
    kinds: Sequence[int] | None = None,
) -> torch.Tensor:
    """Draw one token per row -> int64 [n]. A row's draw depends on that row only.

    probabilities: [n, vocabulary] float32, each row sums to 1. top_ks: [n] int, 1 is greedy, vocabulary or more is off.
    top_ps: [n], 1 is off. min_ps: [n], 0 is off. uniform: [n] in [0, 1). kinds: `kind_of` each request, whose n /
    len(kinds) rows follow one another; None works them out, for which it looks at the tensors.
    """
    n, vocabulary = probabilities.shape
    if kinds is None:
        settings = zip(top_ks.tolist(), top_ps.tolist(), min_ps.tolist(), strict=True)
        kinds = [kind_of(*of_row, vocabulary) for of_row in settings]
    drawn = torch.empty(n, dtype=torch.int64, device=probabilities.device)
    for kind in sorted(set(kinds)):
        for rows in _rows_of(kind, kinds, n, probabilities.device):
            part = probabilities[rows]
            if kind == GREEDY:
                drawn[rows] = part.argmax(dim=-1)
            elif kind == PLAIN:
                drawn[rows] = _invert(part, uniform[rows])
            else:
                drawn[rows] = _draw_filtered(part, top_ks[rows], top_ps[rows], min_ps[rows], uniform[rows], kind)
    return drawn


def _rows_of(kind: int, kinds: Sequence[int], n: int, device: torch.device) -> Iterator[slice | torch.Tensor]:
    """The rows of a kind, as many as are drawn at once. Slices, which copy nothing, where all rows are of one kind."""
    at_once = ROWS_OF_ACCELERATOR if looking_waits(device) else ROWS
    if all(other == kind for other in kinds):
        yield from (slice(first, first + at_once) for first in range(0, n, at_once))
        return
    each = n // len(kinds)
    firsts = [request * each for request, other in enumerate(kinds) if other == kind]
    rows = [first + row for first in firsts for row in range(each)]
    yield from on_device(rows, device).split(at_once)


def _draw_filtered(
    probabilities: torch.Tensor,
    top_ks: torch.Tensor,
    top_ps: torch.Tensor,
    min_ps: torch.Tensor,
    uniform: torch.Tensor,
    kind: int,
) -> torch.Tensor:
    """Draw from rows whose filters are on: from the most probable tokens, as many as it takes."""
    rows, vocabulary = probabilities.shape
    settings = (top_ks, top_ps, min_ps, uniform)
    enough = vocabulary if kind == OPEN else kind  # so many of the largest hold all that the filters keep
    if looking_waits(probabilities.device) and (kind != OPEN or rows <= SORTED_ROWS):
        return _draw_sorted(*_largest(probabilities, enough), *settings)[0]
    largest, token = _probably_largest(probabilities, POOLS[-1] if kind == OPEN else kind)
    drawn, keep = _draw_sorted(largest, token, *settings)
    if largest.shape[1] < vocabulary:
        # Where a kept token is as likely as the last of the pool, others outside the pool may matter too.
        unsure = (keep & (largest == largest[:, -1:])).any(dim=-1).nonzero().flatten()
        for some in unsure.split(SORTED_ROWS):
            drawn[some], _ = _draw_sorted(*_largest(probabilities[some], enough), *(of[some] for of in settings))
    return drawn


def _draw_sorted(
    largest: torch.Tensor,
    token: torch.Tensor,
    top_ks: torch.Tensor,
    top_ps: torch.Tensor,
    min_ps: torch.Tensor,
    uniform: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens drawn from `largest` [n, m], descending, and which columns the filters kept."""
    keep = _kept(largest, top_ks, top_ps, min_ps)
    return token.gather(1, _invert(largest * keep, uniform)[:, None]).squeeze(1), keep


def filtered(
    probabilities: torch.Tensor, top_ks: torch.Tensor, top_ps: torch.Tensor, min_ps: torch.Tensor
) -> torch.Tensor:
    """probabilities [n, vocabulary] with 0 where the filters of `sample` remove a token. Not renormalised."""
    descending, token = probabilities.sort(dim=-1, descending=True, stable=True)
    kept = descending * _kept(descending, top_ks, top_ps, min_ps)
    return torch.zeros_like(probabilities).scatter_(1, token, kept)
