"""The kernels' rules: numbers, memory, threads, and what happens without the thread pool or the cache.

Their results are tested through the operators that call them: test_elementwise.py, test_attention.py and
test_memory.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_auf.cpu import kernels
from sglang_auf.cpu.kernels import (
    PRODUCTS,
    AttentionTasks,
    add,
    attend,
    copy,
    largest,
    pack,
    product,
    product_methods,
    rms_norm,
    rotate,
    silu_and_mul,
    store,
    widen,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def added(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x + y, rounded to bf16 by a kernel."""
    return rms_norm(x, torch.ones(x.shape[1], dtype=torch.bfloat16), 1e-5, y)[1]


# --- numbers ---


def test_every_bf16_is_read_and_written_as_it_is() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(1, -1)
    numbers = bits.view(torch.bfloat16)
    found = added(numbers, torch.full_like(numbers, -0.0))
    nan = numbers.isnan()
    assert torch.equal(found.isnan(), nan)
    assert torch.equal(found.view(torch.int16)[~nan], bits[~nan])


@given(st.lists(st.tuples(st.floats(width=32), st.floats(width=32)), min_size=1, max_size=40))
def test_sums_are_rounded_as_torch_rounds_them(pairs: list[tuple[float, float]]) -> None:
    x, y = torch.tensor(pairs, dtype=torch.float32).bfloat16().T.unsqueeze(1).contiguous()
    torch.testing.assert_close(added(x, y), x + y, rtol=0, atol=0, equal_nan=True)


