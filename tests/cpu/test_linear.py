"""Linear layers whose rows do not depend on each other, bit for bit, at SmolLM2's shapes with this machine's oneDNN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_auf import env
from sglang_auf.cpu import linear
from sglang_auf.cpu.linear import RowInvariantLinear, RowSet, agreeing_row_counts, choose_row_set

# SmolLM2-135M: q+k+v, o, gate+up, down, and an eighth of the head.
SHAPES = [(960, 576), (576, 576), (3072, 576), (576, 1536), (6144, 576)]
COUNTS = (1, 2, 3, 7, 33, 64, 100, 300)

pytestmark = pytest.mark.skipif(not linear.can_prepack(), reason="no bf16 products of oneDNN on this machine")


def weight_of(out_features: int, in_features: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(out_features, in_features, generator=generator) * 0.05).bfloat16()


def rows_of(count: int, in_features: int, seed: int = 1) -> torch.Tensor:
    """Rows of very different size, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    scale = 2.0 ** torch.randint(-3, 5, (count, 1), generator=generator)
    return (torch.randn(count, in_features, generator=generator) * scale).bfloat16()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_has_the_same_bits_in_any_company_and_place(shape: tuple[int, int]) -> None:
    layer, x = RowInvariantLinear(weight_of(*shape)), rows_of(300, shape[1])
    alone = torch.cat([layer(x[i : i + 1]) for i in range(0, 300, 10)])
    for count in COUNTS:
        for shift in {0, 1, count // 2}:
            order = (torch.arange(300) + shift)[:count] % 300
            result = layer(x[order])
            assert result.shape == (count, shape[0])
            sampled = order % 10 == 0
            assert torch.equal(result[sampled], alone[order[sampled] // 10]), (count, shift)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [1, 7, 300])
def test_results_are_the_exact_product_rounded_once(shape: tuple[int, int], count: int) -> None:
    weight, x = weight_of(*shape), rows_of(count, shape[1])
    exact = x.double() @ weight.double().T
    terms = x.double().abs() @ weight.double().abs().T
    error = (RowInvariantLinear(weight)(x).double() - exact).abs()
    # Half a step of bf16, which has 8 significant bits, and the rounding of a float32 sum with that many terms.
    assert (error <= exact.abs() * 2.0**-8 + terms * shape[1] * 2.0**-24).all()


def test_a_bias_is_added_to_every_row() -> None:
    weight, x = weight_of(576, 576), rows_of(9, 576)
    bias = rows_of(1, 576, seed=4)[0]
    layer = RowInvariantLinear(weight)
    assert torch.equal(layer(x, bias), layer(x) + bias)
    assert torch.equal(layer(x, bias)[3], layer(x[3:4], bias)[0])


def test_no_rows_give_no_rows() -> None:
    layer = RowInvariantLinear(weight_of(960, 576))
    empty = layer(torch.empty(0, 576, dtype=torch.bfloat16))
    assert (empty.shape, empty.dtype) == ((0, 960), torch.bfloat16)


def test_inputs_may_be_views_and_have_more_dimensions() -> None:
    layer, wide = RowInvariantLinear(weight_of(576, 576)), rows_of(12, 1152)
    view = wide[:, 576:]
    assert not view.is_contiguous()
    expected = layer(view.contiguous())
    assert torch.equal(layer(view), expected)
    assert torch.equal(layer.apply(torch.nn.Identity(), view.reshape(3, 4, 576)), expected.view(3, 4, 576))
    assert torch.equal(layer.apply(torch.nn.Identity(), view), expected)


def test_a_view_of_as_many_rows_as_a_product_takes() -> None:
    layer = RowInvariantLinear(weight_of(576, 576))
    assert layer.rows is not None
    for count in layer.rows.counts:
        view = rows_of(count, 1152)[:, 576:]
        assert torch.equal(layer(view), layer(view.contiguous())), count


def test_the_padding_never_reaches_a_result() -> None:
    layer, x = RowInvariantLinear(weight_of(576, 576)), rows_of(3, 576)
    expected = layer(x)
    assert layer.rows is not None
    layer.rows = RowSet((layer.rows.largest,))  # pads 3 rows to many
    padding = linear._padding(layer.rows.largest, 576)
    padding.fill_(float("nan"))  # as an earlier product may have left it
    assert torch.equal(layer(x), expected)
    padding.zero_()


def test_padding_made_in_inference_mode_can_be_written_outside_of_it() -> None:
    linear._padding.cache_clear()
    layer, x = RowInvariantLinear(weight_of(576, 576)), rows_of(3, 576)
    with torch.inference_mode():
        inside = layer(x)
    assert torch.equal(layer(x), inside)


def test_rows_may_be_left_to_themselves_to_see_what_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.ROW_INVARIANT.name, "0")
    weight, x = weight_of(576, 576), rows_of(5, 576)
    layer = RowInvariantLinear(weight)
    assert layer.rows is None
    assert torch.equal(layer(x), linear._product(x, weight, layer.packed))
    monkeypatch.setenv(env.ROW_INVARIANT.name, "1")
    assert RowInvariantLinear(weight).rows is not None


def test_the_weight_stays_readable_and_embeds() -> None:
    weight = weight_of(100, 64)
    layer = RowInvariantLinear(weight)
    assert layer.weight is weight
    tokens = torch.tensor([[3, 99], [0, 3]])
    assert torch.equal(layer.embedding(torch.nn.Identity(), tokens), weight[tokens])


# --- row counts ---


@given(st.sets(st.sampled_from(linear.ROW_COUNTS), min_size=1), st.integers(1, 700))
def test_rows_are_padded_to_the_next_count_and_split_at_the_largest(counts: set[int], rows: int) -> None:
    row_set = RowSet(tuple(sorted(counts)))
    if rows <= row_set.largest:
        assert row_set.padded(rows) == min(count for count in counts if count >= rows)
    else:
        with pytest.raises(ValueError, match=str(rows)):
            row_set.padded(rows)
    pieces, left = [], rows
    while left > 0:
        pieces.append(row_set.largest if left >= row_set.largest else row_set.padded(left))
        left -= row_set.largest
    assert row_set.cost(rows) == pytest.approx(sum(1 + piece / linear.ROWS_PER_WEIGHT_READ for piece in pieces))


# --- the probe ---

Product = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]


@pytest.fixture
def probing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Product], tuple[tuple[int, ...], ...]]]:
    """The sets of row counts that the probe finds with a given product, at a shape that no other test uses."""

    def probe(product: Product) -> tuple[tuple[int, ...], ...]:
        monkeypatch.setattr(linear, "_product", product)
        agreeing_row_counts.cache_clear()
        return tuple(row_set.counts for row_set in agreeing_row_counts(24, 80))

    yield probe
    agreeing_row_counts.cache_clear()
    choose_row_set.cache_clear()


