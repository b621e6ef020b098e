"""The CPU attention backend against dense float64 attention, and bit for bit against itself in other batches.

The backend runs over fake runner and pool objects; the masks of the reference are written out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_auf.cpu import kernels
from sglang_auf.cpu.attention import CpuAttentionBackend
from sglang_auf.speculative.tree import Forest

HEAD = 64
WIDTH = 1200  # of SGLang's table of slots: the longest context
SLOTS = 20_000
CAUSAL, WHOLE = AttentionType.DECODER, AttentionType.ENCODER_ONLY


class Pool:
    """K and V of one layer side by side, as CpuKVPool lays them out."""

    def __init__(self, key_heads: int, head_dim: int) -> None:
        # Slots that no request wrote hold large values, so that a wrong mask shows.
        self.layer = torch.full((SLOTS, 2, key_heads, head_dim), 30.0, dtype=torch.bfloat16)

    def set_kv_buffer(self, layer: Any, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        kernels.store(k.flatten(1), v.flatten(1), self.layer, slots)

    def interleaved(self, layer_id: int) -> torch.Tensor:
        return self.layer


@dataclass
class Request:
    """One request's tokens: q [tokens, heads, head_dim], k and v [tokens, key heads, head_dim]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    row: int
    slots: torch.Tensor


@dataclass
class Machine:
    """A backend over `heads` query and `key_heads` key heads, and requests whose tokens lie at random slots."""

    heads: int = 9
    key_heads: int = 3
    head_dim: int = HEAD
    requests: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)
        self.pool = Pool(self.key_heads, self.head_dim)
        self.free = torch.randperm(SLOTS, generator=self.generator)
        # Unused columns hold the slots of other requests.
        table = torch.randint(SLOTS, (100, WIDTH), generator=self.generator, dtype=torch.int32)
        self.table = SimpleNamespace(req_to_token=table)
        runner = SimpleNamespace(req_to_token_pool=self.table, token_to_kv_pool=self.pool)
        self.backend = CpuAttentionBackend(runner)

    def request(self, tokens: int, like: Request | None = None) -> Request:
        """A new request. like: a request whose tokens it has, at other slots."""

        def normal(heads: int) -> torch.Tensor:
            return torch.randn(tokens, heads, self.head_dim, generator=self.generator).bfloat16()

        row = 3 * len(self.requests) + 1
        slots, self.free = self.free[:tokens], self.free[tokens:]
        assert len(slots) == tokens
        self.table.req_to_token[row, :tokens] = slots.int()
        q, k, v = (
            (like.q, like.k, like.v) if like else (normal(h) for h in (self.heads, self.key_heads, self.key_heads))
        )
        self.requests.append(Request(q, k, v, row, slots))
        return self.requests[-1]

    def forward(
        self, mode: ForwardMode, parts: Sequence[tuple[Request, int, int]], kind: AttentionType = CAUSAL
    ) -> list[torch.Tensor]:
        """One pass over tokens [start, end) of each request, whose earlier tokens are in the pool; one result each."""
        rows = [end - start for _, start, end in parts]
        verify = mode.is_target_verify()
        batch = SimpleNamespace(
            forward_mode=mode,
            req_pool_indices=torch.tensor([request.row for request, _, _ in parts]),
            # Before a verify pass SGLang counts the committed tokens only.
            seq_lens=torch.tensor([start if verify else end for _, start, end in parts]),
            extend_seq_lens_cpu=rows if mode.is_extend() and not verify else None,
            out_cache_loc=torch.cat([request.slots[start:end] for request, start, end in parts]),
            spec_info=SimpleNamespace(draft_token_num=rows[0]) if verify else None,
        )
        q, k, v = (
            torch.cat([getattr(request, name)[start:end] for request, start, end in parts]) for name in ("q", "k", "v")
        )
        return list(self.attend(batch, q, k, v, kind).split(rows))

    def attend(
        self, batch: SimpleNamespace, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kind: AttentionType = CAUSAL
    ) -> torch.Tensor:
        """[tokens, heads * head_dim], of SGLang's batch in a single layer."""
        layer = SimpleNamespace(
            is_cross_attention=False,
            logit_cap=0.0,
            sliding_window_size=-1,
            layer_id=0,
            tp_q_head_num=self.heads,
            qk_head_dim=self.head_dim,
            attn_type=kind,
            scaling=self.head_dim**-0.5,
        )
        self.backend.init_forward_metadata(batch)
        call = self.backend.forward_decode if batch.forward_mode.is_decode() else self.backend.forward_extend
        out = call(q.flatten(1), k, v, layer, batch)
        assert out.shape == (len(q), self.heads * self.head_dim)
        return out

    def prefill(self, *requests: Request) -> list[torch.Tensor]:
        """All tokens of each request, one request after the other."""
        return [self.forward(ForwardMode.EXTEND, [(r, 0, len(r.q))])[0] for r in requests]