def test_the_gate_is_exact_wherever_a_bf16_can_tell() -> None:
    """silu(x) * 1 = x / (1 + e^-x), of every bf16 of either sign up to 1e30."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.bfloat16)
    x = x[x.isfinite() & (x.abs() < 1e30)].view(1, -1)
    found = silu_and_mul(torch.cat([x, torch.ones_like(x)], dim=1)).double()
    exact = torch.nn.functional.silu(x.double())
    # Below -88 the gate is e^-88 instead of less, too little to change a bf16 sum of features. 2e-40: subnormals.
    assert ((found - exact).abs() <= exact.abs() * (2.0**-8 + 1e-6) + x.double().abs() * 2e-38 + 2e-40).all()


# --- memory ---


def test_rows_need_not_lie_next_to_each_other() -> None:
    wide = normal(5, 40)
    x, y = wide[:, 3:19], wide[:, 20:36]
    weight = normal(16, seed=1)
    for ours, theirs in zip(
        rms_norm(x, weight, 1e-5, y), rms_norm(x.contiguous(), weight, 1e-5, y.contiguous()), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert torch.equal(silu_and_mul(x), silu_and_mul(x.contiguous()))


def tree(own: list[Any], kind: torch.dtype = torch.int32) -> AttentionTasks:
    """A plan of two queries behind three keys, with own keys."""
    return AttentionTasks.of([(0, 0, 2, 3)], torch.zeros(1, 4, dtype=torch.int32), torch.tensor(own, dtype=kind))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: rms_norm(normal(4, 8).float(), normal(8), 1e-5),
        lambda: rms_norm(normal(8, 4).T, normal(8), 1e-5),
        lambda: rms_norm(normal(4, 8), normal(4), 1e-5),
        lambda: rms_norm(normal(4, 8), normal(8), 1e-5, normal(3, 8)),
        lambda: silu_and_mul(normal(8, 4).T),
        lambda: rotate(normal(2, 8), normal(2, 8), 8, torch.zeros(9, 8).bfloat16(), torch.tensor([1, 2])),
        lambda: rotate(normal(2, 8), normal(2, 8), 8, torch.zeros(9, 8), torch.tensor([1])),
        lambda: rotate(normal(2, 8), normal(2, 8), 8, torch.zeros(9, 8), torch.tensor([1, 2], dtype=torch.int32)),
        lambda: store(normal(2, 8), normal(2, 8), torch.zeros(9, 2, 2, 8).bfloat16(), torch.tensor([1, 2])),
        lambda: store(normal(2, 8), normal(2, 8), torch.zeros(9, 2, 1, 8).bfloat16(), torch.tensor([1])),
        lambda: attend(
            normal(2, 8),
            torch.zeros(9, 2, 3, 4).bfloat16(),
            AttentionTasks.of([(0, 0, 2, 2)], torch.zeros(1, 4, dtype=torch.int32)),
            1.0,
            False,
        ),
        lambda: AttentionTasks.of([(0, 0, 1, 1)], torch.zeros(1, 4, dtype=torch.int64)),
        lambda: attend(normal(2, 8), torch.zeros(9, 2, 1, 8).bfloat16(), tree([[0, 0], [1, 3]]), 1.0, True),
        lambda: tree([[0, 0]]),  # two queries
        lambda: tree([[0, 0], [1, 3], [0, 0]]),
        lambda: tree([[0, 0], [2, 3]]),  # more own keys than the table has
        lambda: tree([[0, 0], [-1, 3]]),
        lambda: tree([[], []]),
        lambda: tree([0, 1]),
        lambda: tree([[0, 0], [1, 3]], torch.int64),
        lambda: largest(normal(2, 8).float(), 2),
        lambda: largest(normal(8, 2).T, 2),
        lambda: largest(normal(2, 8), 0),
        lambda: largest(normal(2, 8), 9),
        lambda: largest(normal(2, 0), 1),
    ],
)
def test_memory_of_another_form_is_not_read(wrong) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="not "):
        wrong()


@pytest.mark.parametrize("position", [-1, 9, 2**40])
def test_a_position_outside_the_table_is_an_error(position: int) -> None:
    q, k = normal(2, 8), normal(2, 8)
    with pytest.raises(IndexError, match="rotate"):
        rotate(q, k, 8, torch.zeros(9, 8), torch.tensor([1, position]))


@pytest.mark.parametrize("slot", [-1, 4])
def test_a_slot_outside_the_pool_is_an_error_and_nothing_beside_the_pool_is_written(slot: int) -> None:
    around = torch.full((6, 2, 1, 8), 7.0).bfloat16()
    pool = around[1:5]
    with pytest.raises(IndexError, match="store"):
        store(normal(2, 8), normal(2, 8), pool, torch.tensor([1, slot]))
    assert (around[[0, 5]] == 7).all()


@pytest.mark.parametrize("slot", [-1, 9])
def test_a_key_outside_the_pool_is_an_error(slot: int) -> None:
    tasks = AttentionTasks.of([(0, 0, 2, 3)], torch.tensor([[1, slot, 2, 3]], dtype=torch.int32))
    with pytest.raises(IndexError, match="attend"):
        attend(normal(2, 8), torch.zeros(9, 2, 1, 8).bfloat16(), tasks, 1.0, False)


@pytest.mark.parametrize("slot", [-1, 9])
def test_an_own_key_outside_the_pool_is_an_error(slot: int) -> None:
    with pytest.raises(IndexError, match="attend"):
        attend(normal(2, 8), torch.zeros(9, 2, 1, 8).bfloat16(), tree([[0, 0], [1, slot]]), 1.0, False)


def test_what_lies_behind_a_querys_own_keys_is_not_read() -> None:
    pool = normal(9, 2, 1, 8)
    found = [attend(normal(2, 8), pool, tree([[0, rest], [1, 3]]), 1.0, False) for rest in (5, 10**9)]
    assert torch.equal(*found)


@pytest.mark.parametrize("span", [(0, 0, 2, 0), (0, 0, 2, 5), (2, 0, 2, 3), (0, 1, 2, 3)])
def test_a_tree_outside_the_table_of_slots_is_refused(span: tuple[int, int, int, int]) -> None:
    own = torch.zeros(2, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"table \(2, 4\)"):
        AttentionTasks.of([span], torch.zeros(2, 4, dtype=torch.int32), own)


@pytest.mark.parametrize("span", [(2, 0, 1, 1), (-1, 0, 1, 1), (0, 0, 1, 5), (0, 0, 3, 2), (0, 1, 1, 1)])
def test_a_request_outside_the_table_of_slots_is_refused(span: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"table \(2, 4\)"):
        AttentionTasks.of([span], torch.zeros(2, 4, dtype=torch.int32))


@pytest.mark.parametrize("rows", [1, 3])
def test_other_queries_than_those_planned_are_refused(rows: int) -> None:
    tasks = AttentionTasks.of([(0, 0, 2, 3)], torch.zeros(1, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match="planned"):
        attend(normal(rows, 8), torch.zeros(9, 2, 1, 8).bfloat16(), tasks, 1.0, False)


def test_no_rows_are_no_work() -> None:
    assert rms_norm(normal(0, 8), normal(8), 1e-5)[0].shape == (0, 8)
    assert silu_and_mul(normal(0, 8)).shape == (0, 4)
    assert [part.shape for part in largest(normal(0, 8), 3)] == [(0, 3), (0, 3)]
    nothing = AttentionTasks.of([], torch.zeros(1, 4, dtype=torch.int32))
    assert attend(normal(0, 8), torch.zeros(9, 2, 1, 8).bfloat16(), nothing, 1.0, False).shape == (0, 8)


def test_store_writes_the_slots_it_is_given_and_no_others() -> None:
    pool = torch.full((10, 2, 3, 4), 7.0).bfloat16()
    k, v = normal(3, 12), normal(3, 12, seed=1)
    store(k, v, pool, torch.tensor([8, 0, 5]))
    assert torch.equal(pool[[8, 0, 5], 0].flatten(1), k)
    assert torch.equal(pool[[8, 0, 5], 1].flatten(1), v)
    assert (pool[[1, 2, 3, 4, 6, 7, 9]] == 7).all()


def test_scratch_memory_grows_and_is_kept() -> None:
    scratch = kernels._Scratch()
    first = scratch.address(100)
    assert scratch.address(90) == first
    scratch.address(1000)
    kept = scratch.memory.size
    scratch.address(1000)
    assert kept >= 1000 and scratch.memory.size == kept


# --- products ---


def in_chains(x: torch.Tensor, weight: torch.Tensor, method: str) -> torch.Tensor:
    """x W^T as the method documents its order, one float32 multiply-add at a time.

    bf16 products are exact in float64, and so are their sums with a float32 of about their size.
    """

    def added(sums: torch.Tensor, place: int) -> torch.Tensor:
        return (sums.double() + x[:, place, None].double() * weight[:, place].double()).float()

    zero = torch.zeros(x.shape[0], weight.shape[0])
    sums = zero
    if method != "amx":
        for pair in range(0, x.shape[1], 2):
            sums = added(added(sums, pair + 1), pair)
        return sums.bfloat16()
    for tile in range(0, x.shape[1], 32):
        even = odd = zero
        for pair in range(tile, min(tile + 32, x.shape[1]), 2):
            even, odd = added(even, pair), added(odd, pair + 1)
        sums = sums + (even + odd)
    return sums.bfloat16()


def cancelling(outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [5, inputs] and W whose exact products are 0: nothing but the rounding of one order of summation is left."""
    generator = torch.Generator().manual_seed(inputs)
    places = torch.randperm(inputs, generator=generator)
    half = inputs // 2
    values, row = torch.randn(5, half, generator=generator), torch.randn(outputs, half, generator=generator)
    x, weight = torch.zeros(5, inputs), torch.zeros(outputs, inputs)
    x[:, places[:half]], x[:, places[half : 2 * half]] = values, -values
    weight[:, places[:half]], weight[:, places[half : 2 * half]] = row, row
    return x.bfloat16(), weight.bfloat16()


