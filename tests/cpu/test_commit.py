"""The drafter's context is written as by upstream's method, which is asked for once up to each power of two of rows.

What is held back is written before anybody reads it, and before its slots may be another request's.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_auf.cpu import kernels, replay
from sglang_auf.cpu.commit import Commit, Context
from sglang_auf.cpu.linear import RowInvariantLinear
from sglang_auf.env import REPLAY

HEADS, HEAD, FEATURES, SLOTS = 2, 32, 96, 700


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


class Worker:
    """What is read of SGLang's worker, with a drafter of two layers. `bends`: its method does something else."""

    def __init__(self, lilicorr: Any = None) -> None:
        self.lilicorr, self.calls, self.bends = lilicorr, 0, False
        self.products = [RowInvariantLinear(normal(2 * HEADS * HEAD, FEATURES, seed=i)) for i in range(2)]
        self.pools = [torch.zeros(SLOTS, 2, HEADS, HEAD, dtype=torch.bfloat16) for _ in range(2)]
        self.norm = normal(HEAD, seed=3)
        self.table = torch.rand(100, HEAD, generator=torch.Generator().manual_seed(5))
        layers = [SimpleNamespace(self_attn=SimpleNamespace(attn=SimpleNamespace(layer_id=i))) for i in range(2)]
        self.draft_model = SimpleNamespace(layers=layers)
        pool = SimpleNamespace(interleaved=lambda layer: self.pools[layer])
        self.draft_model_runner = SimpleNamespace(token_to_kv_pool=pool)

    def _append_target_hidden_to_draft_kv_by_loc(
        self, target_hidden: torch.Tensor, cache_loc: torch.Tensor, positions: torch.Tensor
    ) -> None:
        self.calls += 1
        for product, pool in zip(self.products, self.pools, strict=True):
            k, v = product(target_hidden).split([HEADS * HEAD, HEADS * HEAD], dim=-1)
            k = kernels.rms_norm(k.reshape(-1, HEAD), self.norm, 1e-5)[0].view_as(k)
            _, k = kernels.rotate(k, k, HEAD, self.table, positions)
            k, v = (part.view(-1, HEADS, HEAD) for part in (k, v))
            kernels.store((v if self.bends else k).flatten(1), v.flatten(1), pool, cache_loc)


def given(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return (
        normal(rows, FEATURES, seed=seed),
        torch.randint(100, (rows,), generator=draw),
        torch.randperm(SLOTS, generator=draw)[:rows],
    )


@pytest.mark.parametrize("first", [[], [1, 1]], ids=["some rows first", "one row first"])
@torch.inference_mode()
def test_the_cache_is_as_upstreams_method_leaves_it(first: list[int], caplog: pytest.LogCaptureFixture) -> None:
    """One row is not watched: its parts are views where those of more rows are copied."""
    mine, upstreams = Worker(), Worker()
    commit = Commit(mine)
    for seed, rows in enumerate([*first, 3, 1, 2, 5, 8, 7, 40, 4, 1, 6]):
        commit(*given(rows, seed))
        features, positions, slots = given(rows, seed)
        upstreams._append_target_hidden_to_draft_kv_by_loc(features, slots, positions)
        assert all(torch.equal(a, b) for a, b in zip(mine.pools, upstreams.pools, strict=True)), rows
    assert mine.calls == len(first) + 1 + 5, "to record, and to check 1, 2, 4, 8 and 64 rows"
    assert "not replayed" not in caplog.text


@torch.inference_mode()
def test_a_method_that_has_become_another_one_is_noticed_and_wins(caplog: pytest.LogCaptureFixture) -> None:
    worker, other = Worker(), Worker()
    commit = Commit(worker)
    commit(*given(3, seed=0))
    worker.bends = other.bends = True
    before = replay.CHECKS
    commit(*given(8, seed=1))
    features, positions, slots = given(8, seed=1)
    other._append_target_hidden_to_draft_kv_by_loc(features, slots, positions)
    for mine, its in zip(worker.pools, other.pools, strict=True):
        assert torch.equal(mine[slots], its[slots])
    assert before + 1 == replay.CHECKS
    assert "the drafter's context is not replayed" in caplog.text


@torch.inference_mode()
def test_without_replay_and_with_a_publication_beside_the_write_upstreams_method_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    publishes = Worker(lilicorr=object())
    monkeypatch.setenv(REPLAY.name, "1")
    asked = [(publishes, Commit(publishes))]
    monkeypatch.setenv(REPLAY.name, "0")
    off = Worker()
    asked.append((off, Commit(off)))
    for worker, commit in asked:
        for seed in range(3):
            commit(*given(4, seed))
        assert worker.calls == 3


ALONE, TOGETHER = torch.tensor([4]), torch.tensor([4, 7])


def steps(rows: list[int]) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """So many rows each, no slot twice."""
    order = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(9)).split([*rows, SLOTS - sum(rows)])
    return [(*given(n, seed)[:2], slots) for seed, (n, slots) in enumerate(zip(rows, order[:-1], strict=True))]


def written(worker: Worker, committed: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> list[bool]:
    """Of each step, whether the cache holds what upstream's method would have written."""
    upstreams = Worker()
    for features, positions, slots in committed:
        upstreams._append_target_hidden_to_draft_kv_by_loc(features, slots, positions)
    return [
        all(torch.equal(mine[slots], its[slots]) for mine, its in zip(worker.pools, upstreams.pools, strict=True))
        for *_, slots in committed
    ]


@torch.inference_mode()
def test_what_is_committed_is_held_until_something_is_drafted() -> None:
    worker, all_steps = Worker(), steps([1, 3, 1, 2])
    context = Context(worker)
    for committed in all_steps[:3]:
        assert context.write_if_due(ALONE, drafts=False) == 0
        context.add(ALONE, *committed)
    assert written(worker, all_steps) == [False] * 4
    assert context.write_if_due(ALONE, drafts=True) > 0, "earlier steps left it to this one"
    assert written(worker, all_steps) == [True, True, True, False]
    context.add(ALONE, *all_steps[3])
    assert context.write_if_due(ALONE, drafts=True) == 0, "what the step before committed is a step's own work"
    assert written(worker, all_steps) == [True] * 4
    before = worker.calls
    context.write()
    assert worker.calls == before, "nothing is left"


@pytest.mark.parametrize("others", [TOGETHER, torch.tensor([5])], ids=["one has come", "another one"])
@torch.inference_mode()
def test_it_is_written_when_other_requests_decode(others: torch.Tensor) -> None:
    """Their slots may be those that a request of before has left."""
    worker, (first, reused) = Worker(), steps([2, 2])
    context = Context(worker)
    context.add(ALONE, *first)
    context.write_if_due(others, drafts=False)
    assert written(worker, [first]) == [True]
    context.add(others, *reused[:2], first[2])
    context.write()
    assert written(worker, [(*reused[:2], first[2])]) == [True]


@torch.inference_mode()
def test_no_more_is_held_than_a_recording_has_room_for() -> None:
    worker, all_steps = Worker(), steps([100, 100, 100, 300])
    context = Context(worker)
    for committed, before in zip(all_steps, ([], [False], [True, True], [True, True, False]), strict=True):
        context.write_if_due(ALONE, drafts=False)
        assert written(worker, all_steps)[: len(before)] == before
        context.add(ALONE, *committed)
    context.write()
    assert written(worker, all_steps) == [True] * 4


@torch.inference_mode()
def test_nothing_is_held_where_a_write_publishes() -> None:
    worker, (committed,) = Worker(lilicorr=object()), steps([2])
    Context(worker).add(ALONE, *committed)
    assert written(worker, [committed]) == [True]
