"""Linear layers whose rows do not depend on each other, bit for bit, at SmolLM2's shapes."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from sglang_auf import env
from sglang_auf.cpu import linear
from sglang_auf.cpu.linear import RowInvariantLinear

# SmolLM2-135M: q+k+v, o, gate+up, down, and an eighth of the head.
SHAPES = [(960, 576), (576, 576), (3072, 576), (576, 1536), (6144, 576)]
COUNTS = (1, 2, 3, 7, 33, 64, 100, 300)


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


def test_outputs_that_fill_no_strip_are_those_of_the_whole_weight() -> None:
    weight, x = weight_of(100, 80), rows_of(6, 80)
    whole = RowInvariantLinear(torch.cat([weight, weight]))(x)
    some = RowInvariantLinear(weight)
    assert torch.equal(some(x), whole[:, :100])
    assert torch.equal(some.apply(torch.nn.Identity(), x.view(2, 3, 80)), some(x).reshape(2, 3, 100))


def test_inputs_may_be_views_and_have_more_dimensions() -> None:
    layer, wide = RowInvariantLinear(weight_of(576, 576)), rows_of(12, 1152)
    view = wide[:, 576:]
    assert not view.is_contiguous()
    expected = layer(view.contiguous())
    assert torch.equal(layer(view), expected)
    assert torch.equal(layer.apply(torch.nn.Identity(), view.reshape(3, 4, 576)), expected.view(3, 4, 576))
    assert torch.equal(layer.apply(torch.nn.Identity(), view), expected)
    assert torch.equal(layer(wide.T.contiguous().T[:, 576:]), expected), "rows that are not contiguous"


@pytest.mark.skipif(not linear.can_prepack(), reason="no bf16 products of oneDNN on this machine")
def test_products_may_be_left_to_onednn_to_see_what_equal_bits_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(env.ROW_INVARIANT.name, "0")
    weight, x = weight_of(576, 576), rows_of(5, 576)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, linear.PREPACKED_FOR)
    expected = torch.ops.mkldnn._linear_pointwise.default(x, packed, None, "none", [], "")
    assert torch.equal(RowInvariantLinear(weight)(x), expected)
    monkeypatch.setattr(linear, "can_prepack", lambda: False)
    assert torch.equal(RowInvariantLinear(weight)(x), torch.nn.functional.linear(x, weight))


def test_the_weight_stays_readable_and_embeds() -> None:
    weight = weight_of(100, 64)
    layer = RowInvariantLinear(weight)
    assert layer.weight is weight
    tokens = torch.tensor([[3, 99], [0, 3]])
    assert torch.equal(layer.embedding(torch.nn.Identity(), tokens), weight[tokens])


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


def drafters_attention(weight: torch.Tensor, v_scale: float | None = None) -> torch.nn.Module:
    """What is read of the attention of SGLang's DFLASH drafters: 96 queries, 32 keys and values."""
    from sglang.srt.models.dflash import DFlashAttention

    attention = DFlashAttention.__new__(DFlashAttention)
    torch.nn.Module.__init__(attention)
    attention.qkv_proj = torch.nn.Module()
    attention.qkv_proj.weight = torch.nn.Parameter(weight, requires_grad=False)
    attention.q_size, attention.kv_size, attention.v_scale = 96, 32, v_scale
    return attention


def test_keys_and_values_of_accepted_tokens_have_a_product_of_their_own() -> None:
    weight, x = weight_of(96 + 2 * 32, 64), rows_of(40, 64)
    model = torch.nn.ModuleList([drafters_attention(weight)])
    linear.install(model)
    whole = RowInvariantLinear(weight)(x)
    for count in (1, 5, 40):
        k, v = model[0].kv_proj_only(x[:count])
        assert torch.equal(k, whole[:count, 96:128]) and torch.equal(v, whole[:count, 128:])


def test_keys_and_values_that_are_scaled_or_quantised_stay_upstreams() -> None:
    """And those of other classes."""
    weight, other = weight_of(160, 64), torch.nn.Module()
    other.kv_proj_only = "upstream's own"  # type: ignore[assignment]
    quantised = torch.nn.Parameter(weight.char(), requires_grad=False)
    attentions = [drafters_attention(weight, v_scale=0.5), drafters_attention(weight), other]
    attentions[1].qkv_proj.weight = quantised  # type: ignore[union-attr]
    linear.install(torch.nn.ModuleList(attentions))
    assert all("kv_proj_only" not in vars(attention) for attention in attentions[:2])
    assert other.kv_proj_only == "upstream's own"


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