@pytest.mark.parametrize("shape", [(32, 32), (64, 576), (100, 80), (33, 1536)], ids=str)
@pytest.mark.parametrize("method", PRODUCTS)
def test_a_product_is_added_in_its_methods_order(method: str, shape: tuple[int, int]) -> None:
    if method not in product_methods():
        pytest.skip(f"no {method} on this machine")
    x, weight = cancelling(*shape)
    found = product(x, pack(weight), shape[0], method)
    assert torch.equal(found, in_chains(x, weight, method))
    assert found.float().abs().max() > 0, "there was nothing to round"


@pytest.mark.parametrize("method", PRODUCTS)
def test_a_row_has_the_same_product_in_any_company_and_place(method: str) -> None:
    if method not in product_methods():
        pytest.skip(f"no {method} on this machine")
    x, weight = normal(100, 160), pack(normal(96, 160, seed=1))
    alone = torch.cat([product(x[i : i + 1], weight, 96, method) for i in range(100)])
    for rows in range(101):
        order = (torch.arange(rows) * 7 + rows) % 100
        assert torch.equal(product(x[order], weight, 96, method), alone[order]), rows


@pytest.mark.parametrize("rows", [1, 3, 17])
@pytest.mark.parametrize("method", PRODUCTS)
def test_a_product_keeps_what_is_not_finite(method: str, rows: int) -> None:
    if method not in product_methods():
        pytest.skip(f"no {method} on this machine")
    x, weight = normal(rows, 64), normal(32, 64, seed=1)
    x[-1, 3], weight[5, 9] = float("inf"), float("nan")
    found = product(x, pack(weight), 32, method)
    assert found[:, 5].isnan().all()
    others = torch.arange(32) != 5
    assert torch.equal(found[-1, others], weight[others, 3].float().sign().mul(float("inf")).bfloat16())
    assert found[:-1, others].isfinite().all()


