"""Seeded sampling against exactly computed distributions, SGLang's own filters, and ancestral sampling of blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from sglang_auf.speculative import sampling
from tests.support.syncs import Sync, no_syncs

DRAWS = 20_000
OFF = 1 << 30  # SGLang's top_k of a request that gives none
SIGNIFICANT = 0.01


@dataclass(frozen=True)
class Filters:
    """One request's filters; the defaults are off."""

    top_k: int = OFF
    top_p: float = 1.0
    min_p: float = 0.0

    def rows(self, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return (
            torch.full((n,), self.top_k, dtype=torch.int32),
            torch.full((n,), self.top_p),
            torch.full((n,), self.min_p),
        )


ALL = {
    "plain": Filters(),
    "top_k": Filters(top_k=20),
    "top_p": Filters(top_p=0.9),
    "min_p": Filters(min_p=0.05),
    "combined": Filters(top_k=12, top_p=0.85, min_p=0.02),
}


def distribution(vocabulary: int, spread: float, seed: int) -> torch.Tensor:
    """Softmax of normal logits, float32 [vocabulary]; the larger `spread`, the more peaked."""
    return torch.softmax(torch.randn(vocabulary, generator=torch.Generator().manual_seed(seed)) * spread, dim=0)


def filtered(probabilities: torch.Tensor, filters: Filters) -> np.ndarray:
    """The distribution that is to be drawn from, worked out token by token in float64."""
    p = probabilities.double().numpy()
    kept = np.zeros_like(p)
    before = 0.0
    order = np.argsort(-p, kind="stable")
    for rank, token in enumerate(order):
        within_mass = before <= filters.top_p or filters.top_p >= 1
        if rank < filters.top_k and within_mass and p[token] >= filters.min_p * p[order[0]]:
            kept[token] = p[token]
        before += p[token]
    return kept / kept.sum()


def numbers(n: int, seed: int = 0) -> torch.Tensor:
    """n uniforms as n requests of consecutive seeds would get them at one position."""
    return sampling.uniforms(torch.arange(seed, seed + n), torch.full((n,), 77))


def draw(probabilities: torch.Tensor, filters: Filters, uniform: torch.Tensor) -> torch.Tensor:
    """One token per uniform from one distribution [vocabulary], in batches small enough for memory."""
    batches = [
        sampling.sample(probabilities.expand(len(u), -1).contiguous(), *filters.rows(len(u)), u)
        for u in uniform.split(2000)
    ]
    return torch.cat(batches)


def goodness(counts: np.ndarray, expected: np.ndarray) -> float:
    """p of Pearson's chi-square; cells expected fewer than 5 times are put together, impossible ones must be empty."""
    assert counts[expected == 0].sum() == 0, "a token that cannot be drawn was drawn"
    share = expected * counts.sum()
    common = share >= 5
    seen, due = counts[common], share[common]
    if share[~common].sum() > 0:
        seen, due = np.append(seen, counts[~common].sum()), np.append(due, share[~common].sum())
    return float(chisquare(seen, due * (seen.sum() / due.sum())).pvalue)


@pytest.mark.parametrize("filters", ALL.values(), ids=ALL)
@pytest.mark.parametrize(("vocabulary", "spread"), [(50, 1.5), (1200, 1.0)])
def test_draws_follow_the_filtered_distribution(filters: Filters, vocabulary: int, spread: float) -> None:
    p = distribution(vocabulary, spread, seed=1)
    tokens = draw(p, filters, numbers(DRAWS)).numpy()
    assert goodness(np.bincount(tokens, minlength=vocabulary), filtered(p, filters)) > SIGNIFICANT


def test_the_chi_square_notices_wrong_draws() -> None:
    p = distribution(50, 1.5, seed=1)
    bent = np.bincount(draw(p, Filters(), numbers(DRAWS) ** 1.1), minlength=50)
    assert goodness(bent, filtered(p, Filters())) < 1e-6
    unfiltered = np.bincount(draw(p, Filters(), numbers(DRAWS)), minlength=50)
    with pytest.raises(AssertionError, match="cannot be drawn"):
        goodness(unfiltered, filtered(p, ALL["top_k"]))


@pytest.mark.parametrize(("vocabulary", "spread"), [(64, 1.0), (64, 6.0), (1600, 0.3), (1600, 2.0), (1600, 5.0)])
def test_filters_and_order_are_those_of_sglangs_sampler(vocabulary: int, spread: float) -> None:
    """Inverting SGLang's own filtered weights, in its order, gives our draws."""
    from sglang.srt.layers.sampler import top_k_top_p_min_p_sampling_from_probs_torch

    requests = [*list(ALL.values())[1:], Filters(top_k=1300, top_p=0.98), Filters(top_p=0.999, min_p=0.001)]
    rows = len(requests)
    p = torch.stack([distribution(vocabulary, spread, seed) for seed in range(rows)])
    top_ks = torch.tensor([f.top_k for f in requests], dtype=torch.int32)
    top_ps = torch.tensor([f.top_p for f in requests])
    min_ps = torch.tensor([f.min_p for f in requests])
    _, weights, order, _ = top_k_top_p_min_p_sampling_from_probs_torch(
        p.clone(), top_ks, top_ps, min_ps, True, None, torch.zeros(rows), return_filtered_probs=True
    )
    mass = weights.double().cumsum(dim=-1)
    for number in np.linspace(0, 1, 100, endpoint=False) + 0.0011:
        uniform = torch.full((rows,), number, dtype=torch.float64)
        drawn = sampling.sample(p, top_ks, top_ps, min_ps, uniform)
        column = torch.searchsorted(mass, (uniform * mass[:, -1])[:, None], right=True)
        due = order.gather(1, column).long()
        # Tokens of equal probability may be ordered either way.
        assert torch.equal(p.gather(1, drawn[:, None]), p.gather(1, due)), number


def test_a_filter_wider_than_the_pool_sees_the_whole_vocabulary() -> None:
    p = distribution(1500, 0.2, seed=3)  # nearly flat: top_p 0.9 keeps about 1300 tokens
    assert (filtered(p, Filters(top_p=0.9)) > 0).sum() > sampling.POOLS[-1]
    drawn = draw(p, Filters(top_p=0.9), numbers(4000))
    ranks = p.sort(descending=True).indices.argsort()[drawn]
    assert ranks.max() > sampling.POOLS[-1]


def mixed_batch(rows: int, vocabulary: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Every kind of request side by side: greedy, plain, narrow, and wider than the pool."""
    generator = torch.Generator().manual_seed(seed)
    spreads = torch.tensor([0.2, 1.0, 6.0])[torch.arange(rows) % 3]
    p = torch.softmax(torch.randn(rows, vocabulary, generator=generator) * spreads[:, None], dim=-1)
    pick = torch.arange(rows) % 5
    return (
        p,
        torch.tensor([1, OFF, 40, OFF, 1900], dtype=torch.int32)[pick],
        torch.tensor([1.0, 1.0, 0.9, 0.97, 0.99])[pick],
        torch.tensor([0.0, 0.0, 0.1, 0.0, 0.0])[pick],
        torch.rand(rows, generator=generator, dtype=torch.float64),
    )


def reference(
    p: torch.Tensor, top_ks: torch.Tensor, top_ps: torch.Tensor, min_ps: torch.Tensor, uniform: torch.Tensor
) -> torch.Tensor:
    """One row at a time, the whole vocabulary sorted: what `sample` means."""
    drawn = []
    for row, top_k, top_p, min_p, u in zip(p, top_ks, top_ps, min_ps, uniform, strict=True):
        order, weights = torch.arange(len(row)), row
        if top_k == 1:
            drawn.append(int(row.argmax()))
            continue
        if top_k < len(row) or top_p < 1 or min_p > 0:
            kept = sampling.filtered(row[None], top_k[None], top_p[None], min_p[None])[0]
            weights, order = kept.sort(descending=True, stable=True)
        mass = weights.double().cumsum(dim=0)
        drawn.append(int(order[int((mass <= u * mass[-1]).sum())]))
    return torch.tensor(drawn)


def rounded(p: torch.Tensor) -> torch.Tensor:
    """Distributions with many equal values, as bf16 logits give them."""
    return torch.softmax(p.log().bfloat16().float(), dim=-1)


def everything(vocabulary: int, seed: int) -> tuple[torch.Tensor, ...]:
    """300 rows: peaked to flat, with ties or only ties, each under all kinds of filters."""
    generator = torch.Generator().manual_seed(seed)
    rows = 300
    spreads = torch.tensor([0.0, 0.05, 0.3, 1.0, 3.0, 8.0])[torch.arange(rows) % 6]
    p = torch.softmax(torch.randn(rows, vocabulary, generator=generator) * spreads[:, None], dim=-1)
    p = torch.where((torch.arange(rows) % 12 < 6)[:, None], rounded(p), p)
    pick = torch.randint(11, (rows,), generator=generator)
    return (
        p,
        torch.tensor([1, OFF, 2, 20, 63, 64, 65, OFF, OFF, 1500, vocabulary], dtype=torch.int32)[pick],
        torch.tensor([1.0, 1.0, 1.0, 0.95, 0.9, 1.0, 0.999, 0.95, 1.0, 0.9, 1.0])[pick],
        torch.tensor([0.0, 0.0, 0.0, 0.0, 0.02, 0.0, 0.0, 0.0, 0.05, 0.001, 0.0])[pick],
        torch.rand(rows, generator=generator, dtype=torch.float64),
    )


@pytest.fixture(params=[False, True], ids=["CPU", "accelerator"])
def waits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether draws go the way they go on a device behind a queue."""
    monkeypatch.setattr(sampling, "looking_waits", lambda _: request.param)
    return bool(request.param)


@pytest.mark.parametrize("vocabulary", [40, 1000, 2500])
def test_draws_are_those_of_the_simple_definition(vocabulary: int, waits: bool) -> None:
    """The same tokens, not just the same distribution; whatever is drawn at once, and whoever says the kinds."""
    batch = everything(vocabulary, seed=vocabulary)
    expected = reference(*batch)
    settings = [part.tolist() for part in batch[1:4]]
    kinds = [sampling.kind_of(*of_row, vocabulary) for of_row in zip(*settings, strict=True)]
    assert torch.equal(sampling.sample(*batch), expected)
    assert torch.equal(sampling.sample(*batch, kinds=kinds), expected)
    for size in (1, 8, 50):  # few enough that an accelerator sorts them, and too many
        for rows in torch.arange(300).split(size)[:6]:
            part = (*(of[rows] for of in batch), kinds[rows[0] : rows[-1] + 1])
            assert torch.equal(sampling.sample(*part), expected[rows])


def test_kinds_are_those_of_requests_with_several_rows(waits: bool) -> None:
    batch = everything(1000, seed=1)
    requests = [part[::10].repeat_interleave(10) for part in batch[1:4]]
    kinds = [sampling.kind_of(*of, 1000) for of in zip(*(part[::10].tolist() for part in requests), strict=True)]
    given = (batch[0], *requests, batch[4])
    assert torch.equal(sampling.sample(*given, kinds=kinds), reference(*given))


@pytest.mark.parametrize("filters", [*ALL.values(), Filters(top_k=1)], ids=[*ALL, "greedy"])
def test_an_accelerator_is_not_waited_for(filters: Filters, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "looking_waits", lambda _: True)
    p = torch.stack([distribution(3000, spread, seed=1) for spread in (0.0, 0.3, 5.0, 8.0)] * 4)
    rows, uniform = filters.rows(16), torch.rand(16, dtype=torch.float64)
    kinds = [sampling.kind_of(filters.top_k, filters.top_p, filters.min_p, 3000)] * 4
    with no_syncs():
        drawn = sampling.sample(p, *rows, uniform, kinds=kinds)
    assert torch.equal(drawn, reference(p, *rows, uniform))


def test_many_rows_whose_filter_nothing_bounds_are_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """To sort the whole vocabulary for each of them would take longer."""
    monkeypatch.setattr(sampling, "looking_waits", lambda _: True)
    n = sampling.SORTED_ROWS + 1
    p = distribution(3000, 5.0, seed=1).repeat(n, 1)
    with no_syncs(), pytest.raises(Sync, match="nonzero"):
        sampling.sample(p, *Filters(top_p=0.9).rows(n), torch.rand(n), kinds=[sampling.OPEN] * n)


def test_a_rows_draw_is_the_same_alone_and_in_any_company() -> None:
    batch = mixed_batch(30, 2100, seed=5)
    together = sampling.sample(*batch)
    alone = torch.cat([sampling.sample(*(part[i : i + 1] for part in batch)) for i in range(30)])
    assert torch.equal(together, alone)
    for seed in range(5):
        subset = torch.randperm(30, generator=torch.Generator().manual_seed(seed))[: 7 + 5 * seed]
        assert torch.equal(sampling.sample(*(part[subset] for part in batch)), together[subset])


def test_greedy_rows_give_the_most_probable_token() -> None:
    p, top_ks, top_ps, min_ps, uniform = mixed_batch(30, 300, seed=6)
    top_ks[:] = 1
    assert torch.equal(sampling.sample(p, top_ks, top_ps, min_ps, uniform), p.argmax(dim=-1))


weights = st.lists(st.sampled_from([0.0, 0.0, 1e-30, 0.001, 1.0, 3.0]), min_size=2, max_size=12).filter(any)
edges = st.one_of(st.sampled_from([0.0, 2.0**-53, 0.5, 1 - 2.0**-53]), st.floats(0, 1, exclude_max=True))


@given(weights, edges, st.integers(2, 14), st.floats(0.01, 1), st.floats(0, 1))
def test_only_tokens_that_the_filters_keep_are_drawn(
    given_weights: list[float], uniform: float, top_k: int, top_p: float, min_p: float
) -> None:
    p = torch.tensor([given_weights])
    p = p / p.sum()
    for filters in (Filters(), Filters(top_k, top_p, min_p)):
        (token,) = sampling.sample(p, *filters.rows(1), torch.tensor([uniform], dtype=torch.float64)).tolist()
        better = p[0][p[0] > p[0, token]]
        assert p[0, token] > 0
        assert len(better) < filters.top_k
        assert better.double().sum() <= filters.top_p + 1e-6
        assert p[0, token] >= p.max() * filters.min_p


@pytest.mark.parametrize("filters", ALL.values(), ids=ALL)
def test_a_row_of_nan_gives_a_token_of_the_vocabulary_and_spares_the_others(filters: Filters) -> None:
    p = distribution(60, 1.0, seed=2).repeat(3, 1)
    p[1] = float("nan")
    uniform = torch.full((3,), 0.4, dtype=torch.float64)
    drawn = sampling.sample(p, *filters.rows(3), uniform)
    assert 0 <= drawn[1] < 60
    assert drawn[0] == drawn[2] == sampling.sample(p[:1], *filters.rows(1), uniform[:1])


# --- the numbers ---

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def splitmix64(state: int, index: int) -> int:
    """The index-th output (from 1) of the published SplitMix64 seeded with `state`, on Python integers."""
    z = (state + index * GOLDEN) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_the_reference_generator_is_the_published_one() -> None:
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [splitmix64(1234567, index) for index in (1, 2, 3, 4)] == published


SEEDS = [0, 1, -1, 42, 1234567, (1 << 62) + 5, (1 << 63) - 1, -(1 << 63), -987654321]


@pytest.mark.parametrize("seed", SEEDS)
def test_uniforms_are_splitmix64_of_seed_and_position(seed: int) -> None:
    positions = [0, 1, 2, 511, 40_000, (1 << 31) + 3]
    found = sampling.uniforms(torch.tensor([seed] * len(positions)), torch.tensor(positions))
    state = splitmix64(seed, 1)
    assert found.tolist() == [(splitmix64(state, position) >> 11) * 2.0**-53 for position in positions]
    assert found.dtype == torch.float64
    assert 0 <= found.min() <= found.max() < 1


@pytest.mark.parametrize(
    ("seeds", "positions"),
    [
        (torch.full((DRAWS,), 7), torch.arange(DRAWS)),
        (torch.arange(DRAWS) - DRAWS // 2, torch.full((DRAWS,), 7)),
        (torch.arange(DRAWS) % 60, torch.arange(DRAWS) // 60),
    ],
    ids=["over positions", "over seeds, negative too", "over both"],
)
def test_uniforms_are_uniform_and_neighbours_unrelated(seeds: torch.Tensor, positions: torch.Tensor) -> None:
    u = sampling.uniforms(seeds, positions).numpy()
    cells = np.bincount((u * 100).astype(int), minlength=100)
    assert chisquare(cells).pvalue > SIGNIFICANT
    pairs = (u[:-1] * 12).astype(int) * 12 + (u[1:] * 12).astype(int)
    assert chisquare(np.bincount(pairs, minlength=144)).pvalue > SIGNIFICANT


# --- blocks: a target with 4 tokens, whose next token depends on its position and the token before ---

VOCABULARY, BLOCK, ANSWER = 4, 3, 4
TARGET = torch.softmax(torch.randn(16, VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(8)), dim=-1)
GUESS = torch.randint(VOCABULARY, (16, VOCABULARY), generator=torch.Generator().manual_seed(9))  # the drafter
FIRST = 2  # the token every answer starts after

Verify = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def exact(probabilities: torch.Tensor, drafted: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The target's tokens [blocks, B] of probabilities [blocks, B, vocabulary]: what the worker does."""
    rows = probabilities.flatten(0, 1)
    return sampling.sample(rows, *Filters().rows(len(rows)), uniform.flatten()).view(-1, BLOCK)


def greedy(probabilities: torch.Tensor, drafted: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Broken: what upstream does without its CUDA kernel."""
    return probabilities.argmax(dim=-1)


def trusting(probabilities: torch.Tensor, drafted: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Broken: accepts every draft and draws the last token only."""
    drawn = exact(probabilities, drafted, uniform)
    return torch.cat([drafted, drawn[:, -1:]], dim=1)


def decode(seeds: torch.Tensor, verify: Verify) -> torch.Tensor:
    """ANSWER tokens of each seed, block by block; [seeds, ANSWER]."""
    n = len(seeds)
    tokens = torch.full((n, ANSWER + BLOCK + 1), FIRST)
    length = torch.ones(n, dtype=torch.long)
    row = torch.arange(n)
    while (length <= ANSWER).any():
        block = [tokens[row, length - 1]]
        for slot in range(BLOCK - 1):
            block.append(GUESS[length - 1 + slot, block[-1]])
        candidates = torch.stack(block, dim=1)
        positions = (length - 1)[:, None] + torch.arange(BLOCK)
        uniform = sampling.uniforms(seeds.repeat_interleave(BLOCK), positions.flatten()).view(n, BLOCK)
        drafted = candidates[:, 1:]
        target = verify(TARGET[positions, candidates], drafted, uniform)
        accepted = (drafted == target[:, :-1]).long().cumprod(dim=-1).sum(dim=-1)
        emitting = length <= ANSWER
        for slot in range(BLOCK):
            takes = emitting & (slot <= accepted)
            tokens[row[takes], length[takes] + slot] = target[takes, slot]
        length += torch.where(emitting, accepted + 1, 0)
    return tokens[:, 1 : ANSWER + 1]


def ancestral() -> np.ndarray:
    """P of each answer [4 ** ANSWER], by the chain rule."""
    joint = np.ones(1)
    for position in range(ANSWER):
        last = np.full(1, FIRST) if position == 0 else np.arange(len(joint)) % VOCABULARY
        joint = (joint[:, None] * TARGET[position].double().numpy()[last]).reshape(-1)
    return joint / joint.sum()


def goodness_of_blocks(verify: Verify) -> float:
    answers = decode(torch.arange(DRAWS) * 31 + 5, verify)
    code = (answers * VOCABULARY ** torch.arange(ANSWER - 1, -1, -1)).sum(dim=1)
    return goodness(np.bincount(code.numpy(), minlength=VOCABULARY**ANSWER), ancestral())


def test_answers_made_of_verified_blocks_follow_ancestral_sampling() -> None:
    assert goodness_of_blocks(exact) > SIGNIFICANT


@pytest.mark.parametrize("broken", [greedy, trusting])
def test_a_broken_verifier_fails_that_test(broken: Verify) -> None:
    assert goodness_of_blocks(broken) < 1e-6


def test_a_seeded_answer_is_that_of_plain_decoding() -> None:
    seeds = torch.arange(-500, 500)
    plain = torch.full((len(seeds), 1), FIRST)
    for position in range(ANSWER):
        p = TARGET[position, plain[:, -1]]
        uniform = sampling.uniforms(seeds, torch.full_like(seeds, position))
        plain = torch.cat([plain, sampling.sample(p, *Filters().rows(len(seeds)), uniform)[:, None]], dim=1)
    assert torch.equal(decode(seeds, exact), plain[:, 1:])


def test_filtered_keeps_what_sample_can_draw() -> None:
    """Against the meaning of the filters, token by token."""
    generator = torch.Generator().manual_seed(5)
    probabilities = torch.softmax(torch.randn(20, 40, generator=generator) * 2, dim=-1)
    top_ks, top_ps, min_ps = torch.full((20,), 12), torch.full((20,), 0.8), torch.full((20,), 0.03)
    kept = sampling.filtered(probabilities, top_ks, top_ps, min_ps)
    for row, result in zip(probabilities.tolist(), kept.tolist(), strict=True):
        before, expected = 0.0, [0.0] * len(row)
        for rank, token in enumerate(sorted(range(len(row)), key=lambda t, row=row: -row[t])):
            if rank < 12 and before <= 0.8 and row[token] >= 0.03 * max(row):
                expected[token] = row[token]
            before += row[token]
        assert result == pytest.approx(expected)


@pytest.mark.parametrize("pool", [4, 8, 64])
@pytest.mark.parametrize("filters", [Filters(top_k=4), Filters(top_k=7), Filters(top_p=0.5)], ids=["4", "7", "top_p"])
def test_of_equally_likely_tokens_the_lower_ones_are_kept(
    filters: Filters, pool: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in bf16, where logits are often equal; ties reach over the end of the filter and of the pool."""
    monkeypatch.setattr(sampling, "POOLS", (pool,))
    levels = torch.randint(3, (64,), generator=torch.Generator().manual_seed(2)).float()
    probabilities = torch.softmax(levels, dim=0).repeat(DRAWS, 1)
    uniform = (torch.arange(DRAWS) + 0.5) / DRAWS
    drawn = sampling.sample(probabilities, *filters.rows(DRAWS), uniform.double())
    kept = filtered(probabilities[0], filters) > 0
    assert sorted(set(drawn.tolist())) == kept.nonzero()[0].tolist()
    assert torch.equal(sampling.filtered(probabilities[:1], *filters.rows(1))[0] > 0, torch.from_numpy(kept))
