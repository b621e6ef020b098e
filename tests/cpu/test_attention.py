"""The CPU attention backend against dense float64 attention, and bit for bit against itself in other batches.

The backend runs over fake runner and pool objects; the masks of the reference are written out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_auf.cpu import kernels
from sglang_auf.cpu.attention import CpuAttentionBackend

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
        q, k, v = (
            torch.cat([getattr(request, name)[start:end] for request, start, end in parts]) for name in ("q", "k", "v")
        )
        self.backend.init_forward_metadata(batch)
        call = self.backend.forward_decode if mode.is_decode() else self.backend.forward_extend
        out = call(q.flatten(1), k, v, layer, batch)
        assert out.shape == (sum(rows), self.heads * self.head_dim)
        return list(out.split(rows))

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
@pytest.mark.parametrize("head_dim", [64, 80, 128])
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
    machine.backend.init_forward_metadata(SimpleNamespace(forward_mode=ForwardMode.IDLE))
    assert len(machine.backend.tasks.table) == 0


def test_an_unknown_kind_of_pass_is_refused() -> None:
    batch = SimpleNamespace(
        forward_mode=ForwardMode.PREBUILT, req_pool_indices=torch.tensor([1]), seq_lens=torch.tensor([3])
    )
    with pytest.raises(NotImplementedError, match="PREBUILT"):
        Machine().backend.init_forward_metadata(batch)