def test_a_packed_weight_of_another_form_is_refused() -> None:
    x, weight = normal(2, 64), pack(normal(64, 64, seed=1))
    for wrong_x, packed, outputs in (
        (normal(2, 128), weight, 64),
        (x, weight, 65),
        (x, weight, 0),
        (x, weight.float(), 64),
        (x, weight.transpose(1, 2), 64),
        (x.float(), weight, 64),
        (normal(64, 2).T, weight, 64),
    ):
        with pytest.raises(ValueError, match="not "):
            product(wrong_x, packed, outputs)
    for wrong in (normal(4, 4, 4), normal(4, 4).float()):
        with pytest.raises(ValueError, match="not a bf16 matrix"):
            pack(wrong)


# --- copies ---


@pytest.mark.parametrize("rows", [1, 7, 300])
def test_a_bias_is_added_with_torchs_rounding(rows: int) -> None:
    x, bias = normal(rows, 2 * 48, seed=1)[:, 48:], normal(1, 48, seed=2)[0]
    assert torch.equal(add(x, bias), x + bias)
    for wrong in (bias.float(), bias[:47], normal(1, 96, seed=3)[0, ::2]):
        with pytest.raises(ValueError, match="a bf16 bias"):
            add(x, wrong)


def test_rows_are_copied_and_widened() -> None:
    x = normal(9, 40)[:, 7:]
    assert torch.equal(copied(x), x)
    assert torch.equal(copied(x, torch.tensor([3, 3, 0])), x[[3, 3, 0]])
    assert torch.equal(widen(x), x.float())
    for index in (torch.tensor([9]), torch.tensor([-1])):
        with pytest.raises(IndexError, match="copy"):
            copied(x, index)
    for out, index in ((normal(8, 33), None), (normal(9, 32), None), (normal(2, 33), torch.tensor([1]))):
        with pytest.raises(ValueError, match="not "):
            copy(x, out, index)


# --- the likeliest tokens ---