def dense(request: Request, start: int, end: int, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of tokens [start, end) in float64 and, for its tolerance, the same over |v|; [rows, heads * dim]."""
    group = request.q.shape[1] // request.k.shape[1]
    q = request.q[start:end].double().transpose(0, 1)
    k, v = (x[:end].double().transpose(0, 1).repeat_interleave(group, dim=0) for x in (request.k, request.v))
    mask = torch.zeros(end - start, end).double()
    if causal:
        for row in range(end - start):
            mask[row, start + row + 1 :] = -torch.inf
    weights = torch.softmax(q @ k.transpose(1, 2) * q.shape[-1] ** -0.5 + mask, dim=-1)
    out, size = weights @ v, weights @ v.abs()
    return out.transpose(0, 1).flatten(1), size.transpose(0, 1).flatten(1)


def assert_exact(found: torch.Tensor, request: Request, start: int, end: int, causal: bool = True) -> None:
    """Within the rounding of the weights and of the result to bf16."""
    exact, size = dense(request, start, end, causal)
    assert ((found.double() - exact).abs() <= 2.0**-7 * size + 1e-4).all()


HEADS = [(9, 3), (8, 8), (8, 1), (16, 4)]
heads = pytest.mark.parametrize(("query", "key"), HEADS, ids=[f"{q} on {k}" for q, k in HEADS])


@heads
def test_prefill(query: int, key: int) -> None:
    machine = Machine(query, key)
    for length in (1, 2, 17, 64, 200):
        request = machine.request(length)
        (found,) = machine.prefill(request)
        assert_exact(found, request, 0, length)


@heads
def test_decode_of_mixed_lengths(query: int, key: int) -> None:
    machine = Machine(query, key)
    requests = [machine.request(length) for length in (1, 2, 64, 65, 511, 512, 513, 700)]
    machine.prefill(*requests)
    for found, request in zip(
        machine.forward(ForwardMode.DECODE, [(r, len(r.q) - 1, len(r.q)) for r in requests]), requests, strict=True
    ):
        assert_exact(found, request, len(request.q) - 1, len(request.q))


@heads
def test_extend_with_prefixes_and_mixed_lengths(query: int, key: int) -> None:
    machine = Machine(query, key)
    parts = [(0, 5), (40, 41), (500, 530), (0, 90), (100, 117), (3, 603), (60, 76)]
    requests = [machine.request(end) for _, end in parts]
    for request, (start, _) in zip(requests, parts, strict=True):
        if start:
            machine.forward(ForwardMode.EXTEND, [(request, 0, start)])
    spans = [(r, *part) for r, part in zip(requests, parts, strict=True)]
    for found, (request, start, end) in zip(machine.forward(ForwardMode.EXTEND, spans), spans, strict=True):
        assert_exact(found, request, start, end)


@heads
@pytest.mark.parametrize("block", [2, 8, 16])
@pytest.mark.parametrize("kind", [CAUSAL, WHOLE], ids=["verify", "draft"])
def test_a_block_is_verified_causally_and_drafted_seeing_all_of_it(
    query: int, key: int, block: int, kind: AttentionType
) -> None:
    machine = Machine(query, key)
    prefixes = (1, 60, 63, 508, 640)
    requests = [machine.request(prefix + block) for prefix in prefixes]
    machine.prefill(*requests)
    spans = [(r, prefix, prefix + block) for r, prefix in zip(requests, prefixes, strict=True)]
    for found, (request, start, end) in zip(
        machine.forward(ForwardMode.TARGET_VERIFY, spans, kind), spans, strict=True
    ):
        assert_exact(found, request, start, end, causal=kind == CAUSAL)
        if start == 1:
            other = dense(request, start, end, causal=kind != CAUSAL)[0]
            assert (found[:-1].double() - other[:-1]).abs().max() > 0.1, "the two masks must not give the same"


def test_a_context_as_long_as_the_table() -> None:
    machine = Machine()
    request = machine.request(WIDTH)
    assert WIDTH % kernels.KEYS_AT_ONCE != 0, "else its last keys are not fewer than a step's"
    (found,) = machine.prefill(request)
    assert_exact(found[-3:], request, WIDTH - 3, WIDTH)


def test_keys_and_values_are_written_before_they_are_read_and_only_when_asked() -> None:
    machine = Machine()
    request = machine.request(20)
    machine.prefill(request)
    assert torch.equal(machine.pool.layer[request.slots, 0], request.k)
    assert torch.equal(machine.pool.layer[request.slots, 1], request.v)
    machine.pool.layer.fill_(0)
    batch = SimpleNamespace(
        forward_mode=ForwardMode.DECODE,
        req_pool_indices=torch.tensor([request.row]),
        seq_lens=torch.tensor([20]),
        out_cache_loc=request.slots[19:],
        spec_info=None,
    )
    machine.backend.init_forward_metadata(batch)
    layer = SimpleNamespace(
        is_cross_attention=False, logit_cap=0.0, sliding_window_size=-1, layer_id=0, tp_q_head_num=9,
        qk_head_dim=HEAD, attn_type=CAUSAL, scaling=1.0,
    )  # fmt: skip
    machine.backend.forward_decode(
        request.q[19:].flatten(1), request.k[19:], request.v[19:], layer, batch, save_kv_cache=False
    )
    assert (machine.pool.layer == 0).all()


# --- bits ---


def company(machine: Machine) -> list[Request]:
    """Other requests, of many lengths."""
    return [machine.request(length) for length in (3, 40, 130, 516, 690)]


@heads
@pytest.mark.parametrize("head_dim", [40, 64, 80, 128])
@pytest.mark.parametrize("length", [20, 150, 300, 530, 700])
def test_a_token_has_the_same_bits_however_it_is_computed(query: int, key: int, head_dim: int, length: int) -> None:
    """Prefill in one piece or in chunks, verify in blocks of any size, decode: alone and among others."""
    machine = Machine(query, key, head_dim)
    original = machine.request(length)
    (whole,) = machine.prefill(original)
    others = company(machine)
    machine.prefill(*others)

    def check(found: torch.Tensor, start: int, end: int, how: str) -> None:
        assert torch.equal(found, whole[start:end]), how

    def again() -> Request:
        return machine.request(length, like=original)

    for chunk in (7, 64, 333):
        request = again()
        for start in range(0, length, chunk):
            end = min(start + chunk, length)
            check(machine.forward(ForwardMode.EXTEND, [(request, start, end)])[0], start, end, f"chunks of {chunk}")

    for first in (11, 12, 17, 32, 33, 86, 257):
        if first < length:
            request = again()
            machine.forward(ForwardMode.EXTEND, [(request, 0, length - first)])
            found = machine.forward(ForwardMode.EXTEND, [(request, length - first, length)])[0]
            check(found, length - first, length, f"a last chunk of {first}")

    request = again()
    last = length - 16
    parts = [(request, last, length)] + [(other, 1, len(other.q)) for other in others]
    machine.forward(ForwardMode.EXTEND, [(request, 0, last)])
    check(machine.forward(ForwardMode.EXTEND, parts)[0], last, length, "a chunk among others")
    check(machine.forward(ForwardMode.EXTEND, parts[::-1])[-1], last, length, "a chunk behind others")

    for block in (2, 3, 8, 16):
        for start in range(last, length - block + 1, block):
            check(
                machine.forward(ForwardMode.TARGET_VERIFY, [(request, start, start + block)])[0],
                start,
                start + block,
                f"a block of {block}",
            )
        crowd = [(other, len(other.q) - block, len(other.q)) for other in others if len(other.q) > block]
        found = machine.forward(ForwardMode.TARGET_VERIFY, [*crowd, (request, last, last + block)])[-1]
        check(found, last, last + block, f"a block of {block} among others")

    for position in range(last, length):
        check(
            machine.forward(ForwardMode.DECODE, [(request, position, position + 1)])[0],
            position,
            position + 1,
            "decoded alone",
        )
    crowd = [(other, len(other.q) - 1, len(other.q)) for other in others]
    for position in range(last, length, 3):
        found = machine.forward(ForwardMode.DECODE, [*crowd, (request, position, position + 1)])[-1]
        check(found, position, position + 1, "decoded among others")


def test_a_drafted_block_has_the_same_bits_in_any_company() -> None:
    machine = Machine()
    requests = company(machine)[1:]
    machine.prefill(*requests)
    spans = [(r, len(r.q) - 8, len(r.q)) for r in requests]
    alone = [machine.forward(ForwardMode.TARGET_VERIFY, [span], WHOLE)[0] for span in spans]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3]):
        together = machine.forward(ForwardMode.TARGET_VERIFY, [spans[i] for i in order], WHOLE)
        assert all(torch.equal(found, alone[i]) for found, i in zip(together, order, strict=True))


@pytest.mark.parametrize("part", ["q", "k", "v"])
@pytest.mark.parametrize("place", [0, 37, 79])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_every_token_that_sees_it_and_in_no_other(
    part: str, place: int, number: float
) -> None:
    machine = Machine(heads=3, key_heads=3)
    request = machine.request(80)
    (before,) = machine.prefill(request)
    getattr(request, part)[place, 1, 5] = number
    (found,) = machine.prefill(request)
    head = found[:, HEAD : 2 * HEAD]
    seen_by = torch.arange(80) == place if part == "q" else torch.arange(80) >= place
    if part == "v":
        assert not head[seen_by, 5].isfinite().any()
    elif part == "q" or number != number:
        assert head[seen_by].isnan().all()
    else:  # a key of infinite score, of either sign
        assert not torch.equal(head[seen_by], before[seen_by, HEAD : 2 * HEAD])
    assert torch.equal(head[~seen_by], before[~seen_by, HEAD : 2 * HEAD])
    others = torch.cat([found[:, :HEAD], found[:, 2 * HEAD :]], dim=1)
    assert torch.equal(others, torch.cat([before[:, :HEAD], before[:, 2 * HEAD :]], dim=1))


# --- trees ---


@dataclass
class Tree:
    """A request of `prefix` committed tokens, and behind them a tree of rows; parents: of each row, its anchor's is 0.

    request: the prefix and then the rows, in the order of the forest.
    """

    request: Request
    prefix: int
    parents: list[int]

    @property
    def paths(self) -> list[list[int]]:
        """Of each row, the rows from the anchor to itself."""
        paths = [[0]]
        for row, parent in enumerate(self.parents[1:], 1):
            paths.append([*paths[parent], row])
        return paths


def random_parents(rows: int, generator: torch.Generator, longest: int = 12) -> list[int]:
    """Of a tree of so many rows, whose paths are mostly long."""
    parents, depths = [0], [0]
    for row in range(1, rows):
        near = max(0, row - 3) if torch.rand((), generator=generator) < 0.7 else 0
        parent = int(torch.randint(near, row, (), generator=generator))
        parent = parent if depths[parent] < longest else 0
        parents.append(parent)
        depths.append(depths[parent] + 1)
    return parents


def forest_of(trees: Sequence[Tree]) -> Forest:
    parents, depths = [], []
    for tree in trees:
        first = len(parents)
        parents += [first + parent for parent in tree.parents]
        depths += [len(path) - 1 for path in tree.paths]
    rows = [len(tree.parents) for tree in trees]
    return Forest(rows, np.array(parents), np.array(depths), [], torch.zeros(len(parents), dtype=torch.int64))


def verified(machine: Machine, trees: Sequence[Tree]) -> list[torch.Tensor]:
    """One pass over the rows of all trees, whose prefixes are in the pool; [rows, heads * head_dim] of each."""

    def of_rows(name: str) -> torch.Tensor:
        return torch.cat([getattr(tree.request, name)[tree.prefix :] for tree in trees])

    forest = forest_of(trees)
    batch = SimpleNamespace(
        forward_mode=ForwardMode.TARGET_VERIFY,
        req_pool_indices=torch.tensor([tree.request.row for tree in trees]),
        seq_lens=torch.tensor([tree.prefix for tree in trees]),
        out_cache_loc=of_rows("slots"),
        spec_info=SimpleNamespace(forest=forest),
    )
    return list(machine.attend(batch, of_rows("q"), of_rows("k"), of_rows("v")).split(forest.rows))


def planted(machine: Machine, prefix: int, parents: list[int]) -> Tree:
    """A tree whose prefix is computed. Of its rows the table of slots knows the anchor alone."""
    request = machine.request(prefix + len(parents))
    if prefix:
        machine.forward(ForwardMode.EXTEND, [(request, 0, prefix)])
    table = machine.table.req_to_token[request.row]
    table[prefix + 1 :] = torch.randint(SLOTS, (WIDTH - prefix - 1,), generator=machine.generator).int()
    return Tree(request, prefix, parents)


def decoded(machine: Machine, tree: Tree) -> list[torch.Tensor]:
    """Each row of the tree, from decoding its path token by token as a request of its own; [1, heads * head_dim]."""
    machine = Machine(machine.heads, machine.key_heads, machine.head_dim)  # with room for all paths
    parents = set(tree.parents[1:])
    leaves = [path for row, path in enumerate(tree.paths) if row not in parents]
    requests = []
    for path in leaves:
        order = [*range(tree.prefix), *(tree.prefix + row for row in path)]
        like = tree.request
        copy = machine.request(len(order), Request(like.q[order], like.k[order], like.v[order], 0, like.slots))
        if tree.prefix:
            machine.pool.set_kv_buffer(None, copy.slots[: tree.prefix], copy.k[: tree.prefix], copy.v[: tree.prefix])
        requests.append(copy)
    found: dict[int, torch.Tensor] = {}
    for depth in range(max(map(len, leaves))):
        deep = [(path, request) for path, request in zip(leaves, requests, strict=True) if len(path) > depth]
        at = tree.prefix + depth
        results = machine.forward(ForwardMode.DECODE, [(request, at, at + 1) for _, request in deep])
        found |= {path[depth]: result for (path, _), result in zip(deep, results, strict=True)}
    return [found[row] for row in range(len(tree.parents))]


PREFIXES = [0, 1, 2, 3, 4, 5, 51, 55, 58, 60, 61, 62, 63, 64, 65, 66, 68, 100, 119, 125, 127, 128, 129, 131, 190, 200]


@heads
@pytest.mark.parametrize("head_dim", [40, 64, 80])
def test_each_row_of_a_tree_has_the_bits_of_decoding_its_path(query: int, key: int, head_dim: int) -> None:
    """Around the ends of a step's keys and of four keys; in trees of more rows than are computed at once."""
    machine = Machine(query, key, head_dim)
    assert (kernels.KEYS_AT_ONCE, kernels.QUERIES_AT_ONCE) == (64, 4), "what the prefixes and sizes here are for"
    for prefix in PREFIXES:
        rows = (3, 4, 5, 9, 24)[prefix % 5]
        tree = planted(machine, prefix, random_parents(rows, machine.generator))
        (found,) = verified(machine, [tree])
        for row, expected in enumerate(decoded(machine, tree)):
            assert torch.equal(found[row : row + 1], expected), f"prefix {prefix}, row {row}: {tree.paths[row]}"


@heads
def test_trees_of_several_requests_do_not_touch_each_other(query: int, key: int) -> None:
    machine = Machine(query, key)
    sizes = [(0, 1), (63, 20), (200, 1), (64, 33), (10, 7), (126, 16)]
    trees = [planted(machine, prefix, random_parents(rows, machine.generator)) for prefix, rows in sizes]
    expected = [torch.cat(decoded(machine, tree)) for tree in trees]
    for order in ([0, 1, 2, 3, 4, 5], [5, 3, 1], [2, 0], [4]):
        for found, number in zip(verified(machine, [trees[i] for i in order]), order, strict=True):
            assert torch.equal(found, expected[number])


@heads
@pytest.mark.parametrize("prefix", [0, 3, 50, 64, 120])
def test_a_tree_of_one_path_is_a_chain(query: int, key: int, prefix: int) -> None:
    """Also a path that is longer than the keys of a step."""
    machine = Machine(query, key)
    for rows in (1, 8, 17, 140):
        tree = planted(machine, prefix, [0, *range(rows - 1)])
        (found,) = verified(machine, [tree])
        chain = machine.request(prefix + rows, like=tree.request)
        if prefix:
            machine.forward(ForwardMode.EXTEND, [(chain, 0, prefix)])
        assert torch.equal(found, machine.forward(ForwardMode.TARGET_VERIFY, [(chain, prefix, prefix + rows)])[0])
        assert_exact(found, tree.request, prefix, prefix + rows)


def test_a_row_sees_none_of_its_siblings() -> None:
    machine = Machine()
    tree = planted(machine, 30, [0, 0, 1, 0, 3, 2])  # paths 0-1-2-5 and 0-3-4
    (before,) = verified(machine, [tree])
    tree.request.k[30 + 3] = 40.0
    tree.request.v[30 + 3] = float("nan")
    (after,) = verified(machine, [tree])
    assert torch.equal(after[[0, 1, 2, 5]], before[[0, 1, 2, 5]])
    assert after[[3, 4]].isnan().all()


def test_a_forest_of_other_requests_than_the_pass_is_refused() -> None:
    machine = Machine()
    trees = [planted(machine, 3, [0, 0]), planted(machine, 5, [0])]
    forest = forest_of(trees[:1])
    batch = SimpleNamespace(
        forward_mode=ForwardMode.TARGET_VERIFY,
        req_pool_indices=torch.tensor([tree.request.row for tree in trees]),
        seq_lens=torch.tensor([3, 5]),
        out_cache_loc=trees[0].request.slots[3:],
        spec_info=SimpleNamespace(forest=forest),
    )
    with pytest.raises(ValueError, match="zip"):
        machine.backend.init_forward_metadata(batch)


# --- what it does not do ---


@pytest.mark.parametrize(
    "changes",
    [{"is_cross_attention": True}, {"logit_cap": 30.0}, {"sliding_window_size": 511}, {"sinks": torch.zeros(9)}],
    ids=lambda changes: next(iter(changes)),
)
def test_kinds_of_attention_it_lacks_are_refused(changes: dict[str, Any]) -> None:
    machine = Machine()
    request = machine.request(4)
    layer = SimpleNamespace(
        is_cross_attention=False, logit_cap=0.0, sliding_window_size=-1, layer_id=5, attn_type=CAUSAL
    )  # fmt: skip
    sinks = {"sinks": changes.pop("sinks")} if "sinks" in changes else {}
    vars(layer).update(changes)
    with pytest.raises(NotImplementedError, match="layer 5"):
        machine.backend.forward_extend(request.q, request.k, request.v, layer, SimpleNamespace(), **sinks)


def test_an_idle_pass_plans_nothing() -> None:
    machine = Machine()
    machine.backend.init_forward_metadata(SimpleNamespace(forward_mode=ForwardMode.IDLE, spec_info=None))
    assert len(machine.backend.tasks.table) == 0


def test_an_unknown_kind_of_pass_is_refused() -> None:
    batch = SimpleNamespace(
        forward_mode=ForwardMode.PREBUILT,
        req_pool_indices=torch.tensor([1]),
        seq_lens=torch.tensor([3]),
        spec_info=None,
    )
    with pytest.raises(NotImplementedError, match="PREBUILT"):
        Machine().backend.init_forward_metadata(batch)