def summed(x: torch.Tensor, weight: torch.Tensor, parts: int) -> torch.Tensor:
    """x W^T term by term in float32: `parts` partial sums over equal shares of the columns, then their sum."""
    partial = torch.zeros(parts, x.shape[0], weight.shape[0])
    share = -(-x.shape[1] // parts)
    for column in range(x.shape[1]):
        partial[column // share] += x[:, column, None].float() * weight[:, column].float()
    return partial.sum(dim=0).bfloat16()


def test_counts_whose_products_agree_are_one_set(probing: Callable[[Product], tuple[tuple[int, ...], ...]]) -> None:
    assert probing(lambda x, weight, packed: summed(x, weight, 1)) == (linear.ROW_COUNTS,)


def test_another_order_of_summation_is_another_set(probing: Callable[[Product], tuple[tuple[int, ...], ...]]) -> None:
    found = probing(lambda x, weight, packed: summed(x, weight, 1 if len(x) <= 32 else 2))
    assert found == (tuple(c for c in linear.ROW_COUNTS if c <= 32), tuple(c for c in linear.ROW_COUNTS if c > 32))


def test_one_row_may_differ_from_all_others(probing: Callable[[Product], tuple[tuple[int, ...], ...]]) -> None:
    found = probing(lambda x, weight, packed: summed(x, weight, 4 if len(x) == 1 else 1))
    assert found == ((1,), linear.ROW_COUNTS[1:])


def test_three_ways_of_summation_are_three_sets(probing: Callable[[Product], tuple[tuple[int, ...], ...]]) -> None:
    found = probing(lambda x, weight, packed: summed(x, weight, {48: 2, 64: 2, 256: 5}.get(len(x), 1)))
    assert set(found) == {(48, 64), (256,), tuple(c for c in linear.ROW_COUNTS if c not in (48, 64, 256))}


def test_a_count_whose_rows_depend_on_their_place_is_in_no_set(
    probing: Callable[[Product], tuple[tuple[int, ...], ...]],
) -> None:
    def last_row_differs(x: torch.Tensor, weight: torch.Tensor, packed: torch.Tensor | None) -> torch.Tensor:
        result = summed(x, weight, 1)
        if len(x) == 16:
            result[-1] = summed(x[-1:], weight, 2)[0]
        return result

    assert probing(last_row_differs) == (tuple(c for c in linear.ROW_COUNTS if c != 16),)


def test_a_difference_in_a_later_row_is_found_among_counts_that_join_one_row(
    probing: Callable[[Product], tuple[tuple[int, ...], ...]],
) -> None:
    """One row says nothing about the third vector, so 8 rows must still be compared with 4."""

    def third_vector_differs(x: torch.Tensor, weight: torch.Tensor, packed: torch.Tensor | None) -> torch.Tensor:
        result = summed(x, weight, 1)
        if len(x) == 8:
            result[2::4] = summed(x[2::4], weight, 2)
        return result

    assert probing(third_vector_differs) == (tuple(c for c in linear.ROW_COUNTS if c != 8), (8,))


@pytest.mark.parametrize(
    ("sets", "chosen"),
    [
        (((33, 64, 128, 256), (1, 8, 32, 128, 256)), (1, 8, 32, 128, 256)),
        (((1, 2, 4, 8, 16, 32), (64, 128, 256)), (64, 128, 256)),  # 512 rows in pieces of 32 cost more than padding 1
        (((1,), (2, 4, 8, 16, 32, 48, 64, 128, 256)), (2, 4, 8, 16, 32, 48, 64, 128, 256)),
        (((1, 2), (33, 64, 256)), (33, 64, 256)),
    ],
)
def test_the_set_that_costs_least_is_chosen(
    sets: tuple[tuple[int, ...], ...], chosen: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "agreeing_row_counts", lambda *_: tuple(RowSet(counts) for counts in sets))
    choose_row_set.cache_clear()
    assert choose_row_set(24, 80).counts == chosen
    choose_row_set.cache_clear()


def test_sets_of_this_machine_partition_the_counts_and_hold_for_other_data() -> None:
    x, weight = rows_of(256, 576), weight_of(960, 576, seed=9)
    packed = linear._prepack(weight)
    sets = agreeing_row_counts(960, 576)
    counts = [count for row_set in sets for count in row_set.counts]
    assert len(counts) == len(set(counts))
    for row_set in sets:
        results = [linear._product(x[:count], weight, packed) for count in row_set.counts]
        assert all(torch.equal(result[0], results[0][0]) for result in results)


# --- into a model ---


def test_bf16_layers_and_the_head_of_a_model_are_replaced_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.layers.linear import LinearBase
    from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod
    from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding

    def module(cls: type, method: object, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
        made: torch.nn.Module = cls.__new__(cls)
        torch.nn.Module.__init__(made)
        made.weight = torch.nn.Parameter(weight_of(64, 32).to(dtype), requires_grad=False)
        made.quant_method = method
        return made

    quantised = SimpleNamespace()
    model = torch.nn.Module()
    model.projection = module(LinearBase, UnquantizedLinearMethod())
    model.quantised = module(LinearBase, quantised)
    model.wide = module(LinearBase, UnquantizedLinearMethod(), torch.float32)
    model.embedding = module(VocabParallelEmbedding, UnquantizedEmbeddingMethod())
    model.lm_head = module(VocabParallelEmbedding, UnquantizedEmbeddingMethod())
    model.norm = torch.nn.LayerNorm(4)
    assert linear.install(model) == 2
    for replaced in (model.projection, model.lm_head):
        assert isinstance(replaced.quant_method, RowInvariantLinear)
        assert replaced.quant_method.weight.data_ptr() == replaced.weight.data_ptr()
    assert model.quantised.quant_method is quantised
    assert isinstance(model.wide.quant_method, UnquantizedLinearMethod)
    assert isinstance(model.embedding.quant_method, UnquantizedEmbeddingMethod)
    assert linear.install(model) == 0, "a second time there is nothing left to replace"


def test_torchs_own_linear_layers_are_row_invariant_too() -> None:
    """A drafter fuses its tapped features with such a layer."""
    fusion = torch.nn.Linear(96, 64, bias=False).bfloat16().requires_grad_(False)
    others = [torch.nn.Linear(96, 64).bfloat16(), torch.nn.Linear(96, 64, bias=False)]
    model = torch.nn.ModuleList([fusion, *others])
    x = torch.randn(40, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = fusion(x)
    assert linear.install(model) == 1
    together = fusion(x)
    assert (together.float() - before.float()).abs().max() <= 0.02
    assert torch.equal(fusion(x.view(4, 10, 96)), together.view(4, 10, 64))
    for count in (1, 2, 7, 33):
        assert torch.equal(fusion(x[:count]), together[:count])
    assert linear.install(model) == 0


def test_a_tied_head_is_replaced_once() -> None:
    from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod
    from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding

    table = VocabParallelEmbedding.__new__(VocabParallelEmbedding)
    torch.nn.Module.__init__(table)
    table.weight = torch.nn.Parameter(weight_of(64, 32), requires_grad=False)
    table.quant_method = UnquantizedEmbeddingMethod()
    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.embed_tokens = model.lm_head = table
    assert linear.install(model) == 1
    tokens = torch.tensor([5, 63])
    assert torch.equal(table.quant_method.embedding(table, tokens), table.weight[tokens])


# --- what products take ---


class Stopwatch:
    """A clock that a product moves on by `per_byte` of its rows, for each byte of its weight."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, per_byte: Callable[[int], float]) -> None:
        self.now, self.timed = 0.0, []

        def take(product: RowInvariantLinear, x: torch.Tensor) -> torch.Tensor:
            self.now += per_byte(len(x)) * product.weight.nbytes
            self.timed.append(product)
            return x

        monkeypatch.setattr(RowInvariantLinear, "__call__", take)
        monkeypatch.setattr(linear, "time", SimpleNamespace(perf_counter=lambda: self.now))


def a_model(*replaced: tuple[int, int]) -> torch.nn.Module:
    """A layer of SGLang's with its own product, which appears twice, torch layers of these shapes, and a norm."""
    model = torch.nn.Module()
    model.own = torch.nn.Module()
    model.own.quant_method = RowInvariantLinear(weight_of(64, 32))
    model.again = model.own
    model.layers = torch.nn.ModuleList(
        torch.nn.Linear(shape[1], shape[0], bias=False).bfloat16().requires_grad_(False) for shape in replaced
    )
    linear.install(model)
    model.other = torch.nn.Module()
    model.other.quant_method = SimpleNamespace()
    model.plain, model.norm = torch.nn.Linear(8, 8), torch.nn.LayerNorm(4)
    return model


def test_the_products_of_a_model_take_a_staircase(monkeypatch: pytest.MonkeyPatch) -> None:
    model = a_model((48, 32), (16, 80))
    watch = Stopwatch(monkeypatch, lambda rows: 1.0 + rows / 10)
    seconds, size = linear.product_seconds(model), 2 * (64 * 32 + 48 * 32 + 16 * 80)
    assert len(set(map(id, watch.timed))) == 3, "each product once, of SGLang's layers and of torch's"
    most = linear.TIMED_ROWS[-1]
    assert seconds(0) == 0
    for rows in range(1, most + 1):
        count = min(count for count in linear.TIMED_ROWS if count >= rows)
        assert seconds(rows) == pytest.approx((1.0 + count / 10) * size), rows
    for full in (1, 2, 5):
        assert seconds(full * most) == pytest.approx(full * seconds(most))
        for rest in (1, 7, most - 1):
            assert seconds(full * most + rest) == pytest.approx(full * seconds(most) + seconds(rest))


def test_more_rows_never_take_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever held a product up."""
    Stopwatch(monkeypatch, lambda rows: {6: 9.0, 16: 9.5, 33: 0.1}.get(rows, 1.0 + rows / 10))
    seconds = linear.product_seconds(a_model())
    taken = [seconds(rows) for rows in range(linear.TIMED_ROWS[-1] + 1)]
    assert taken == sorted(taken)


def test_of_a_large_model_some_products_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model = a_model((64, 32), (64, 32), (64, 32))
    monkeypatch.setattr(linear, "TIMED_BYTES", 2 * 64 * 32 + 1)
    watch = Stopwatch(monkeypatch, lambda rows: float(rows))
    seconds = linear.product_seconds(model)
    assert len(set(map(id, watch.timed))) == 2
    assert seconds(8) == pytest.approx(8.0 * 4 * 2 * 64 * 32)


def test_a_model_without_such_products_takes_no_time_for_them() -> None:
    assert linear.product_seconds(torch.nn.LayerNorm(4))(17) == 0