def expected_largest(x: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """By torch; a stable sort keeps the first of equal ones in front."""
    places = x.sort(dim=-1, descending=True, stable=True).indices[:, :count]
    return torch.log_softmax(x.double(), dim=-1).gather(1, places), places


@pytest.mark.parametrize("columns", [1, 2, 7, 63, 64, 65, 128, 1000, 49152])
def test_the_largest_of_a_row_with_their_log_probabilities(columns: int) -> None:
    for scale in (0.1, 4.0, 30.0):
        x = (normal(6, columns, seed=columns) * scale).bfloat16()
        for count in {1, min(2, columns), min(8, columns), min(columns, 200)}:
            chances, places = largest(x, count)
            expected, at = expected_largest(x, count)
            assert (chances.dtype, places.dtype) == (torch.float32, torch.int64)
            assert torch.equal(places, at)
            torch.testing.assert_close(chances.double(), expected, rtol=1e-5, atol=2e-5)


@given(st.lists(st.sampled_from([-2.0, -0.0, 0.0, 0.5, 3.0, 3.0]), min_size=1, max_size=200), st.data())
def test_of_equal_logits_the_first_columns_are_taken(row: list[float], data: st.DataObject) -> None:
    x = torch.tensor([row]).bfloat16()
    count = data.draw(st.integers(1, len(row)))
    assert torch.equal(largest(x, count)[1], expected_largest(x, count)[1])


def test_all_columns_are_a_distribution() -> None:
    chances, places = largest(normal(5, 300), 300)
    torch.testing.assert_close(chances.exp().sum(dim=1), torch.ones(5))
    assert (places.sort(dim=1).values == torch.arange(300)).all()


def test_a_rows_largest_do_not_depend_on_other_rows() -> None:
    wide = normal(40, 700)
    x = wide[:, 11:660]
    chances, places = largest(x, 8)
    for row in range(0, 40, 3):
        alone = largest(x[row : row + 1].contiguous(), 8)
        assert torch.equal(alone[0][0], chances[row]) and torch.equal(alone[1][0], places[row])


def test_columns_at_minus_infinity_come_last() -> None:
    x = torch.full((2, 200), -torch.inf).bfloat16()
    x[0, [3, 150, 199]] = torch.tensor([1.0, 2.0, 0.0]).bfloat16()
    chances, places = largest(x, 5)
    assert places[0, :3].tolist() == [150, 3, 199]
    torch.testing.assert_close(chances[0, :3].exp().sum(), torch.tensor(1.0))
    assert (chances[0, 3:].exp() == 0).all()
    assert chances[1].isnan().all(), "no token of that row has a probability"
    assert ((places >= 0) & (places < 200)).all()


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, float("nan"), float("inf"), -float("inf")]), min_size=1, max_size=150))
def test_what_is_not_finite_leads_to_no_column_that_there_is_not(row: list[float]) -> None:
    x = torch.cat([torch.tensor([row]).bfloat16(), normal(1, len(row))])
    for count in {1, min(3, len(row)), len(row)}:
        chances, places = largest(x, count)
        assert ((places >= 0) & (places < len(row))).all()
        assert torch.equal(places[1], expected_largest(x[1:], count)[1][0]), "the other row is not harmed"
        if any(value != value or value == float("inf") for value in row):
            assert not (chances[0] > 0).any()


# --- threads ---


def copied(table: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor:
    out = torch.zeros(len(table) if index is None else len(index), table.shape[1], dtype=torch.bfloat16)
    copy(table, out, index)
    return out


def results() -> list[torch.Tensor]:
    """All kernels, each at a size for which several threads pay off."""
    x, weight = normal(300, 576), normal(576, seed=1)
    pool, slots = normal(700, 2, 3, 64), torch.randperm(700, generator=torch.Generator().manual_seed(3)).int()
    tasks = AttentionTasks.of([(0, 0, 250, 600), (0, 250, 1, 31), (0, 251, 49, 333)], slots.view(1, -1))
    places = torch.randint(700, (300, 89), generator=torch.Generator().manual_seed(5))
    own = torch.cat([torch.arange(300).view(-1, 1) % 90, places], dim=1).int()
    trees = AttentionTasks.of([(0, 0, 250, 500), (0, 250, 1, 31), (0, 251, 49, 333)], slots.view(1, -1), own)
    table = torch.randn(900, 64, generator=torch.Generator().manual_seed(4))
    stored = torch.zeros_like(pool)
    store(x[:, :192], x[:, 192:384], stored, slots[:300].long())
    return [
        stored,
        *rms_norm(x, weight, 1e-5, normal(300, 576, seed=2)),
        silu_and_mul(x),
        *rotate(x, normal(300, 192), 64, table, torch.arange(300) * 3 % 900),
        attend(x, pool, tasks, 0.125, False),
        attend(x, pool, tasks, 0.125, True),
        attend(x, pool, trees, 0.125, False),
        *largest(x, 8),
        *(product(x, pack(normal(96, 576, seed=6)), 96, method) for method in product_methods()),
        widen(x),
        add(x, weight),
        copied(x, torch.arange(299, -1, -1)),
    ]


def test_the_number_of_threads_changes_no_bit(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, calls = kernels._parallel(), []
    monkeypatch.setattr(kernels, "_parallel", lambda: lambda *call: (calls.append(call[2]), pool(*call)))
    torch.set_num_threads(1)
    alone = results()
    assert calls == []
    for count in (2, 3, 5):
        torch.set_num_threads(count)
        assert all(torch.equal(a, b) for a, b in zip(results(), alone, strict=True))
        # "fma" widens its rows first.
        assert calls == [count] * (12 + len(product_methods())), "every kernel is shared out"
        calls.clear()
    monkeypatch.setattr(kernels, "_parallel", lambda: None)  # a torch with another pool
    assert all(torch.equal(a, b) for a, b in zip(results(), alone, strict=True))


def test_the_threads_are_those_of_torchs_pool() -> None:
    """A second OpenMP library in the process would keep more threads spinning."""
    assert kernels._parallel() is not None
    results()
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    assert len(loaded) == 1


# --- compilation ---

# Nothing of SGLang is needed, and importing it takes long.
PROGRAM = """
import sys, types, torch
import numba.core.caching as caching
sys.modules["sglang"] = types.ModuleType("sglang")
{}
from sglang_auf.cpu.kernels import silu_and_mul
print(silu_and_mul(torch.ones(1, 4).bfloat16()).tolist())
"""


def compiled(cache: Path, before: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(before)],
        env=os.environ | {"NUMBA_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )


def right(ran: subprocess.CompletedProcess[str]) -> bool:
    return ran.stdout.strip() == "[[0.73046875, 0.73046875]]"


NO_PLACE = "caching.CacheImpl._locator_classes = []"
NO_ROOM = """
def full(*args, **options): raise OSError(28, "No space left on device")
caching.IndexDataCacheFile.save = full
"""


@pytest.mark.e2e
@pytest.mark.parametrize(("before", "cached"), [("", True), (NO_PLACE, False), (NO_ROOM, False)])
def test_kernels_compile_where_nothing_can_be_cached(before: str, cached: bool, tmp_path: Path) -> None:
    ran = compiled(tmp_path, before)
    assert right(ran), ran.stderr
    assert any(tmp_path.rglob("*.nbc")) is cached
    assert ("compiled anew" in ran.stderr) is not cached


SUMS = """
from sglang_auf.cpu.kernels import AttentionTasks, attend, prepare
import torch
prepare()
torch.manual_seed(5)
for _ in range(40):
    keys = int(torch.randint(60, 400, (1,)))
    pool, slots = (torch.randn(700, 2, 3, 64) * 2).bfloat16(), torch.randperm(700).int().view(1, -1)
    q = (torch.randn(keys, 576) * 3).bfloat16()
    print(attend(q, pool, AttentionTasks.of([(0, 0, keys, keys)], slots), 0.125, False).float().sum(1).tolist())
"""


@pytest.mark.e2e
def test_a_process_that_compiles_and_one_that_reads_the_cache_give_the_same_bits(tmp_path: Path) -> None:
    """Otherwise the first server on a machine would give other answers than the second."""
    first, second = compiled(tmp_path, SUMS), compiled(tmp_path, SUMS)
    assert len(first.stdout) > 100_000, first.stderr
    assert first.stdout == second.stdout


@pytest.mark.e2e
@pytest.mark.parametrize("kind", ["nbi", "nbc"])
def test_a_cache_that_a_crash_has_torn_is_not_used(kind: str, tmp_path: Path) -> None:
    assert right(compiled(tmp_path))
    for file in tmp_path.rglob(f"*.{kind}"):
        file.write_bytes(b"")
    ran = compiled(tmp_path)
    assert right(ran), ran.stderr
    assert "compiled anew" in ran.stderr
